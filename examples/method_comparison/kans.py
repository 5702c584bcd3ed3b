"""The KANs of the tasks: layers of one kind in a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from layers import KINDS, OneLayer
from torch import nn


def build_kan(kind: str, widths: Sequence[int], basis: int, seed: int) -> nn.Sequential:
    """(N, widths[0]) → (N, widths[-1]), every layer with `basis` functions; the same weights for the same seed.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"`kan` should be one of {list(KINDS)} but the value passed is {kind!r}")
    torch.manual_seed(seed)
    kan = nn.Sequential(*(OneLayer(KINDS[kind].build(n, m, basis)) for n, m in pairwise(widths)))
    if kind == "fastkan":
        # Of two inputs, a LayerNorm leaves only which one is greater; the library has a switch for it.
        kan[0].layer.layernorm = nn.Identity()
    return kan


def coefficients_of(kan: nn.Sequential, kind: str) -> dict[str, Any]:
    """What `LoTRAConfig(coefficients=...)` has to be told."""
    return dict(KINDS[kind].coefficients(kan[0].layer))
