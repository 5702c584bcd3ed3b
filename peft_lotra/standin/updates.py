"""Tucker updates as thin tensors: any of the modes i, o, d left as its rank, in the layout of any view."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from ..coefficients.spec import CoefficientSpec
from ..placement.sharded import full_tensor
from ..tensors.tucker import TuckerFactors, reconstruct
from .axes import MODES, Axes

_16_BIT = (torch.float16, torch.bfloat16)


class SampleAxisUnknown(Exception):
    """An update of some samples only, in an operation where their rows cannot be told from the others'."""


class Update(NamedTuple):
    """s · G ×₁ U1 ×₂ U2 ×₃ U3: one adapter's change of a coefficient tensor."""

    factors: TuckerFactors
    scaling: float
    samples: torch.Tensor | None = None  # shape: (batch,), bool: those that see the update; None: all

    @property
    def in_fp32(self) -> Update:
        """Itself, with factors in at least fp32: 16-bit factors are multiplied out in fp32."""
        if self.factors.core.dtype not in _16_BIT:
            return self
        return self._replace(factors=TuckerFactors(*(factor.float() for factor in self.factors)))

    def dense(self, spec: CoefficientSpec, shape: torch.Size) -> torch.Tensor:
        """The update of a parameter of this shape, in its layout; 16-bit factors are multiplied out in fp32."""
        if self.samples is not None:
            raise SampleAxisUnknown
        factors = TuckerFactors(*map(full_tensor, self.in_fp32.factors))
        return spec.stored_update(reconstruct(factors) * self.scaling, shape).to(self.factors.core.dtype)

    def rows(self, axes: Axes) -> Update:
        """The update of what a view shows: the factors' rows, and the core's along the kernel's modes."""
        core, *factors = self.factors
        for dim, mode in enumerate([mode for mode in MODES[3:] if mode in axes.starts], start=3):
            core = axes.rows(core, mode, dim)
        factors = [axes.rows(factor, mode) for factor, mode in zip(factors, "iod", strict=True)]
        return self._replace(factors=TuckerFactors(core, *factors))

    def thin(self, kept: Collection[str]) -> torch.Tensor:
        """s · G times the factors of all modes but `kept`, whose axes stay ranks; shape (i, o, d, ...)."""
        tensor, U1, U2, U3 = self.factors
        if self.scaling != 1:
            tensor = tensor * self.scaling
        (n, r1), (n_d, r3) = U1.shape, U3.shape
        steps = [("i", 0, U1), ("d", 2, U3), ("o", 1, U2)]
        if r1 * n_d * (r3 + n) < n * r3 * (r1 + n_d):  # the smaller intermediate first
            steps[:2] = steps[1::-1]
        for mode, axis, factor in steps:
            if mode not in kept:
                tensor = mode_product(tensor, factor, axis)
        return tensor


def mode_product(x: torch.Tensor, matrix: torch.Tensor, axis: int, before: int = 1, after: int = 1) -> torch.Tensor:
    """x ×_axis M, M: (out, in), where `axis` has (before · in · after) entries, flattened."""
    axis %= x.dim()
    shape = list(x.shape)
    if before > 1 or after > 1:
        x = x.unflatten(axis, (before, matrix.shape[1], after))
        axis += 1
    x = x.movedim(axis, -1)
    # As one product of two matrices: `matmul` of more axes goes one way or another, and rounds differently, depending
    # on what requires a gradient.
    y = (x.reshape(-1, matrix.shape[1]) @ matrix.T).reshape(*x.shape[:-1], matrix.shape[0]).movedim(-1, axis)
    if before > 1 or after > 1:
        axis -= 1
        shape[axis] = before * matrix.shape[0] * after
        y = y.reshape(shape)
    return y
