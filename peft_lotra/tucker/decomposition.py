"""Tucker algebra on coefficient tensors A of shape (n, m, n_d, ...): modes input i, output o, basis d, positions k.

The mode k is all further axes of A, groups and kernel positions, with K entries together. A mode without a factor is
whole: its factor is the identity, which is neither stored nor multiplied. In a family of tasks, G has one more axis,
the last. These are pure functions, without PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

# (r1, r2, r3), or (r1, r2, r3, r4) with a factor of the positions; None where the mode is whole.
Ranks = tuple[int | None, ...]

MODES = "iodk"  # in the order of the core's axes
# The names of factors in models and in files.
NAMES = {"i": "lotra_U1", "o": "lotra_U2", "d": "lotra_U3", "k": "lotra_U4"}
CORE = "lotra_core"
CONTAINERS = (CORE, *NAMES.values())
CODES = "lotra_codes"  # the codes of a family's tasks, in the first layer that the family adapts


class Tucker(NamedTuple):
    """A tensor in Tucker form, G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4.

    With a factor of k, the tensor's positions are one axis, the fourth. Without it, they may be any number of axes.
    """

    core: torch.Tensor  # G, shape: (r1, r2, r3, ...)
    factors: Mapping[str, torch.Tensor] = {}  # by mode; shapes: i (n, r1), o (m, r2), d (n_d, r3), k (K, r4)

    @classmethod
    def of(cls, named: Mapping[str, torch.Tensor | None]) -> Tucker:
        """The tensor of a core and factors by their names in models and files; no factor where a mode is whole."""
        core = named[CORE]
        assert core is not None
        found = {mode: named.get(name) for mode, name in NAMES.items()}
        return cls(core, {mode: U for mode, U in found.items() if U is not None})

    def named(self) -> dict[str, torch.Tensor]:
        """The core and the factors by their names in models and files."""
        return {CORE: self.core} | {NAMES[mode]: U for mode, U in self.factors.items()}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tucker:
        """`function` of the core and of every factor."""
        return Tucker(function(self.core), {mode: function(U) for mode, U in self.factors.items()})

    def tensors(self) -> list[torch.Tensor]:
        """The core and the factors."""
        return [self.core, *self.factors.values()]

    def times(self, factor: float) -> Tucker:
        """The tensor times a number."""
        return self._replace(core=self.core * factor)

    def at(self, c: torch.Tensor) -> Tucker:
        """The tensor of a family at one task: Σ_p c_p · G[..., p] in place of G; c: (P,)."""
        return self._replace(core=self.core @ c.to(self.core))

    def absorb(self, modes: Sequence[str]) -> Tucker:
        """The same tensor with the factors of some modes multiplied into the core, so that these modes are whole."""
        core = self.core
        for mode in modes:
            core = mode_product(core, self.factors.get(mode), MODES.index(mode))
        return Tucker(core, {mode: U for mode, U in self.factors.items() if mode not in modes})

    def dense(self) -> torch.Tensor:
        """G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4: the dense tensor, shape (n, m, n_d, ...)."""
        # The basis mode is the smallest, and often the input mode is next. This order keeps the intermediates small.
        return self.absorb("kdio").core

    def with_positions(self, positions: Sequence[int]) -> Tucker:
        """The same tensor without a factor of k; the axes of the positions have the sizes `positions`."""
        if "k" not in self.factors:
            return self
        # 16-bit numbers are multiplied out in fp32.
        dtype = torch.promote_types(self.core.dtype, torch.float32)
        whole = self._replace(core=self.core.to(dtype), factors={**self.factors, "k": self.factors["k"].to(dtype)})
        core = whole.absorb("k").core.to(self.core.dtype)
        core = core.reshape(*core.shape[:3], *positions, *core.shape[4:])
        return Tucker(core, {mode: U for mode, U in self.factors.items() if mode != "k"})

    def orthonormal(self) -> Tucker:
        """The same tensor with orthonormal columns in every factor: U = Q R gives Q, and R goes into the core.

        No diagonal entry of R is negative, so factors that are nearly orthonormal hardly change.
        """
        core, factors = self.core, {}
        for mode, U in self.factors.items():
            Q, R = torch.linalg.qr(U.to(torch.promote_types(U.dtype, torch.float32)))  # there is no QR in 16 bits
            sign = torch.where(R.diagonal() < 0, -1, 1).to(R.dtype)
            factors[mode] = (Q * sign).to(U)
            core = mode_product(core, (sign[:, None] * R).to(U), MODES.index(mode))
        return Tucker(core, factors)

    def padded(self, ranks: Ranks) -> Tucker:
        """The same tensor with ranks up to `ranks`: G is zero there, and U is completed by orthonormal columns."""
        surplus, factors = [0] * self.core.dim(), dict(self.factors)
        for axis, (mode, r) in enumerate(zip(MODES, ranks, strict=False)):
            own = self.core.shape[axis]
            if r is not None and r > own:
                surplus[axis], completed = r - own, torch.linalg.qr(factors[mode], mode="complete").Q
                factors[mode] = torch.cat([factors[mode], completed[:, own:r]], dim=1)
        core = torch.nn.functional.pad(self.core, [n for s in reversed(surplus) for n in (0, s)])
        return Tucker(core, factors)


def mode_product(tensor: torch.Tensor, U: torch.Tensor | None, axis: int) -> torch.Tensor:
    """tensor × U along an axis, U: (size, rank); the tensor itself if U is the identity."""
    return tensor if U is None else torch.tensordot(tensor, U, dims=([axis], [1])).movedim(-1, axis)


def decompose(tensor: torch.Tensor, ranks: Ranks, n_iter_max: int = 50) -> Tucker:
    """argmin ‖A − G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4‖ over factors of the given ranks: truncated HOSVD improved by HOOI.

    Args:
        tensor: A, shape (n, m, n_d, ...). Positions that have a rank are one axis, the fourth.
        ranks: each is at most the size of its mode, or None for a whole mode. A rank above the product of the others
            (and of the whole modes) gains nothing: G is zero in the surplus, and the columns of U there only complete
            it orthonormally.
        n_iter_max: how many sweeps of HOOI follow the HOSVD.
    """
    axes = [axis for axis, r in enumerate(ranks) if r is not None]
    useful = [r for r in ranks if r is not None]
    if not axes:
        return Tucker(tensor)
    volume = tensor.numel() // math.prod([tensor.shape[axis] for axis in axes])
    for k in range(len(useful)):  # one pass is enough: at most one rank can exceed the product of the others
        useful[k] = min(useful[k], math.prod(useful[:k] + useful[k + 1 :]) * volume)
    # Imported here because TensorLy, with what it imports of SciPy, takes nearly as long as all of this package.
    import tensorly
    from tensorly.decomposition import partial_tucker

    sweeps = n_iter_max if tensor.any() else 1  # of a zero tensor, none is the last one by its error
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(tensor, rank=useful, modes=axes, n_iter_max=sweeps, init="svd", tol=1e-8)
    return Tucker(core, {MODES[axis]: U for axis, U in zip(axes, factors, strict=True)}).padded(ranks)


def compress(given: Tucker, ranks: Ranks) -> tuple[Tucker, float]:
    """`decompose` of a tensor in Tucker form without its dense tensor, and the relative error ‖A − A_r‖ / ‖A‖.

    With U = Q R in every mode that has a rank, this decomposes the smaller tensor G × R, which has the same norm.
    """
    bases, sides = {}, {}
    for mode, r in zip(MODES, (*ranks, None), strict=False):
        if mode in given.factors:
            sides[mode] = given.factors[mode]
            if r is not None:
                bases[mode], sides[mode] = torch.linalg.qr(sides[mode])
    core = Tucker(given.core, sides).dense()
    kept = decompose(core, tuple([None if r is None else min(r, core.shape[k]) for k, r in enumerate(ranks)]))
    error = ((core - kept.dense().reshape(core.shape)).norm() / core.norm()).nan_to_num().item()
    factors = {mode: bases[mode] @ U if mode in bases else U for mode, U in kept.factors.items()}
    return kept._replace(factors=factors).padded(ranks), error


def weighted_sum(terms: Sequence[tuple[float, Tucker]]) -> Tucker:
    """Σ_j w_j · G_j ×₁ U1_j ×₂ U2_j ×₃ U3_j ×₄ U4_j, exactly: a block-diagonal core and factors side by side.

    Where the sum of the ranks reaches the size of the mode, or the mode is whole in a term, it is whole.
    """
    joint = {}
    for mode in MODES:
        if all(mode in one.factors for _, one in terms):
            beside = torch.cat([one.factors[mode] for _, one in terms], dim=1)
            if beside.shape[1] < beside.shape[0]:
                joint[mode] = beside
    cores = [weight * one.absorb([mode for mode in MODES if mode not in joint]).core for weight, one in terms]
    shape = [joint[mode].shape[1] if mode in joint else n for mode, n in zip(MODES, cores[0].shape, strict=True)]
    total, starts = cores[0].new_zeros(shape), [0] * len(shape)
    for core in cores:
        total[tuple([slice(start, start + n) for start, n in zip(starts, core.shape, strict=True)])] += core
        starts = [start + n * (mode in joint) for mode, start, n in zip(MODES, starts, core.shape, strict=True)]
    return Tucker(total, joint)


def hosvd(tensor: torch.Tensor) -> tuple[Tucker, dict[str, torch.Tensor]]:
    """A = S ×₁ U1 ×₂ U2 ×₃ U3 with the left singular vectors of its unfoldings, and the singular values.

    S[:r1, :r2, :r3] and the first r columns of each factor are the truncated HOSVD.
    """
    core, factors, values = tensor, {}, {}
    for axis, mode in enumerate("iod"):
        unfolded = tensor.movedim(axis, 0).flatten(1)
        factors[mode], values[mode], _ = torch.linalg.svd(unfolded, full_matrices=False)
        core = mode_product(core, factors[mode].mT, axis)
    return Tucker(core, factors), values


def tucker_shapes(shape: Sequence[int], ranks: Ranks, terms: int = 0) -> dict[str, tuple[int, ...]]:
    """The shapes of the core and of the factors of a tensor of shape (n, m, n_d, ...), by name; none for whole modes.

    With `terms` P > 0, G is the core of a family of tasks: its last axis has this size.
    """
    ranks = (*ranks, None)[:4]
    sizes = [*shape[:3], math.prod(shape[3:])]
    core = [size if r is None else r for size, r in zip(sizes, ranks, strict=True)]
    further = shape[3:] if ranks[3] is None else core[3:]
    shapes: dict[str, tuple[int, ...]] = {CORE: (*core[:3], *further, *[terms] * (terms > 0))}
    for mode, size, r in zip(MODES, sizes, ranks, strict=True):
        if r is not None:
            shapes[NAMES[mode]] = size, r
    return shapes


def core_count(shape: Sequence[int], ranks: Ranks, terms: int = 0) -> int:
    """How many numbers G has, without the factors."""
    return math.prod(tucker_shapes(shape, ranks, terms)[CORE])


def parameter_count(shape: Sequence[int], ranks: Ranks, terms: int = 0) -> int:
    """How many numbers G and its factors have, for a tensor of shape (n, m, n_d, ...): r1·r2·r3·r4 + n·r1 + m·r2 +
    n_d·r3 + K·r4 if no mode is whole."""
    return sum(map(math.prod, tucker_shapes(shape, ranks, terms).values()))
