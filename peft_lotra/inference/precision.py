"""The precisions in which layers are tested, and a counter of passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layouts import Tolerance


@dataclass
class Passes:
    """The numbers of forward and backward passes of layers."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    affine: float
    tolerance: Tolerance


# float64 comes first. Some layers need float32, because they create float32 tensors.
PRECISIONS = (
    Precision(torch.float64, 1e-7, Tolerance(ratio=1e-6, product=1e-7, zero=1e-9)),
    Precision(torch.float32, 1e-3, Tolerance(ratio=2e-3, product=1e-3, zero=1e-3)),
)

FINITE_DIFFERENCES = Tolerance(ratio=1e-3, product=1e-5, zero=1e-5)  # in float64
