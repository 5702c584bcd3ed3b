"""Tucker ranks for coefficient tensors: given exactly, clipped, within a budget, or from the spectra of updates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from numbers import Integral
from typing import Any, NamedTuple

import torch

from ..preserved import is_number
from .decomposition import Ranks, core_count, parameter_count
from .spectrum import Spectrum

DEFAULT_COMPRESSION_RATIO = 0.1  # "ten times fewer parameters", as in the source
_LEAST_RANK = 4  # of inputs and outputs, without a budget of the caller's: with less, a small layer learns nothing


def check_ranks(r: Any, name: str) -> int | Ranks:
    """`r` as an int, or as a tuple with a rank or None for each mode. Otherwise raise ValueError, naming `name`."""
    ranks = (r,) * 3 if type(r) is int else tuple(r) if isinstance(r, list | tuple) else ()
    if len(ranks) not in (3, 4) or any(r is not None and (type(r) is not int or r <= 0) for r in ranks):
        raise ValueError(
            f"`{name}` should be a positive integer value, or a list of three (input, output, basis) with None for a "
            f"whole mode, or of four with groups and kernel positions, but the value passed is {r!r}"
        )
    return r if type(r) is int else ranks


def by_mode(r: int | Sequence[int | None]) -> Ranks:
    """(r1, r2, r3) or (r1, r2, r3, r4), from one rank for the first three modes or from a rank for each mode."""
    ranks = (r, r, r) if isinstance(r, int) else tuple(r)
    return ranks[:3] if len(ranks) == 4 and ranks[3] is None else ranks


def mode_sizes(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(n, m, n_d, K) of a tensor of shape (n, m, n_d, ...)."""
    n, m, n_d, *positions = shape
    return n, m, n_d, math.prod(positions)


def clipped(ranks: Ranks, shape: Sequence[int]) -> Ranks:
    """The ranks, with None in place of every rank that is at least the size of its mode."""
    sizes = mode_sizes(shape)
    return by_mode([None if r is None or r >= size else r for r, size in zip(ranks, sizes, strict=False)])


def choose_ranks(
    shapes: Mapping[str, tuple[int, ...]],
    fixed: Mapping[str, int | Ranks],
    r: int | Ranks | None,
    compression_ratio: float | None,
    freeze_factors: bool = False,
    terms: int = 0,
) -> dict[str, Ranks]:
    """The ranks by name of tensors of some shapes: as in `fixed`, or else from `r`, or else from `compression_ratio`.

    That is a budget for all of them, of cores alone if `freeze_factors`, with `terms` P of a family. With None it is a
    tenth, and a tensor whose rank of inputs or outputs would be below 4 gets (4, 4, whole), or is whole if that has
    fewer numbers.
    """
    chosen = {name: clipped(by_mode(ranks), shapes[name]) for name, ranks in fixed.items()}
    for name, given in fixed.items():
        sizes = mode_sizes(shapes[name])
        if any(rank is not None and rank > size for rank, size in zip(by_mode(given), sizes, strict=False)):
            raise ValueError(
                f"`rank_pattern` gives {name} the ranks {by_mode(given)}, above its modes (input, output, basis, "
                f"positions) = {sizes}; give ranks up to the modes"
            )
    free = {name: shape for name, shape in shapes.items() if name not in chosen}
    if r is not None:
        return chosen | _clipped(free, r)
    if compression_ratio is None and not free:
        return chosen
    count = partial(core_count if freeze_factors else parameter_count, terms=terms)
    ranks_at = partial(equal_ranks, count=count)
    total = sum(map(math.prod, shapes.values()))
    spent = sum(count(shapes[name], ranks) for name, ranks in chosen.items())
    least = spent + sum(count(shape, ranks_at(shape, 1)) for shape in free.values())
    if compression_ratio is None:
        budget = max(int(DEFAULT_COMPRESSION_RATIO * total + 1e-6), least)
    elif least > (budget := int(compression_ratio * total + 1e-6)):  # 0.29 · 100 is a little less than 29
        needed = "the ranks of `rank_pattern`, and rank 1 elsewhere, need" if fixed else "rank 1 needs"
        enough = math.ceil(1000 * least / total) / 1000
        instead = "use lower ranks in `rank_pattern`" if enough > 1 else f"use a ratio of at least {enough}"
        raise ValueError(
            f"`compression_ratio`={compression_ratio} allows {budget} parameters for the {total} coefficients of "
            f"{len(shapes)} tensors, but {needed} {least}; {instead}"
        )
    ranks = dict(zip(free, ranks_for_budget(list(free.values()), budget - spent, ranks_at, count), strict=True))
    return chosen | (
        {name: _raised(r, shapes[name]) for name, r in ranks.items()} if compression_ratio is None else ranks
    )


