"""y = contract(x, A) + expand(contract(x, B), U2): one contraction with a coefficient tensor and its Tucker updates.

B = s · G ×₁ U1 ×₃ U3 is A's size with r2 in place of the m outputs. Where it is cheaper, x is contracted with U1 or U3
first, and the operation itself runs with a smaller B; or, with ranks near the modes, the dense A + Δ is formed. Which
one is decided by counting products and traffic from the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .axes import Axes
from .contractions import Contraction
from .updates import Update, mode_product

DENSE = "dense"
ORDERS = ("", "d", "i", "di", "id")  # modes whose factors are contracted with x, in turn, before the operation
_TRAFFIC = 16  # multiply-adds in the time that it takes to move one number from or to memory, about


def contract(
    c: Contraction,
    axes: Axes,
    updates: Sequence[Update],
    dtype: torch.dtype,
    base: Callable[[], torch.Tensor] | None,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor | None:
    """The operation with A + Σ updates; None if it has no factorised form.

    Args:
        c: the operation.
        axes: the weight's.
        updates: the weight's.
        dtype: the weight's.
        base: the operation with A, offset included; None if A is zero.
        dense: the operation with the dense A + Σ updates.
    """
    output = axes.place("o")
    if output is None or output.axis not in c.carried:
        return None
    if axes.axes[output.axis].is_padded and output.before * output.after > 1:
        return None
    updates = [update.rows(axes) for update in updates]
    order = cheapest_order(c, axes, updates)
    if order == DENSE:
        return dense()
    y = None if base is None else base()
    # Without factors on x, all updates share one operation: their B lie side by side on the axis of r2.
    for group in [updates] if order == "" else [[update] for update in updates]:
        term = _thin_term(c, axes, group, dtype, order)
        y = term if y is None else y + term.to(y.dtype)
    return y + c.offset if base is None and c.offset is not None else y


def _thin_term(c: Contraction, axes: Axes, updates: Sequence[Update], dtype: torch.dtype, order: str) -> torch.Tensor:
    updates = [update.in_fp32 for update in updates]
    kept = ("o", *order)
    B = _joined([update.thin(kept) for update in updates])
    U2 = _joined([update.factors.U2 for update in updates])
    x, ranks = c.x, {}
    for mode in order:
        axis, before, _, after = axes.place(mode, ranks)
        factor = updates[0].factors.U1 if mode == "i" else updates[0].factors.U3
        x = mode_product(x, factor.T.to(x.dtype), c.summed[axis], before, after)
        ranks[mode] = factor.shape[1]
    ranks["o"] = U2.shape[1]
    y = c.apply(x, axes.arrange(B, ranks).to(dtype))
    axis, before, _, after = axes.place("o")
    stored = axes.axes[axis]
    if stored.is_padded:
        U2 = F.pad(U2, (0, 0, stored.before, stored.after))
    return mode_product(y, U2.to(y.dtype), c.carried[axis], before, after)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def cheapest_order(c: Contraction, axes: Axes, updates: Sequence[Update]) -> str:
    """One of `ORDERS`, or `DENSE`: which makes a training step cheapest, by counting.

    It depends on sizes alone, so that training and inference give the same bits.
    """
    costs = {order: _thin_cost(c, axes, updates, order) for order in _possible(c, axes)}
    costs[DENSE] = _dense_cost(c, axes, updates)
    return min(costs, key=costs.__getitem__)


def _possible(c: Contraction, axes: Axes) -> list[str]:
    def on_x(mode: str) -> bool:
        place = axes.place(mode)
        return place is not None and place.axis in c.summed and not axes.axes[place.axis].is_padded

    return [order for order in ORDERS if all(on_x(mode) for mode in order)]


def _thin_cost(c: Contraction, axes: Axes, updates: Sequence[Update], order: str) -> int:
    """Products, and `_TRAFFIC` for each number moved, of the updates' part of y, and twice that for its gradients."""
    cost = 0
    m = axes.place("o").size
    for update in updates:
        x, terms = c.x.numel(), c.terms
        for mode in order:
            size, rank = axes.place(mode).size, update.ranks[mode]
            cost += x * rank + _TRAFFIC * (x + x // size * rank)
            x, terms = x // size * rank, terms // size * rank
        r2 = update.ranks["o"]
        cost += c.positions * r2 * (terms + m) + update.cost_of_thin(("o", *order))
        if order or update is updates[0]:
            cost += _TRAFFIC * (x + c.positions * 2 * m)
    return 3 * cost


def _dense_cost(c: Contraction, axes: Axes, updates: Sequence[Update]) -> int:
    """The same for forming A + Δ; the gradient of x is the base layer's, that of A is not."""
    size = math.prod([axis.size for axis in axes.axes])
    build = sum(update.cost_of_thin(()) + 2 * _TRAFFIC * size for update in updates)
    return 3 * build + c.positions * c.terms * axes.place("o").size + 2 * _TRAFFIC * size
