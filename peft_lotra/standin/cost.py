"""Chooses the order in which an update's part of a contraction is computed, from the sizes alone.

The cost is that of a training step, so that training and inference use the same order and give the same bits. It
counts multiply-adds, numbers moved from and to memory, and calls of torch, which cost most in small layers.

It is not known beforehand whether a loss takes derivatives by the input. They make every product that depends on the
input about four times as expensive (`_DERIVATIVES`). The cost of A + Δ, which is formed once, stays the same. The
chosen order is never far from the best: its largest ratio to the cheapest, over both kinds of losses, is least.
"""

from __future__ import annotations

from collections.abc import Iterable

DENSE = "dense"
ORDERS = ("", "d", "i", "di", "id")  # modes whose factors are contracted with x, in turn, before the operation

Triple = tuple[int, int, int]

# Multiply-adds in the time of moving one number from or to memory: from 2 in a cache to 34 outside of it, on the CPUs
# where `examples/benchmarks/small_layers.py --parts constants` ran.
_TRAFFIC = 16
# Multiply-adds in the time of one call of torch, by kind of device. A call is counted as a third of forward and
# backward together. The same command printed 160,000 for one thread and 290,000 for two, at 50 G multiply-adds per
# second and thread. The value is above both, because faster processors multiply faster but do not call faster. "meta"
# counts as the CPU. The value for other devices is an estimate: 5 µs at 20 T multiply-adds per second.
_CALL = {"cpu": 350_000, "meta": 350_000}
_CALL_ELSEWHERE = 100_000_000
_DERIVATIVES = 4
_POSITIONS = 256  # assumed if the batch size is open, while a graph is compiled


def cheapest_order(
    positions: int | None, depth: int, terms: int, modes: Triple, kernel: int, on_x: str, ranks: tuple[Triple, ...],
    whole: tuple[str, ...], device: str, per_sample: bool = False,
) -> str:  # fmt: skip
    """One of `ORDERS`, or `DENSE`.

    Args:
        positions: entries of the output for each entry of its output axis; None if their number is open.
        depth: entries of the other operand x for each position.
        terms: products summed in one entry of the output.
        modes: (n, m, n_d) of the weight.
        kernel: entries of the weight for each (i, o, d).
        on_x: the modes among i and d that are summed with x, as a string.
        ranks: (r1, r2, r3) of each update. If an update has P terms, r2 counts P times.
        whole: the modes of each update that have no factor.
        device: the kind of device, such as "cpu".
        per_sample: whether each sample has gradients of its own, in one batched call. A + Δ would then have a gradient
            of A's size for each sample, so it is not formed.
    """
    positions = _POSITIONS if positions is None else positions
    n, m, n_d = modes
    call = 0 if per_sample else _CALL.get(device, _CALL_ELSEWHERE)
    x = positions * depth
    costs = {}  # (cost that depends on x, cost that does not)
    for order in ORDERS:
        if not set(order) <= set(on_x):
            continue
        of_x = 0
        for k, (r1, r2, r3) in enumerate(ranks):
            size, summed = x, terms
            for mode in order:
                if mode in whole[k]:
                    continue
                full, rank = (n, r1) if mode == "i" else (n_d, r3)
                of_x += size * rank + _TRAFFIC * (size + size // full * rank) + 4 * call
                size, summed = size // full * rank, summed // full * rank
            of_x += positions * r2 * (summed + (0 if "o" in whole[k] else m))
            if order or k == 0:  # without factors on x, all updates share one operation
                of_x += _TRAFFIC * (size + 2 * positions * m) + 4 * call
        of_factors = 0
        for r, without in zip(ranks, whole, strict=True):
            calls = 7 - 2 * len(set(order + without) - {"o"})
            of_factors += kernel * products(modes, r, "o" + order + without) + calls * call
        costs[order] = 3 * of_x, 3 * of_factors  # each of the two gradients costs as much again
    if per_sample:
        return min(costs, key=lambda order: sum(costs[order]))
    # The dense form adds to the frozen layer the gradient of A, the sum A + Δ, and the gradients of the factors.
    entries = n * m * n_d * kernel
    build = 0
    for r, without in zip(ranks, whole, strict=True):
        build += kernel * products(modes, r, without) + 2 * _TRAFFIC * entries + (9 - 2 * len(without)) * call
    gradient = positions * terms * m + _TRAFFIC * (x + positions * m + 2 * entries) + call
    costs[DENSE] = gradient, 3 * build
    first, second = ([factor * a + b for a, b in costs.values()] for factor in (1, _DERIVATIVES))
    regrets = [max(a / min(first), b / min(second)) for a, b in zip(first, second, strict=True)]
    return list(costs)[regrets.index(min(regrets))]


def products(modes: Triple, ranks: Triple, kept: Iterable[str]) -> int:
    """Multiply-adds of G times the factors of all modes but `kept`: of i and d in the cheaper order, then of o."""
    (n, m, n_d), (r1, r2, r3), kept = modes, ranks, set(kept)
    if "i" in kept:
        cost = 0 if "d" in kept else r1 * r2 * r3 * n_d
    else:
        cost = r1 * r2 * r3 * n if "d" in kept else r2 * min(n * r3 * (r1 + n_d), r1 * n_d * (r3 + n))
    return cost if "o" in kept else cost + n * n_d * r2 * m
