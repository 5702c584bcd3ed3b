"""Which way round an update's part of a contraction is computed: counted from the sizes alone.

The count is of a training step, so that training and inference go the same way and give the same bits. It has the
products, the numbers that move from and to memory, and the calls themselves: on small layers these cost most.

Whether a loss takes derivatives by the input is not known beforehand. It makes what depends on the input some four
times as expensive (`_DERIVATIVES`), and leaves A + Δ, which is formed once, as it was. The order is taken that is
never far from the best: the one whose largest ratio to the cheapest, over both kinds of losses, is least.
"""

from __future__ import annotations

from collections.abc import Iterable

DENSE = "dense"
ORDERS = ("", "d", "i", "di", "id")  # modes whose factors are contracted with x, in turn, before the operation

Triple = tuple[int, int, int]

# Multiply-adds in the time that it takes to move one number from or to memory: from 2 in a cache to 34 outside, on the
# CPUs where `examples/benchmarks/small_layers.py --parts constants` ran.
_TRAFFIC = 16
# Multiply-adds in the time of one call of torch, a third of what it takes forward and backward, by kind of device. The
# same command printed 160,000 for one thread and 290,000 for two, of 50 G multiply-adds in a second each. The value is
# above both: faster processors multiply faster, and call no faster. "meta" counts for the CPU. Elsewhere this is an
# estimate, of 5 µs at 20 T multiply-adds in a second.
_CALL = {"cpu": 350_000, "meta": 350_000}
_CALL_ELSEWHERE = 100_000_000
_DERIVATIVES = 4
_POSITIONS = 256  # taken where the batch is open, while a graph is compiled


def cheapest_order(
    positions: int | None, depth: int, terms: int, modes: Triple, kernel: int, on_x: str, ranks: tuple[Triple, ...],
    whole: tuple[str, ...], device: str, per_sample: bool = False,
) -> str:  # fmt: skip
    """One of `ORDERS`, or `DENSE`.

    Args:
        positions: entries of the output for each entry of its output axis; None if that is open.
        depth: entries of the other operand x for each position.
        terms: products summed in one entry of the output.
        modes: (n, m, n_d) of the weight.
        kernel: entries of the weight for each (i, o, d).
        on_x: those of the modes i and d that x has too and that are summed.
        ranks: (r1, r2, r3) of each update; r2 counts P times where an update has P terms.
        whole: the modes of each update that have no factor.
        device: the kind of device, such as "cpu".
        per_sample: whether each sample has gradients of its own, in one batched call. Those of A + Δ would be as many
            tensors of A's size.
    """
    positions = _POSITIONS if positions is None else positions
    n, m, n_d = modes
    call = 0 if per_sample else _CALL.get(device, _CALL_ELSEWHERE)
    x = positions * depth
    costs = {}  # what depends on x, and what does not
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
        costs[order] = 3 * of_x, 3 * of_factors  # the two gradients cost as much again, each
    if per_sample:
        return min(costs, key=lambda order: sum(costs[order]))
    # The dense form adds the gradient of A to what the frozen layer computes, besides forming A + Δ and its gradient.
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
    """Multiply-adds of G times the factors of all modes but those in `kept`, the smaller intermediate first."""
    (n, m, n_d), (r1, r2, r3), kept = modes, ranks, set(kept)
    if "i" in kept:
        cost = 0 if "d" in kept else r1 * r2 * r3 * n_d
    else:
        cost = r1 * r2 * r3 * n if "d" in kept else r2 * min(n * r3 * (r1 + n_d), r1 * n_d * (r3 + n))
    return cost if "o" in kept else cost + n * n_d * r2 * m
