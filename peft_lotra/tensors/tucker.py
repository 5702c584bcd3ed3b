"""Tucker algebra on coefficient tensors A of shape (n, m, n_d, ...): modes input i, output o, basis d.

Trailing axes (groups, convolution kernels) are not factored; they stay in the core. Pure functions, no PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorly
import torch
from tensorly.decomposition import partial_tucker

Ranks = tuple[int, int, int]  # (r1, r2, r3)


class TuckerFactors(NamedTuple):
    """A tensor in Tucker form, G ×₁ U1 ×₂ U2 ×₃ U3."""

    core: torch.Tensor  # shape: (r1, r2, r3, ...)
    U1: torch.Tensor  # shape: (n, r1)
    U2: torch.Tensor  # shape: (m, r2)
    U3: torch.Tensor  # shape: (n_d, r3)


def reconstruct(factors: TuckerFactors) -> torch.Tensor:
    """G ×₁ U1 ×₂ U2 ×₃ U3: the dense tensor, shape (n, m, n_d, ...)."""
    # The basis mode is the smallest and the input mode often the next: growing in this order keeps intermediates thin.
    tensor = torch.einsum("abc...,dc->abd...", factors.core, factors.U3)
    tensor = torch.einsum("abd...,ia->ibd...", tensor, factors.U1)
    return torch.einsum("ibd...,ob->iod...", tensor, factors.U2)


def decompose(tensor: torch.Tensor, ranks: Sequence[int], n_iter_max: int = 50) -> TuckerFactors:
    """argmin ‖A − G ×₁ U1 ×₂ U2 ×₃ U3‖ over factors of the given ranks: truncated HOSVD improved by HOOI.

    Args:
        tensor: A, shape (n, m, n_d, ...).
        ranks: (r1, r2, r3), each at most its mode. Where one exceeds the product of the others (and of the trailing
            sizes) the surplus cannot help: G is zero there, and the columns of U only complete it orthonormally.
        n_iter_max: sweeps of HOOI after the HOSVD.
    """
    if not tensor.any():
        eyes = (torch.eye(size, r).to(tensor) for size, r in zip(tensor.shape[:3], ranks, strict=True))
        return TuckerFactors(tensor.new_zeros(*ranks, *tensor.shape[3:]), *eyes)
    useful, volume = list(ranks), math.prod(tensor.shape[3:])
    for mode in range(3):  # one pass settles it: at most one rank can exceed the product of the others
        useful[mode] = min(useful[mode], math.prod(useful[:mode] + useful[mode + 1 :]) * volume)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            tensor, rank=useful, modes=[0, 1, 2], n_iter_max=n_iter_max, init="svd", tol=1e-8
        )
    return _padded(TuckerFactors(core, *factors), ranks)


def compress(factors: TuckerFactors, ranks: Sequence[int]) -> tuple[TuckerFactors, float]:
    """`decompose` of G ×₁ U1 ×₂ U2 ×₃ U3 without its dense tensor, and the relative error ‖A − A_r‖ / ‖A‖.

    With U_k = Q_k R_k, that of the smaller tensor G ×₁ R1 ×₂ R2 ×₃ R3, of the same norms. Ranks as in `decompose`.
    """
    (Q1, R1), (Q2, R2), (Q3, R3) = map(torch.linalg.qr, factors[1:])
    core = reconstruct(TuckerFactors(factors.core, R1, R2, R3))
    kept = decompose(core, [min(r, size) for r, size in zip(ranks, core.shape[:3], strict=True)])
    error = ((core - reconstruct(kept)).norm() / core.norm()).nan_to_num().item()
    return _padded(TuckerFactors(kept.core, Q1 @ kept.U1, Q2 @ kept.U2, Q3 @ kept.U3), ranks), error


def orthonormal(factors: TuckerFactors) -> TuckerFactors:
    """The same tensor with orthonormal columns in every factor: U_k = Q_k R_k gives Q_k and G ×₁ R1 ×₂ R2 ×₃ R3.

    R_k has no negative diagonal: factors that are nearly orthonormal hardly move.
    """
    sides, cores = [], []
    for U in factors[1:]:
        Q, R = torch.linalg.qr(U.to(torch.promote_types(U.dtype, torch.float32)))  # 16 bits have no QR
        sign = torch.where(R.diagonal() < 0, -1, 1).to(R.dtype)
        sides.append((Q * sign).to(U))
        cores.append((sign[:, None] * R).to(U))
    return TuckerFactors(reconstruct(TuckerFactors(factors.core, *cores)), *sides)


def weighted_sum(terms: Sequence[tuple[float, TuckerFactors]]) -> TuckerFactors:
    """Σ_j w_j · G_j ×₁ U1_j ×₂ U2_j ×₃ U3_j, exactly: a block-diagonal core and factors side by side.

    Ranks add up. Where their sum exceeds the size of the mode, the factors are multiplied into the cores instead, and
    the common factor is the identity.
    """
    sides, ranks = [], []
    for mode in (1, 2, 3):
        joint = torch.cat([factors[mode] for _, factors in terms], dim=1)
        fits = joint.shape[1] <= joint.shape[0]
        sides.append(joint if fits else torch.eye(len(joint)).to(joint))
        ranks.append([factors[mode].shape[1] if fits else None for _, factors in terms])
    core = terms[0][1].core.new_zeros(*(side.shape[1] for side in sides), *terms[0][1].core.shape[3:])
    starts = [0, 0, 0]
    for (weight, factors), sizes in zip(terms, zip(*ranks, strict=True), strict=True):
        # A factor that stays beside the others is an identity on its core.
        within = [U if r is None else torch.eye(r).to(U) for U, r in zip(factors[1:], sizes, strict=True)]
        block = [slice(None) if r is None else slice(k, k + r) for k, r in zip(starts, sizes, strict=True)]
        core[tuple(block)] += weight * reconstruct(TuckerFactors(factors.core, *within))
        starts = [k + (r or 0) for k, r in zip(starts, sizes, strict=True)]
    return TuckerFactors(core, *sides)


def _padded(factors: TuckerFactors, ranks: Sequence[int]) -> TuckerFactors:
    """The same tensor with ranks up to `ranks`: G is zero there, and the columns of U complete it orthonormally."""
    core, *sides = factors
    surplus = [r - size for r, size in zip(ranks, core.shape[:3], strict=True)]
    core = torch.nn.functional.pad(core, [0, 0] * (core.dim() - 3) + [n for s in reversed(surplus) for n in (0, s)])
    return TuckerFactors(core, *(_completed(U, r) for U, r in zip(sides, ranks, strict=True)))


def _completed(U: torch.Tensor, r: int) -> torch.Tensor:
    """U, shape (n, ≤ r), with orthonormal columns added up to r."""
    if U.shape[1] == r:
        return U
    return torch.cat([U, torch.linalg.qr(U, mode="complete").Q[:, U.shape[1] : r]], dim=1)


def hosvd(tensor: torch.Tensor) -> tuple[TuckerFactors, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A = S ×₁ U1 ×₂ U2 ×₃ U3 with U_k the left singular vectors of A unfolded along mode k, and the singular values.

    Cut to S[:r1, :r2, :r3], U_k[:, :r_k] it is the truncated HOSVD.

    Args:
        tensor: A, shape (n, m, n_d, ...).
    """
    svds = [torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False) for mode in range(3)]
    vectors, values, _ = zip(*svds, strict=True)
    core = torch.einsum("iod...,ia->aod...", tensor, vectors[0])
    core = torch.einsum("aod...,ob->abd...", core, vectors[1])
    return TuckerFactors(torch.einsum("abd...,dc->abc...", core, vectors[2]), *vectors), values


def factor_shapes(shape: Sequence[int], ranks: Ranks) -> tuple[tuple[int, ...], ...]:
    """The shapes of G, U1, U2, U3 for a tensor of shape (n, m, n_d, ...)."""
    return ((*ranks, *shape[3:]), *((size, r) for size, r in zip(shape[:3], ranks, strict=True)))


def parameter_count(shape: Sequence[int], ranks: Ranks) -> int:
    """r1·r2·r3·(trailing sizes) + n·r1 + m·r2 + n_d·r3, for a tensor of shape (n, m, n_d, ...)."""
    return sum(map(math.prod, factor_shapes(shape, ranks)))
