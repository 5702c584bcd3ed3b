"""Tucker algebra on coefficient tensors A of shape (n, m, n_d, ...): modes input i, output o, basis d.

Trailing axes (groups, convolution kernels) are not factored; they stay in the core. Pure functions, no PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorly
import torch
from tensorly.decomposition import partial_tucker


class TuckerFactors(NamedTuple):
    """A tensor in Tucker form, G ×₁ U1 ×₂ U2 ×₃ U3."""

    core: torch.Tensor  # shape: (r1, r2, r3, ...)
    U1: torch.Tensor  # shape: (n, r1)
    U2: torch.Tensor  # shape: (m, r2)
    U3: torch.Tensor  # shape: (n_d, r3)


def reconstruct(factors: TuckerFactors) -> torch.Tensor:
    """G ×₁ U1 ×₂ U2 ×₃ U3: the dense tensor, shape (n, m, n_d, ...)."""
    # The basis mode is the smallest and the input mode often the next: growing in this order keeps intermediates thin.
    tensor = torch.einsum("abc...,dc->abd...", factors.core, factors.U3)
    tensor = torch.einsum("abd...,ia->ibd...", tensor, factors.U1)
    return torch.einsum("ibd...,ob->iod...", tensor, factors.U2)


def decompose(tensor: torch.Tensor, ranks: Sequence[int], n_iter_max: int = 50) -> TuckerFactors:
    """argmin ‖A − G ×₁ U1 ×₂ U2 ×₃ U3‖ over factors of the given ranks: truncated HOSVD improved by HOOI.

    Args:
        tensor: A, shape (n, m, n_d, ...).
        ranks: (r1, r2, r3), each at most its mode.
        n_iter_max: sweeps of HOOI after the HOSVD.
    """
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            tensor, rank=list(ranks), modes=[0, 1, 2], n_iter_max=n_iter_max, init="svd", tol=1e-8
        )
    return TuckerFactors(core, *factors)


def parameter_count(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """r1·r2·r3·(trailing sizes) + n·r1 + m·r2 + n_d·r3, for a tensor of shape (n, m, n_d, ...)."""
    return math.prod(ranks) * math.prod(shape[3:]) + sum(size * r for size, r in zip(shape[:3], ranks, strict=True))