def _clipped(shapes: Mapping[str, tuple[int, ...]], r: int | Ranks) -> dict[str, Ranks]:
    ranks = by_mode(r)
    largest = tuple(map(max, zip(*map(mode_sizes, shapes.values()), strict=True)))[: len(ranks)]
    above = [rank is not None and rank > size for rank, size in zip(ranks, largest, strict=False)]
    # A single number may be clipped in some modes. A triple is meant for each of its modes.
    if above and (all(above) if isinstance(r, int) else any(above)):
        raise ValueError(
            f"`r`={r!r} is above the modes (input, output, basis) of every layer; the largest are {largest}"
        )
    return {name: clipped(ranks, shape) for name, shape in shapes.items()}


def _raised(ranks: Ranks, shape: Sequence[int]) -> Ranks:
    if not any(rank is not None and rank < _LEAST_RANK for rank in ranks[:2]):
        return ranks
    raised = clipped((_LEAST_RANK, _LEAST_RANK, None), shape)
    return raised if parameter_count(shape, raised) < math.prod(shape) else (None, None, None)


def equal_ranks(shape: Sequence[int], r: int, count: Callable[[Sequence[int], Ranks], int] = parameter_count) -> Ranks:
    """Rank r in the modes i, o and d, clipped to them. For r = 1, a mode is whole if that makes `count` less."""
    if r > 1:
        return clipped((r, r, r), shape)
    choices = product(*[(1, None) if size > 1 else (None,) for size in shape[:3]])
    return min(choices, key=lambda ranks: count(shape, ranks))


def ranks_for_budget(
    shapes: Sequence[Sequence[int]],
    budget: int,
    ranks_at: Callable[[Sequence[int], int], Ranks] = equal_ranks,
    count: Callable[[Sequence[int], Ranks], int] = parameter_count,
) -> list[Ranks]:
    """The largest r, the same for all modes and tensors, that fits; then the lowest r is raised in turn while it fits.

    Ranks in proportion to the modes would leave short modes (the basis, few inputs) with rank 1, where one more costs
    little. Which rule is best depends on the optimizer and the task: by Levenberg–Marquardt the whole basis is often
    better than equal ranks, by Adam worse. `ranks_at` gives the ranks of a shape for r, `count` their numbers.

    Raises:
        ValueError: if rank 1 everywhere already exceeds the budget.
    """
    alike = Counter(map(tuple, shapes))

    @cache
    def cost(shape: tuple[int, ...], r: int) -> int:
        return count(shape, ranks_at(shape, r))

    def total(r: int) -> int:
        return sum(number * cost(shape, r) for shape, number in alike.items())

    if total(1) > budget:
        raise ValueError(f"rank 1 everywhere needs {total(1)} parameters, the budget is {budget}")
    # A mode that becomes whole may make the next rank cheaper than this one.
    longest = [max(shape[:3]) for shape in shapes]
    r = max((r for r in range(1, max(longest, default=1) + 1) if total(r) <= budget), default=1)
    chosen, left, raised = [r] * len(longest), budget - total(r), list(range(len(longest)))
    while raised:
        growth = {k: cost(shape, r + 1) - cost(shape, r) for k in raised for shape in [tuple(shapes[k])]}
        candidates, raised = sorted((k for k in raised if r < longest[k]), key=growth.__getitem__), []
        for k in candidates:
            if growth[k] <= left:
                chosen[k], left = r + 1, left - growth[k]
                raised.append(k)
        r += 1
    return [ranks_at(shape, r) for shape, r in zip(shapes, chosen, strict=True)]


def suggest_ranks(
    updates: Mapping[str, torch.Tensor | Spectrum], *, energy: float | None = None, budget: int | None = None
) -> dict[str, Ranks]:
    """min over ranks of Σ ‖Δ − Δ_r‖² within a budget; or the fewest parameters that keep a share of every ‖Δ‖².

    ‖Δ − Δ_r‖ is the error of the truncated HOSVD, which is known exactly for all ranks. Within a budget, the ranks
    minimise error² + λ · parameters, with one λ for all tensors. The rest of the budget is spent where it helps most.
    The error is never above that of the ranks that `compression_ratio` gives for the same budget. A tensor that is
    zero gets the ranks with the fewest parameters.

    Args:
        updates: maps a full parameter name to an update A_ft − A_pt in the order (n, m, n_d, ...), or to its Spectrum,
            as from `update_spectrum`. Without a fine-tuned model, take the gradient ∂L/∂A in place of the update.
        energy: the share of ‖Δ‖² to keep of every tensor, with the fewest parameters. The default is 0.99.
        budget: in place of `energy`, the number of parameters that all adapters together may have.

    Returns:
        Ranks by full parameter name, for `LoTRAConfig(rank_pattern=...)`; None for a whole mode.

    Raises:
        ValueError, TypeError: naming the argument, if it is not as described or the budget is too small.
    """
    if not isinstance(updates, Mapping) or not updates:
        raise TypeError(f"`updates` should map parameter names to updates, at least one, got {updates!r}")
    if energy is not None and budget is not None:
        raise ValueError(f"give `energy` or `budget`, not both: got energy={energy!r}, budget={budget!r}")
    energy = 0.99 if energy is None else energy
    if not is_number(energy) or not 0 < energy <= 1:
        raise ValueError(f"`energy` should be a number in (0, 1] but the value passed is {energy!r}")
    if budget is not None and (not isinstance(budget, Integral) or isinstance(budget, bool)):
        raise TypeError(f"`budget` should be an integer, a number of parameters, but the value passed is {budget!r}")
    spectra = {
        name: update if isinstance(update, Spectrum) else Spectrum.of(update, f"`updates[{name!r}]`")
        for name, update in updates.items()
    }
    shapes = [spectrum.shape for spectrum in spectra.values()]
    least = sum(parameter_count(shape, equal_ranks(shape, 1)) for shape in shapes)
    if budget is not None and least > budget:
        raise ValueError(f"`budget`={budget} is too small: rank 1 everywhere needs {least} parameters")
    fronts = list(map(_Front.of, spectra.values()))
    chosen = _within(fronts, shapes, budget) if budget is not None else [front.reaching(energy) for front in fronts]
    ranks = [tuple(front.ranks[k].tolist()) for front, k in zip(fronts, chosen, strict=True)]
    return {name: clipped(r, shape) for name, r, shape in zip(spectra, ranks, shapes, strict=True)}


