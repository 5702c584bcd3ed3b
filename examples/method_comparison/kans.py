"""The KANs of the tasks: layers of one kind in a row, and convolutional ones with residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from layers import KINDS, ConvKANLayer, OneLayer
from torch import Tensor, nn


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


class ResidualBlock(nn.Module):
    """x + conv_2(norm_2(conv_1(norm_1(x)))), shape (N, channels, height, width)"""

    def __init__(self, channels: int, basis: int) -> None:
        super().__init__()
        layers = ((nn.GroupNorm(1, channels), ConvKANLayer(channels, channels, 3, basis)) for _ in range(2))
        self.layers = nn.Sequential(*(module for pair in layers for module in pair))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResNetKAN(nn.Module):
    """(N, size²) → (N, classes): a convolution, residual blocks with the size halved between them, a KAN layer on the
    mean over each quarter of the image."""

    def __init__(self, size: int, channels: int, blocks: int, classes: int, basis: int) -> None:
        super().__init__()
        self.size = size
        self.stem = ConvKANLayer(1, channels, 3, basis)
        self.blocks = nn.ModuleList(ResidualBlock(channels, basis) for _ in range(blocks))
        self.norm = nn.LayerNorm(4 * channels)
        self.head = ConvKANLayer(4 * channels, classes, 1, basis)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, self.size, self.size))
        for number, block in enumerate(self.blocks):
            x = block(F.avg_pool2d(x, 2) if number else x)
        x = self.norm(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return self.head(x[..., None, None]).flatten(1)
