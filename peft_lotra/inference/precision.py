"""The precisions in which layers are tested, and a counter of passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass
class Passes:
    """The numbers of forward and backward passes of layers."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Precision:
    """A dtype, and the relative differences that its rounding explains."""

    dtype: torch.dtype
    affine: float  # between tensors that should be affine in a parameter, or equal
    ratio: float  # between ratios of responses
    product: float  # between products
    zero: float  # the size of a response that should be zero


# float64 comes first. Some layers need float32, because they create float32 tensors.
PRECISIONS = (
    Precision(torch.float64, affine=1e-7, ratio=1e-6, product=1e-7, zero=1e-9),
    Precision(torch.float32, affine=1e-3, ratio=2e-3, product=1e-3, zero=1e-3),
)

FINITE_DIFFERENCES = replace(PRECISIONS[0], ratio=1e-3, product=1e-5, zero=1e-5)