class _Front(NamedTuple):
    """The ranks of one tensor that no other ranks beat in both cost and error, in the order of cost.

    A rank of the size of its mode stands for the whole mode, which costs nothing but the larger core.
    """

    ranks: torch.Tensor  # shape: (choices, 3)
    cost: torch.Tensor  # parameters; shape: (choices,)
    error: torch.Tensor  # ‖A − A_r‖²; shape: (choices,)
    energy: float  # ‖A‖²

    @classmethod
    def of(cls, spectrum: Spectrum) -> _Front:
        kept = spectrum.core_energy.cumsum(0).cumsum(1).cumsum(2)
        *sizes, K = mode_sizes(spectrum.shape)
        ranks = [torch.arange(1, length + 1) for length in kept.shape]
        for mode, size in enumerate(sizes):
            if kept.shape[mode] < size:  # in a long mode, a rank above the product of the others keeps nothing more
                ranks[mode] = torch.cat([ranks[mode], torch.tensor([size])])
                kept = torch.cat([kept, kept.narrow(mode, -1, 1)], dim=mode)
        choices = torch.cartesian_prod(*ranks)
        factors = torch.where(choices < torch.tensor(sizes), choices * torch.tensor(sizes), 0)
        cost, energy = choices.prod(1) * K + factors.sum(1), kept[-1, -1, -1]
        error = (energy - kept).clamp(min=0).flatten()
        order = error.argsort(stable=True)
        order = order[cost[order].argsort(stable=True)]
        error = error[order]
        better = torch.cat([torch.tensor([True]), error[1:] < error.cummin(0).values[:-1]])
        return cls(choices[order][better], cost[order][better], error[better], float(energy))

    def reaching(self, energy: float) -> int:
        """The cheapest choice that keeps this share of the energy, up to rounding."""
        return int((self.error <= (1 - energy + 1e-14) * self.energy).nonzero()[0, 0])

    def affordable(self, budget: int) -> int:
        """The most accurate choice that costs at most `budget`."""
        return int(torch.searchsorted(self.cost, budget, right=True)) - 1


def _within(fronts: Sequence[_Front], shapes: Sequence[tuple[int, ...]], budget: int) -> list[int]:
    """The index of a choice for every tensor, with Σ cost ≤ budget and a small Σ error."""

    def at(rate: float) -> list[int]:
        return [int((front.error + rate * front.cost).argmin()) for front in fronts]

    def total(of: str, chosen: Sequence[int]) -> float:
        return sum(getattr(front, of)[k].item() for front, k in zip(fronts, chosen, strict=True))

    def filled(chosen: list[int]) -> list[int]:
        while True:
            left = budget - int(total("cost", chosen))
            better = [front.affordable(int(front.cost[k]) + left) for front, k in zip(fronts, chosen, strict=True)]
            gains = [front.error[k] - front.error[b] for front, k, b in zip(fronts, chosen, better, strict=True)]
            best = max(range(len(fronts)), key=gains.__getitem__)
            if not gains[best] > 0:
                return chosen
            chosen[best] = better[best]

    high = sum(front.energy for front in fronts)  # at this rate, the fewest parameters are best everywhere: they fit
    low = 1e-20 * high
    for _ in range(60):
        rate = math.sqrt(low * high)
        low, high = (low, rate) if total("cost", at(rate)) <= budget else (rate, high)
    uniform = ranks_for_budget(shapes, budget)
    costs = [parameter_count(shape, ranks) for shape, ranks in zip(shapes, uniform, strict=True)]
    starts = at(high), [front.affordable(c) for front, c in zip(fronts, costs, strict=True)]
    return min(map(filled, starts), key=lambda chosen: total("error", chosen))
