"""Tucker algebra on coefficient tensors A of shape (n, m, n_d, ...): modes input i, output o, basis d, positions k.

The fourth mode is all further axes of A, groups and kernel positions, with K entries together. A mode without a factor
is whole: its U is the identity, which is neither stored nor multiplied. In a family of tasks, G has one more axis, the
last, and the tasks are the fifth mode. These are pure functions, without PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# (r1, r2, r3), or (r1, r2, r3, r4) with a factor of the positions; None where the mode is whole.
Ranks = tuple[int | None, ...]


class TuckerFactors(NamedTuple):
    """A tensor in Tucker form, G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 ×₅ U5. A factor is None where it is the identity.

    With U4, the tensor's positions are one axis, the fourth. Without U4, they may be any number of axes. U5 belongs to
    the last axis.
    """

    core: torch.Tensor  # shape: (r1, r2, r3, ...)
    U1: torch.Tensor | None  # shape: (n, r1)
    U2: torch.Tensor | None  # shape: (m, r2)
    U3: torch.Tensor | None  # shape: (n_d, r3)
    U4: torch.Tensor | None = None  # shape: (K, r4)
    U5: torch.Tensor | None = None  # shape: (tasks, k)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TuckerFactors:
        """`function` of the core and of every factor that is not None."""
        return TuckerFactors(*[None if tensor is None else function(tensor) for tensor in self])  # type: ignore[arg-type]

    def tensors(self) -> list[torch.Tensor]:
        """The core and the factors that are not None."""
        return [tensor for tensor in self if tensor is not None]

    def at(self, c: torch.Tensor) -> TuckerFactors:
        """The tensor of a family at one task, G ×₅ c with c, shape (P,), or G ×₅ (c · U5) with c, shape (tasks,)."""
        return self._replace(core=self.core @ self.terms(c), U5=None)

    def terms(self, c: torch.Tensor) -> torch.Tensor:
        """The weights of the terms G[..., p], in the dtype of G: c · U5, or c if there is no U5."""
        c = c.to(self.core)
        return c if self.U5 is None else c @ self.U5


def mode_product(tensor: torch.Tensor, U: torch.Tensor | None, mode: int) -> torch.Tensor:
    """tensor ×_mode U, U: (size, rank), on the axis `mode`; the tensor itself if U is the identity."""
    return tensor if U is None else torch.tensordot(tensor, U, dims=([mode], [1])).movedim(-1, mode)


def reconstruct(factors: TuckerFactors) -> torch.Tensor:
    """G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 ×₅ U5: the dense tensor, shape (n, m, n_d, ...)."""
    core, U1, U2, U3, U4, U5 = factors
    # The basis mode is the smallest, and often the input mode is next. This order keeps the intermediates small.
    tensor = mode_product(mode_product(mode_product(mode_product(core, U5, -1), U4, 3), U3, 2), U1, 0)
    return mode_product(tensor, U2, 1)


def with_positions(factors: TuckerFactors, positions: Sequence[int]) -> TuckerFactors:
    """The same tensor with G ×₄ U4 as its core, in which the axes of the positions have the sizes `positions`."""
    core, U4 = factors.core, factors.U4
    if U4 is None:
        return factors
    # 16-bit numbers are multiplied out in fp32.
    wide = torch.promote_types(core.dtype, torch.float32)
    core = mode_product(core.to(wide), U4.to(wide), 3).to(core.dtype)
    return factors._replace(core=core.reshape(*core.shape[:3], *positions, *core.shape[4:]), U4=None)


def decompose(tensor: torch.Tensor, ranks: Ranks, n_iter_max: int = 50) -> TuckerFactors:
    """argmin ‖A − G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4‖ over factors of the given ranks: truncated HOSVD improved by HOOI.

    Args:
        tensor: A, shape (n, m, n_d, ...). If the positions have a rank, they are flattened.
        ranks: each is at most the size of its mode, or None for a whole mode. A rank above the product of the others
            (and of the whole modes) gains nothing: G is zero in the surplus, and the columns of U there only complete
            it orthonormally.
        n_iter_max: how many sweeps of HOOI follow the HOSVD.
    """
    modes = [mode for mode, r in enumerate(ranks) if r is not None]
    given = [r for r in ranks if r is not None]
    if 3 in modes:
        tensor = tensor.flatten(3)
    if not modes:
        return TuckerFactors(tensor, None, None, None)
    sizes = [tensor.shape[mode] for mode in modes]
    if not tensor.any():
        shape = list(tensor.shape)
        for mode, r in zip(modes, given, strict=True):
            shape[mode] = r
        return _placed(
            tensor.new_zeros(shape), [torch.eye(n, r).to(tensor) for n, r in zip(sizes, given, strict=True)], modes
        )
    useful, volume = list(given), tensor.numel() // math.prod(sizes)
    for k in range(len(useful)):  # one pass is enough: at most one rank can exceed the product of the others
        useful[k] = min(useful[k], math.prod(useful[:k] + useful[k + 1 :]) * volume)
    # Imported here because TensorLy, with what it imports of SciPy, takes nearly as long as all of this package.
    import tensorly
    from tensorly.decomposition import partial_tucker

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            tensor, rank=useful, modes=modes, n_iter_max=n_iter_max, init="svd", tol=1e-8
        )
    return _padded(_placed(core, factors, modes), ranks)


def compress(factors: TuckerFactors, ranks: Ranks) -> tuple[TuckerFactors, float]:
    """`decompose` of G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 without its dense tensor, and the relative error ‖A − A_r‖ / ‖A‖.

    With U_k = Q_k R_k, this decomposes the smaller tensor G ×₁ R1 ×₂ R2 ×₃ R3 ×₄ R4, which has the same norm. Ranks
    are as in `decompose`.
    """
    core, *sides, _ = factors
    bases: list[torch.Tensor | None] = [None] * 4
    for mode, (U, r) in enumerate(zip(sides, (*ranks, None)[:4], strict=True)):
        if U is not None and r is not None:
            bases[mode], U = torch.linalg.qr(U)
        core = mode_product(core, U, mode)
    kept = decompose(core, tuple([None if r is None else min(r, core.shape[k]) for k, r in enumerate(ranks)]))
    error = ((core - reconstruct(kept).reshape(core.shape)).norm() / core.norm()).nan_to_num().item()
    core, *sides, _ = kept
    sides = [U if Q is None or U is None else Q @ U for Q, U in zip(bases, sides, strict=True)]
    return _padded(TuckerFactors(core, *sides), ranks), error


def orthonormal(factors: TuckerFactors) -> TuckerFactors:
    """The same tensor with orthonormal columns in every factor: U_k = Q_k R_k gives Q_k, and R_k goes into the core.

    No diagonal entry of R_k is negative, so factors that are nearly orthonormal hardly change.
    """
    core, *sides = factors
    for mode, U in enumerate(sides):
        if U is not None:
            Q, R = torch.linalg.qr(U.to(torch.promote_types(U.dtype, torch.float32)))  # there is no QR in 16 bits
            sign = torch.where(R.diagonal() < 0, -1, 1).to(R.dtype)
            sides[mode] = (Q * sign).to(U)
            core = mode_product(core, (sign[:, None] * R).to(U), mode if mode < 4 else -1)
    return TuckerFactors(core, *sides)


def weighted_sum(terms: Sequence[tuple[float, TuckerFactors]]) -> TuckerFactors:
    """Σ_j w_j · G_j ×₁ U1_j ×₂ U2_j ×₃ U3_j ×₄ U4_j, exactly: a block-diagonal core and factors side by side.

    Ranks add up. If their sum reaches the size of a mode, or the mode is whole in a term, the factors are multiplied
    into the cores, and the mode is whole.
    """
    joint: list[torch.Tensor | None] = [None] * 4
    for mode in range(4):
        own = [U for _, factors in terms if (U := factors[mode + 1]) is not None]
        if len(own) == len(terms):
            beside = torch.cat(own, dim=1)
            joint[mode] = beside if beside.shape[1] < beside.shape[0] else None
    # A term's core, multiplied by the factors that do not stay side by side with the others'.
    cores = []
    for weight, (core, *sides, _) in terms:
        for mode, U in enumerate(sides):
            core = core if joint[mode] is not None else mode_product(core, U, mode)
        cores.append(weight * core)
    shape = [cores[0].shape[k] if k > 3 or joint[k] is None else joint[k].shape[1] for k in range(cores[0].dim())]  # type: ignore[union-attr]
    total, starts = cores[0].new_zeros(shape), [0] * len(shape)
    for core in cores:
        total[tuple([slice(start, start + size) for start, size in zip(starts, core.shape, strict=True)])] += core
        for mode, side in enumerate(joint):
            if side is not None:
                starts[mode] += core.shape[mode]
    return TuckerFactors(total, *joint)


def _placed(core: torch.Tensor, factors: Sequence[torch.Tensor], modes: Sequence[int]) -> TuckerFactors:
    """G and the factors of the modes `modes`; the other modes are whole."""
    sides: list[torch.Tensor | None] = [None] * 4
    for mode, U in zip(modes, factors, strict=True):
        sides[mode] = U
    return TuckerFactors(core, *sides)


def _padded(factors: TuckerFactors, ranks: Ranks) -> TuckerFactors:
    """The same tensor with ranks up to `ranks`: G is zero there, and the columns of U complete it orthonormally."""
    core, *sides = factors
    surplus = [0] * core.dim()
    for mode, (r, U) in enumerate(zip(ranks, sides, strict=False)):
        if r is not None and U is not None:
            surplus[mode], sides[mode] = r - core.shape[mode], completed(U, r)
    core = torch.nn.functional.pad(core, [n for s in reversed(surplus) for n in (0, s)])
    return TuckerFactors(core, *sides)


def completed(U: torch.Tensor, r: int) -> torch.Tensor:
    """U, shape (n, ≤ r), with orthonormal columns added up to r."""
    if U.shape[1] == r:
        return U
    return torch.cat([U, torch.linalg.qr(U, mode="complete").Q[:, U.shape[1] : r]], dim=1)


def hosvd(tensor: torch.Tensor) -> tuple[TuckerFactors, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A = S ×₁ U1 ×₂ U2 ×₃ U3 with U_k the left singular vectors of A unfolded along mode k, and the singular values.

    S[:r1, :r2, :r3] and U_k[:, :r_k] are the truncated HOSVD.

    Args:
        tensor: A, shape (n, m, n_d, ...).
    """
    svds = [torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False) for mode in range(3)]
    vectors, values, _ = zip(*svds, strict=True)
    core = tensor
    for mode, U in enumerate(vectors):
        core = mode_product(core, U.mT, mode)
    return TuckerFactors(core, *vectors), values


