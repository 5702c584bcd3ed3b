"""Tucker ranks for coefficient tensors: exact, clipped, or within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import chain

from .tucker import parameter_count

Ranks = tuple[int, int, int]

DEFAULT_COMPRESSION_RATIO = 0.1  # "ten times fewer parameters", as in the source


def as_triple(r: int | Sequence[int]) -> Ranks:
    """(r1, r2, r3) from one number for all modes, or from three."""
    return (r, r, r) if isinstance(r, int) else tuple(r)


def choose_ranks(
    shapes: Mapping[str, tuple[int, ...]],
    fixed: Mapping[str, int | Ranks],
    r: int | Ranks | None,
    compression_ratio: float | None,
) -> dict[str, Ranks]:
    """The ranks of every tensor, by name: `fixed` exactly, the others by `r`, or else by `compression_ratio`.

    Args:
        shapes: canonical shapes (n, m, n_d, ...) by parameter name.
        fixed: ranks for some of them.
        r: upper bound, clipped to the modes of each tensor.
        compression_ratio: budget for all tensors together, those with fixed ranks included; a tenth by default.

    Raises:
        ValueError: if fixed ranks are above their modes, `r` above those of every tensor, or the budget too small.
    """
    chosen = {name: _exact(name, shapes[name], as_triple(ranks)) for name, ranks in fixed.items()}
    free = {name: shape for name, shape in shapes.items() if name not in chosen}
    if r is not None:
        return chosen | _clipped(free, r)
    if compression_ratio is None and not free:
        return chosen
    return chosen | _budgeted(
        shapes, chosen, DEFAULT_COMPRESSION_RATIO if compression_ratio is None else compression_ratio
    )


def _exact(name: str, shape: tuple[int, ...], ranks: Ranks) -> Ranks:
    if any(rank > size for rank, size in zip(ranks, shape[:3], strict=True)):
        raise ValueError(
            f"`rank_pattern` gives {name} the ranks {ranks}, above its modes (input, output, basis) = {shape[:3]}; "
            "give ranks up to the modes"
        )
    return ranks


def _clipped(shapes: Mapping[str, tuple[int, ...]], r: int | Ranks) -> dict[str, Ranks]:
    ranks = as_triple(r)
    largest = [max(sizes) for sizes in zip(*(shape[:3] for shape in shapes.values()), strict=True)]
    above = [rank > size for rank, size in zip(ranks, largest, strict=False)]
    # One number for all modes is meant to be clipped in some of them; a triple says what is wanted in each.
    if above and (all(above) if isinstance(r, int) else any(above)):
        raise ValueError(
            f"`r`={r!r} is above the modes (input, output, basis) of every layer; the largest are {tuple(largest)}"
        )
    return {name: tuple(map(min, ranks, shape[:3])) for name, shape in shapes.items()}


def _budgeted(
    shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, Ranks], compression_ratio: float
) -> dict[str, Ranks]:
    total = sum(map(math.prod, shapes.values()))
    budget = int(compression_ratio * total)
    least = sum(parameter_count(shape, fixed.get(name, (1, 1, 1))) for name, shape in shapes.items())
    if least > budget:
        needed = "the ranks of `rank_pattern`, and (1, 1, 1) elsewhere, need" if fixed else "rank (1, 1, 1) needs"
        raise ValueError(
            f"`compression_ratio`={compression_ratio} allows {budget} parameters for the {total} coefficients of "
            f"{len(shapes)} tensors, but {needed} {least}; "
            f"use a ratio of at least {math.ceil(1000 * least / total) / 1000}"
        )
    free = {name: shape for name, shape in shapes.items() if name not in fixed}
    spent = sum(parameter_count(shapes[name], ranks) for name, ranks in fixed.items())
    return dict(zip(free, ranks_for_budget(list(free.values()), budget - spent), strict=True))


def ranks_for_budget(shapes: Sequence[Sequence[int]], budget: int) -> list[tuple[int, int, int]]:
    """r_k = round(t · mode size) clipped to [1, mode size], with the largest t for which all tensors together fit.

    One t for all tensors, in exact arithmetic, so that the same shapes and budget give the same ranks everywhere.

    Args:
        shapes: the canonical shapes (n, m, n_d, ...) of the coefficient tensors.
        budget: most numbers that the adapters of all of them may hold together.

    Raises:
        ValueError: if rank (1, 1, 1) everywhere already exceeds the budget.
    """

    def ranks_at(t: Fraction) -> list[tuple[int, ...]]:
        return [tuple(max(1, math.floor(t * size + Fraction(1, 2))) for size in shape[:3]) for shape in shapes]

    def cost(t: Fraction) -> int:
        return sum(parameter_count(shape, ranks) for shape, ranks in zip(shapes, ranks_at(t), strict=True))

    if cost(Fraction(0)) > budget:
        raise ValueError(f"rank (1, 1, 1) everywhere needs {cost(Fraction(0))} parameters, the budget is {budget}")
    # The ranks change only where t · size crosses a half: search among those points.
    sizes = set(chain.from_iterable(shape[:3] for shape in shapes))
    steps = sorted({Fraction(2 * k - 1, 2 * size) for size in sizes for k in range(1, size + 1)} | {Fraction(0)})
    low, high = 0, len(steps)  # steps[low] fits, steps[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(steps[middle]) <= budget else (low, middle)
    return ranks_at(steps[low])
