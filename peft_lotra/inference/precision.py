"""The precisions in which layers are tested, and the count of passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layouts import Tolerance


@dataclass
class Passes:
    """How often layers were run forward and backward."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    affine: float
    tolerance: Tolerance


# In float64 where the layer can; some make float32 tensors of their own.
PRECISIONS = (
    Precision(torch.float64, 1e-7, Tolerance(ratio=1e-6, product=1e-7, zero=1e-9)),
    Precision(torch.float32, 1e-3, Tolerance(ratio=2e-3, product=1e-3, zero=1e-3)),
)

FINITE_DIFFERENCES = Tolerance(ratio=1e-3, product=1e-5, zero=1e-5)  # in float64
