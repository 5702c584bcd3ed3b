"""Which way round an update's part of a contraction is computed: counted from the sizes alone.

The count is of a training step, so that training and inference go the same way and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

DENSE = "dense"
ORDERS = ("", "d", "i", "di", "id")  # modes whose factors are contracted with x, in turn, before the operation
_TRAFFIC = 16  # multiply-adds in the time that it takes to move one number from or to memory, about

Triple = tuple[int, int, int]


def cheapest_order(
    x: int, positions: int, terms: int, modes: Triple, kernel: int, on_x: str, ranks: tuple[Triple, ...]
) -> str:
    """One of `ORDERS`, or `DENSE`.

    Args:
        x: entries of the other operand.
        positions: entries of the output for each entry of its output axis.
        terms: products summed in one entry of the output.
        modes: (n, m, n_d) of the weight.
        kernel: entries of the weight for each (i, o, d).
        on_x: those of the modes i and d that x has too and that are summed.
        ranks: (r1, r2, r3) of each update.
    """
    # torch.compile traces through a cache with a warning; symbolic sizes cannot be keys.
    symbolic = torch.compiler.is_compiling() or not (isinstance(x, int) and isinstance(positions, int))
    count = _cheapest if symbolic else _cached_cheapest
    return count(x, positions, terms, modes, kernel, on_x, ranks)


def _cheapest(
    x: int, positions: int, terms: int, modes: Triple, kernel: int, on_x: str, ranks: tuple[Triple, ...]
) -> str:
    n, m, n_d = modes
    costs = {}
    for order in ORDERS:
        if not all(mode in on_x for mode in order):
            continue
        cost = 0
        for k, (r1, r2, r3) in enumerate(ranks):
            size, summed = x, terms
            for mode in order:
                full, rank = (n, r1) if mode == "i" else (n_d, r3)
                cost += size * rank + _TRAFFIC * (size + size // full * rank)
                size, summed = size // full * rank, summed // full * rank
            cost += positions * r2 * (summed + m) + kernel * thin_products(modes, (r1, r2, r3), ("o", *order))
            if order or k == 0:  # without factors on x, all updates share one operation
                cost += _TRAFFIC * (size + 2 * positions * m)
        costs[order] = 3 * cost  # the two gradients cost as much again, each
    # The dense form adds the gradient of A to what the frozen layer computes, besides forming A + Δ and its gradient.
    entries = n * m * n_d * kernel
    build = sum(kernel * thin_products(modes, r, "") + 2 * _TRAFFIC * entries for r in ranks)
    costs[DENSE] = 3 * build + positions * terms * m + _TRAFFIC * (x + positions * m + 2 * entries)
    best = DENSE
    for order, cost in costs.items():  # torch.compile cannot trace `min` with a key over symbolic sizes
        if cost < costs[best]:
            best = order
    return best


_cached_cheapest = lru_cache(maxsize=4096)(_cheapest)


def thin_products(modes: Triple, ranks: Triple, kept: Sequence[str]) -> int:
    """Products in G times the factors of all modes but `kept`, the smaller intermediate first, for a kernel entry."""
    (n, m, n_d), (r1, r2, r3) = modes, ranks
    if "i" in kept:
        cost = 0 if "d" in kept else r1 * r2 * r3 * n_d
    else:
        cost = r1 * r2 * r3 * n if "d" in kept else r2 * min(n * r3 * (r1 + n_d), r1 * n_d * (r3 + n))
    return cost if "o" in kept else cost + n * n_d * r2 * m
