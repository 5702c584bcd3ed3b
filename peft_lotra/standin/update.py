"""Tucker updates of a coefficient tensor, and their products as short sequences of matrix products."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..calls.context import Samples
from ..calls.samples import SampleAxisUnknown
from ..tensors.tucker import TuckerFactors
from .axes import Rows

_16_BIT = (torch.float16, torch.bfloat16)


class Update(NamedTuple):
    """s · G ×₁ U1 ×₂ U2 ×₃ U3: one adapter's change of a coefficient tensor.

    With `weights` w, shape (batch, P), sample b sees Σ_p w[b, p] · s · G[..., p] ×₁ U1 ×₂ U2 ×₃ U3. The core then has
    one more axis, of size P, unless P = 1. `samples` says where the samples are; None: nobody knows.
    """

    factors: TuckerFactors
    scaling: float
    weights: torch.Tensor | None = None
    samples: Samples | None = None

    def for_samples(self, mask: torch.Tensor | None, samples: Samples | None) -> Update:
        """The update for those samples whose `mask`, shape (batch, 1), is true; None: for all samples."""
        weights = self.weights
        if mask is not None:
            weights = mask if weights is None else torch.where(mask, weights, 0)
        return self._replace(weights=weights, samples=samples)

    def check_common(self) -> None:
        """Raise SampleAxisUnknown if the update differs from sample to sample."""
        if self.weights is not None:
            raise SampleAxisUnknown

    def shown(self, rows: tuple[Rows, ...] | None) -> Update:
        """The update of what a view shows, in at least fp32: `rows` are of U1, U2, U3 and of the core's last axes."""
        update = _in_fp32(self) if self.factors.core.dtype in _16_BIT else self
        if rows is None:
            return update
        core, *sides = update.factors
        factors: list[Any] = sides
        for dim, part in enumerate(rows):
            if dim > 2 or factors[dim] is None:
                core = _selected(core, part, dim)
            else:
                factors[dim] = _selected(factors[dim], part, 0)
        return update._replace(factors=TuckerFactors(core, *factors))


def _in_fp32(update: Update) -> Update:
    """The update with its factors in fp32."""
    return update._replace(factors=update.factors.map(torch.Tensor.float))


def _selected(tensor: torch.Tensor, rows: Rows, dim: int) -> torch.Tensor:
    if rows is None:
        return tensor
    if isinstance(rows, range):
        return tensor.narrow(dim, rows.start, len(rows))
    return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))


class Step(NamedTuple):
    """One product of a factor with a tensor, as a product of matrices.

    `matmul` of more axes is avoided: it rounds differently depending on which of its operands requires a gradient.
    """

    factor: int
    shape: tuple[int, ...] | None  # reshape the tensor to this first
    batch: int  # the number of products M @ tensor[k]; 0: M @ tensor; -1: tensor @ M.T


def planned_steps(
    core: tuple[int, ...], sizes: tuple[int, ...], kept: Collection[str], whole: str
) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """The steps that multiply G with the factors of all modes but `kept`, and the shape of the last step's result.

    Args:
        core: the shape of G.
        sizes: (n, m, n_d).
        kept: those of "i", "o", "d" whose axes stay ranks.
        whole: the modes without a factor.
    """
    (r1, _, r3), (n, _, n_d) = core[:3], sizes
    d_first = r1 * n_d * (r3 + n) < n * r3 * (r1 + n_d)  # the smaller intermediate first
    steps: list[Step] = []
    shape, given = list(core), tuple(core)
    needed: tuple[int, ...]
    result: tuple[int, ...]
    for mode in "dio" if d_first or "i" in kept else "ido":
        axis = "iod".index(mode)
        if mode in kept or mode in whole:
            continue
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        if axis == 0:
            needed, batch, result = (shape[0], after), 0, (sizes[0], after)
        elif after == 1:
            needed, batch = (*shape[:axis], shape[axis]) if given == tuple(shape) else (before, shape[axis]), -1
            result = (*needed[:-1], sizes[axis])
        else:
            needed, batch, result = (before, shape[axis], after), before, (before, sizes[axis], after)
        steps.append(Step(axis + 1, None if given == needed else needed, batch))
        shape[axis], given = sizes[axis], result
    return tuple(steps), given


def multiplied(steps: tuple[Step, ...], tensor: torch.Tensor, factors: tuple[Any, ...]) -> torch.Tensor:
    """The result of the steps of `planned_steps`, from G or a multiple of it."""
    for factor, shape, batch in steps:
        if shape is not None:
            tensor = tensor.reshape(shape)
        matrix = factors[factor]
        if batch > 0:
            tensor = torch.bmm(matrix.expand(batch, -1, -1), tensor)
        else:
            tensor = F.linear(tensor, matrix) if batch else matrix @ tensor
    return tensor


def flat_mode_product(x: torch.Tensor, matrix: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    """x ×_axis M, M: (out, in), where `axis` is (before, in, after) flattened. It is meant for a large x."""
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
