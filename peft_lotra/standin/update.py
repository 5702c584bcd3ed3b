"""Tucker updates of a coefficient tensor, and their products as short sequences of matrix products."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..calls.context import Samples
from ..calls.samples import SampleAxisUnknown
from ..placement.constants import constant
from ..tucker.decomposition import Tucker
from .axes import Rows


class Update(NamedTuple):
    """s · G ×₁ U1 ×₂ U2 ×₃ U3: one adapter's change of a coefficient tensor.

    With `weights` w, shape (batch, P), sample b sees Σ_p w[b, p] · s · G[..., p] ×₁ U1 ×₂ U2 ×₃ U3. The core then has
    one more axis, of size P, unless P = 1. `samples` says where the samples are; None: nobody knows.

    With `rows`, this is a stack of several adapters of the same ranks: core and factors have one more axis, the first,
    and only the samples `rows[k]` see the update of the k-th.
    """

    tucker: Tucker
    scaling: float
    weights: torch.Tensor | None = None
    samples: Samples | None = None
    rows: tuple[tuple[int, ...], ...] | None = None

    def for_samples(self, rows: tuple[int, ...] | None, samples: Samples) -> Update:
        """The update for some samples; None: for all of them."""
        weights = self.weights
        if rows is not None:
            mask = torch.zeros(samples.number, 1, dtype=torch.bool, device=self.tucker.core.device)
            mask = mask.index_fill(0, constant(rows, mask.device), True)
            weights = mask if weights is None else torch.where(mask, weights, 0)
        return self._replace(weights=weights, samples=samples)

    def members(self) -> list[Update]:
        """The updates of a stack, each with weights per sample in place of rows; otherwise the update itself."""
        if self.rows is None or self.samples is None:
            return [self]
        parts = zip(*[tensor.unbind() for tensor in self.tucker.tensors()], strict=True)
        tuckers = [Tucker(core, dict(zip(self.tucker.factors, own, strict=True))) for core, *own in parts]
        return [
            Update(tucker, self.scaling).for_samples(rows, self.samples)
            for tucker, rows in zip(tuckers, self.rows, strict=True)
        ]

    def check_common(self) -> None:
        """Raise SampleAxisUnknown if the update differs from sample to sample."""
        if self.weights is not None or self.rows is not None:
            raise SampleAxisUnknown

    def shown(self, rows: tuple[Rows, ...] | None) -> Update:
        """The update of what a view shows, in at least fp32: `rows` are those of the axes i, o, d, …"""
        tucker = self.tucker
        if tucker.core.dtype in (torch.float16, torch.bfloat16):
            tucker = tucker.map(torch.Tensor.float)
        elif rows is None:
            return self
        core, factors, first = tucker.core, dict(tucker.factors), int(self.rows is not None)
        for dim, part in enumerate(rows or ()):
            mode = "iod"[dim : dim + 1]
            if mode in factors:
                factors[mode] = _selected(factors[mode], part, first)
            else:
                core = _selected(core, part, first + dim)
        return self._replace(tucker=Tucker(core, factors))


def _selected(tensor: torch.Tensor, rows: Rows, dim: int) -> torch.Tensor:
    if rows is None:
        return tensor
    if isinstance(rows, range):
        return tensor.narrow(dim, rows.start, len(rows))
    return tensor.index_select(dim, constant(tuple(rows), tensor.device))


class Step(NamedTuple):
    """One product of a factor with a tensor, as a product of matrices.

    `matmul` of more axes is avoided: it rounds differently depending on which of its operands requires a gradient.
    """

    mode: str  # of the factor
    shape: tuple[int, ...] | None  # reshape the tensor to this first
    batch: int  # the number of products M @ tensor[k]; 0: M @ tensor; -1: tensor @ M.T


class Products(NamedTuple):
    """The products of a core G with factors, in turn."""

    steps: tuple[Step, ...]
    shape: tuple[int, ...]  # of the result

    def __call__(self, core: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for mode, shape, batch in self.steps:
            if shape is not None:
                core = core.reshape(shape)
            matrix = factors[mode]
            if batch > 0:
                core = torch.bmm(matrix.expand(batch, -1, -1), core)
            else:
                core = F.linear(core, matrix) if batch else matrix @ core
        return core if core.shape == self.shape else core.reshape(self.shape)

    def stacked(self, core: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The same of every core in a stack, with its own factors; the first axis is that of the stack."""
        for mode, _, batch in self.steps:
            matrices, count = factors[mode], len(core)
            rank = matrices.shape[2]
            if batch > 0:
                core = matrices.unsqueeze(1) @ core.reshape(count, batch, rank, -1)
            elif batch:
                core = torch.bmm(core.reshape(count, -1, rank), matrices.mT)
            else:
                core = torch.bmm(matrices, core.reshape(count, rank, -1))
        return core.reshape(len(core), *self.shape)


class Slots(NamedTuple):
    """Samples sorted by the member of a stack that they see: equally many slots for each, the surplus ones unused."""

    samples: tuple[int, ...]  # the sample in each slot
    places: tuple[int, ...]  # the slot of each sample; behind the last one for a sample that sees no member

    @classmethod
    def of(cls, rows: tuple[tuple[int, ...], ...], count: int) -> Slots:
        size = max(map(len, rows))
        samples, places = [], [size * len(rows)] * count
        for k, own in enumerate(rows):
            for place, row in enumerate(own, start=size * k):
                places[row] = place
            samples += [*own, *own[:1] * (size - len(own))] if own else [0] * size
        return cls(tuple(samples), tuple(places))


def products_of(core: tuple[int, ...], sizes: Collection[int], kept: str, whole: str) -> Products:
    """The products of G with the factors of all modes but those that are `kept` as ranks, or whole.

    Args:
        core: the shape of G.
        sizes: (n, m, n_d).
        kept, whole: some of "iod".
    """
    n, m, n_d = sizes
    r1, _, r3 = core[:3]
    d_first = r1 * n_d * (r3 + n) < n * r3 * (r1 + n_d)  # the smaller intermediate first
    steps = []
    shape, given = list(core), tuple(core)
    for mode in "dio" if d_first or "i" in kept else "ido":
        axis, size = {"i": (0, n), "o": (1, m), "d": (2, n_d)}[mode]
        if mode in kept or mode in whole:
            continue
        before, rank, after = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        needed: tuple[int, ...]
        result: tuple[int, ...]
        if axis == 0:
            needed, batch, result = (rank, after), 0, (size, after)
        elif after == 1:
            needed, batch = tuple(shape[: axis + 1]) if given == tuple(shape) else (before, rank), -1
            result = (*needed[:-1], size)
        else:
            needed, batch, result = (before, rank, after), before, (before, size, after)
        steps.append(Step(mode, None if given == needed else needed, batch))
        shape[axis], given = size, result
    return Products(tuple(steps), tuple(shape))


def flat_mode_product(x: torch.Tensor, matrix: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    """x ×_axis M, M: (out, in), where `axis` is (before, in, after) flattened. It is meant for a large x."""
    axis %= x.dim()
    x = x.unflatten(axis, (before, matrix.shape[1], after)).movedim(axis + 1, -1)
    y = F.linear(x.reshape(-1, matrix.shape[1]), matrix).reshape(*x.shape[:-1], len(matrix))
    return y.movedim(-1, axis + 1).flatten(axis, axis + 2)
