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
from .costs import DENSE, cheapest_order
from .updates import SampleAxisUnknown, Update, mode_product


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

    Raises:
        SampleAxisUnknown: if updates are of some samples only, and which rows are theirs cannot be told.
    """
    output = axes.place("o")
    if output is None or output.axis not in c.carried:
        return None
    if axes.axes[output.axis].is_padded and output.before * output.after > 1:
        return None
    updates = [update.rows(axes) for update in updates]
    by_sample = any(update.samples is not None for update in updates)
    if by_sample and (_sample_axis(c, updates) is None or not _is_matrix_product(c, axes)):
        raise SampleAxisUnknown
    order = "" if by_sample else _order(c, axes, updates)
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
    weight = axes.arrange(B, ranks).to(dtype)
    axis, before, _, after = axes.place("o")
    stored = axes.axes[axis]
    if stored.is_padded:
        U2 = F.pad(U2, (0, 0, stored.before, stored.after))
    if _is_matrix_product(c, axes):
        # As one matrix product whose thin side is the rows of B, which is the fast way round for gradients too.
        order_of_x = [axis, *sorted(c.summed, key=c.summed.__getitem__)]
        y = mode_product(x.flatten(-len(c.summed)), weight.permute(order_of_x).flatten(1), -1)
        if updates[0].samples is not None:
            seen = torch.cat([u.samples[:, None].expand(-1, u.factors.U2.shape[1]) for u in updates], dim=1)
            y = torch.where(seen.unflatten(0, _sample_axis(c, updates)), y, 0)
        return mode_product(y, U2.to(y.dtype), -1).movedim(-1, c.carried[axis])
    y = c.apply(x, weight)
    return mode_product(y, U2.to(y.dtype), c.carried[axis], before, after)


def _is_matrix_product(c: Contraction, axes: Axes) -> bool:
    """Whether y = x @ weight.T with the summed axes, the last ones of x, flattened."""
    axis, before, _, after = axes.place("o")
    trailing = list(range(c.x.dim() - len(c.summed), c.x.dim()))
    return c.is_linear and bool(trailing) and sorted(c.summed.values()) == trailing and before * after == 1


def _sample_axis(c: Contraction, updates: Sequence[Update]) -> tuple[int, ...] | None:
    """The shape of one number for each sample that broadcasts to x without its summed axes; None if it is not clear.

    Samples lie along the only axis of their number. Where another one's size is a multiple of it, they may be there.
    """
    samples = len(updates[0].samples)
    sizes = c.x.shape[: c.x.dim() - len(c.summed)]
    axes = [k for k, size in enumerate(sizes) if size % samples == 0]
    if len(axes) != 1 or sizes[axes[0]] != samples:
        return None
    return tuple(samples if k == axes[0] else 1 for k in range(len(sizes)))


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def _order(c: Contraction, axes: Axes, updates: Sequence[Update]) -> str:
    on_x = ""
    for mode in ("i", "d"):
        place = axes.place(mode)
        if place is not None and place.axis in c.summed and not axes.axes[place.axis].is_padded:
            on_x += mode
    core, U1, U2, U3 = updates[0].factors
    modes = U1.shape[0], U2.shape[0], U3.shape[0]
    ranks = tuple([tuple(update.factors.core.shape[:3]) for update in updates])
    return cheapest_order(c.x.numel(), c.positions, c.terms, modes, math.prod(core.shape[3:]), on_x, ranks)