def factor_shapes(
    shape: Sequence[int], ranks: Ranks, terms: int = 0, tasks: int = 0
) -> tuple[tuple[int, ...] | None, ...]:
    """The shapes of G, U1, U2, U3, U4, U5 for a tensor of shape (n, m, n_d, ...); None where the mode is whole.

    With `terms` P > 0, G is the core of a family of tasks: its last axis has this size. With `tasks` > 0, U5 has that
    many rows.
    """
    ranks = (*ranks, None)[:4]
    sizes = [*shape[:3], math.prod(shape[3:])]
    core = [size if r is None else r for size, r in zip(sizes, ranks, strict=True)]
    further = shape[3:] if ranks[3] is None else core[3:]
    further = (*further, *[terms] * (terms > 0))
    sides = [None if r is None else (n, r) for n, r in zip(sizes, ranks, strict=True)]
    return ((*core[:3], *further), *sides, (tasks, terms) if tasks else None)


def core_count(shape: Sequence[int], ranks: Ranks, terms: int = 0, tasks: int = 0) -> int:
    """How many numbers G has, without the factors."""
    return math.prod(factor_shapes(shape, ranks, terms, tasks)[0] or ())


def parameter_count(shape: Sequence[int], ranks: Ranks, terms: int = 0, tasks: int = 0) -> int:
    """How many numbers G and its factors have, for a tensor of shape (n, m, n_d, ...): r1·r2·r3·r4 + n·r1 + m·r2 +
    n_d·r3 + K·r4 if no mode is whole."""
    return sum(math.prod(part) for part in factor_shapes(shape, ranks, terms, tasks) if part is not None)
