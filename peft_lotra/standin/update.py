"""Tucker updates of a coefficient tensor, and their products as short sequences of matrix products."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..coefficients.spec import CoefficientSpec
from ..placement.sharded import full_tensor
from ..tensors.tucker import TuckerFactors, reconstruct
from .axes import Rows

_16_BIT = (torch.float16, torch.bfloat16)


class SampleAxisUnknown(Exception):
    """An update with weights per sample, in an operation whose samples cannot be told apart."""


class Update(NamedTuple):
    """s · G ×₁ U1 ×₂ U2 ×₃ U3: one adapter's change of a coefficient tensor.

    With `weights` w, shape (batch, P), sample b sees Σ_p w[b, p] · s · G[..., p] ×₁ U1 ×₂ U2 ×₃ U3: the core has one
    more axis, of size P, unless P = 1.
    """

    factors: TuckerFactors
    scaling: float
    weights: torch.Tensor | None = None

    @property
    def terms(self) -> int:
        """P, the number of thin terms that are weighted and summed."""
        return 1 if self.weights is None else self.weights.shape[1]

    @property
    def ranks(self) -> tuple[int, int, int]:
        """(r1, r2, r3)."""
        _, U1, U2, U3 = self.factors
        return U1.shape[1], U2.shape[1], U3.shape[1]

    def dense(self, spec: CoefficientSpec, shape: torch.Size) -> torch.Tensor:
        """The update of a parameter of this shape, in its layout; 16-bit factors are multiplied out in fp32.

        Raises:
            SampleAxisUnknown: if it differs from sample to sample.
        """
        if self.weights is not None:
            raise SampleAxisUnknown
        dtype = self.factors.core.dtype
        factors = TuckerFactors(*(full_tensor(factor) for factor in _in_fp32(self).factors))
        return spec.stored_update(reconstruct(factors) * self.scaling, shape).to(dtype)

    def shown(self, rows: tuple[Rows, ...]) -> Update:
        """The update of what a view shows, in at least fp32: `rows` of U1, U2, U3 and of the core's further axes."""
        update = _in_fp32(self)
        if not any(part is not None for part in rows):
            return update
        core, *factors = update.factors
        for dim, part in enumerate(rows[3:], start=3):
            core = _selected(core, part, dim)
        factors = [_selected(factor, part, 0) for factor, part in zip(factors, rows, strict=False)]
        return update._replace(factors=TuckerFactors(core, *factors))

    def multiplied(self, kept: Collection[str]) -> torch.Tensor:
        """s · G times the factors of all modes but `kept`, whose axes stay ranks; shape (i, o, d, ...).

        P terms lie side by side on the axis of o, which must be kept then.
        """
        core, U1, U2, U3 = self.factors
        tensor = core if self.scaling == 1 else core * self.scaling
        if self.terms > 1:
            tensor = tensor.movedim(-1, 1).flatten(1, 2)
        (n, r1), (n_d, r3) = U1.shape, U3.shape
        if "i" not in kept and r1 * n_d * (r3 + n) >= n * r3 * (r1 + n_d):  # the smaller intermediate first
            tensor = mode_product(tensor, U1, 0)
            kept = (*kept, "i")
        if "d" not in kept:
            tensor = mode_product(tensor, U3, 2)
        if "i" not in kept:
            tensor = mode_product(tensor, U1, 0)
        return tensor if "o" in kept else mode_product(tensor, U2, 1)


def _in_fp32(update: Update) -> Update:
    """With factors in at least fp32: 16-bit factors are multiplied out in fp32."""
    if update.factors.core.dtype not in _16_BIT:
        return update
    return update._replace(factors=TuckerFactors(*(factor.float() for factor in update.factors)))


def _selected(tensor: torch.Tensor, rows: Rows, dim: int) -> torch.Tensor:
    if rows is None:
        return tensor
    if isinstance(rows, range):
        return tensor.narrow(dim, rows.start, len(rows))
    return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))


def mode_product(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """x ×_axis M, M: (out, in).

    As a product of matrices, not by `matmul` of more axes, which goes one way or another, and rounds differently,
    depending on what requires a gradient.
    """
    shape = x.shape
    if axis == 0:
        return (matrix @ x.reshape(shape[0], -1)).reshape(-1, *shape[1:])
    if axis == len(shape) - 1:
        return F.linear(x.reshape(-1, shape[axis]), matrix).reshape(*shape[:axis], -1)
    flat = x.reshape(math.prod(shape[:axis]), shape[axis], -1)
    return torch.bmm(matrix.expand(len(flat), -1, -1), flat).reshape(*shape[:axis], -1, *shape[axis + 1 :])


def flat_mode_product(x: torch.Tensor, matrix: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    """x ×_axis M, M: (out, in), where `axis` has (before · in · after) entries, flattened; x is large."""
    axis %= x.dim()
    shape = list(x.shape)
    if before > 1 or after > 1:
        x = x.unflatten(axis, (before, matrix.shape[1], after))
        axis += 1
    x = x.movedim(axis, -1)
    y = F.linear(x.reshape(-1, matrix.shape[1]), matrix).reshape(*x.shape[:-1], len(matrix)).movedim(-1, axis)
    if before > 1 or after > 1:
        axis -= 1
        shape[axis] = before * len(matrix) * after
        y = y.reshape(shape)
    return y
