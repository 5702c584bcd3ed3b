"""Chooses the order in which an update's part of a contraction is computed, from the sizes alone.

The cost is that of a training step, so that training and inference use the same order and give the same bits. It
counts multiply-adds, numbers moved from and to memory, and calls of torch, which cost most in small layers.

It is not known beforehand whether a loss takes derivatives by the input. They make every product that depends on the
input about four times as expensive (`_DERIVATIVES`). The cost of A + Δ, which is formed once, stays the same. The
chosen order is never far from the best: its largest ratio to the cheapest, over both kinds of losses, is least.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

DENSE = "dense"
ORDERS = ("", "d", "i", "di", "id")  # modes whose factors are contracted with x, in turn, before the operation

Triple = tuple[int, ...]  # a number for each of i, o and d

# Multiply-adds in the time of moving one number from or to memory: from 2 in a cache to 34 outside of it, on the CPUs
# where `examples/benchmarks/small_layers.py --parts constants` ran.
_TRAFFIC = 16
# Multiply-adds in the time of one call of torch, by kind of device. A call is counted as a third of forward and
# backward together. The same command printed 160,000 for one thread and 290,000 for two, at 50 G multiply-adds per
# second and thread. The value is above both, because faster processors multiply faster but do not call faster. "meta"
# counts as the CPU, other devices as CUDA, for which this is an estimate: 5 µs at 20 T multiply-adds per second. It is
# a table and no probe, so that all processes, and runs that go on, round alike.
_CALL = {"cpu": 350_000, "meta": 350_000, "cuda": 100_000_000}
_DERIVATIVES = 4
_POSITIONS = 256  # assumed if the batch size is open, while a graph is compiled


class Work(NamedTuple):
    """The sizes of an operation with a weight."""

    positions: int | None  # entries of the output for each entry of its output axis; None if their number is open
    depth: int  # entries of the other operand x for each position
    terms: int  # products summed in one entry of the output
    modes: Triple  # (n, m, n_d) of the weight
    kernel: int  # entries of the weight for each (i, o, d)
    on_x: str  # the modes among i and d that are summed with x
    device: str  # its kind, such as "cpu"
    # Whether each sample has gradients of its own, in one batched call. A + Δ would then have a gradient of A's size
    # for each sample, so it is not formed.
    per_sample: bool = False

    @property
    def call(self) -> int:
        return 0 if self.per_sample else _CALL.get(self.device, _CALL["cuda"])


class Core(NamedTuple):
    """The sizes of an update in a view."""

    ranks: Triple  # (r1, r2, r3); of a whole mode its size in the view. If the update has P terms, r2 counts P times.
    whole: str  # the modes without a factor


def cheapest_order(work: Work, cores: tuple[Core, ...]) -> str:
    """One of `ORDERS`, or `DENSE`, for the updates of these cores."""
    work = work._replace(positions=_POSITIONS if work.positions is None else work.positions)
    # (what depends on x, what does not)
    costs = {order: _thin_cost(work, cores, order) for order in ORDERS if set(order) <= set(work.on_x)}
    if work.per_sample:
        return min(costs, key=lambda order: sum(costs[order]))
    costs[DENSE] = _dense_cost(work, cores)
    first, second = ([factor * a + b for a, b in costs.values()] for factor in (1, _DERIVATIVES))
    regrets = [max(a / min(first), b / min(second)) for a, b in zip(first, second, strict=True)]
    return list(costs)[regrets.index(min(regrets))]


def _thin_cost(work: Work, cores: tuple[Core, ...], order: str) -> tuple[int, int]:
    (n, m, n_d), positions, call = work.modes, work.positions or 0, work.call
    of_x = of_factors = 0
    for k, ((r1, r2, r3), whole) in enumerate(cores):
        size, summed = positions * work.depth, work.terms
        for mode in order:
            if mode in whole:
                continue
            full, rank = (n, r1) if mode == "i" else (n_d, r3)
            of_x += size * rank + _TRAFFIC * (size + size // full * rank) + 4 * call
            size, summed = size // full * rank, summed // full * rank
        of_x += positions * r2 * (summed + (0 if "o" in whole else m))
        if order or k == 0:  # without factors on x, all updates share one operation
            of_x += _TRAFFIC * (size + 2 * positions * m) + 4 * call
        calls = 7 - 2 * len(set(order + whole) - {"o"})
        of_factors += work.kernel * products(work.modes, (r1, r2, r3), "o" + order + whole) + calls * call
    return 3 * of_x, 3 * of_factors  # each of the two gradients costs as much again


def _dense_cost(work: Work, cores: tuple[Core, ...]) -> tuple[int, int]:
    """Besides the frozen layer: the gradient of A, the sum A + Δ, and the gradients of the factors."""
    (n, m, n_d), positions, call = work.modes, work.positions or 0, work.call
    entries = n * m * n_d * work.kernel
    build = 0
    for ranks, whole in cores:
        build += (
            work.kernel * products(work.modes, ranks, whole) + 2 * _TRAFFIC * entries + (9 - 2 * len(whole)) * call
        )
    moved = positions * work.depth + positions * m + 2 * entries
    return positions * work.terms * m + _TRAFFIC * moved + call, 3 * build


def products(modes: Triple, ranks: Triple, kept: Iterable[str]) -> int:
    """Multiply-adds of G times the factors of all modes but `kept`: of i and d in the cheaper order, then of o."""
    (n, m, n_d), (r1, r2, r3), kept = modes, ranks, set(kept)
    if "i" in kept:
        cost = 0 if "d" in kept else r1 * r2 * r3 * n_d
    else:
        cost = r1 * r2 * r3 * n if "d" in kept else r2 * min(n * r3 * (r1 + n_d), r1 * n_d * (r3 + n))
    return cost if "o" in kept else cost + n * n_d * r2 * m
