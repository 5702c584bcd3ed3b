"""y = contract(x, A) + expand(contract(x, B), U2): one contraction with a coefficient tensor and its Tucker updates.

B = s · G ×₁ U1 ×₃ U3 is A's size with r2 in place of the m outputs. Where it is cheaper, x is contracted with U1 or U3
first, and the operation itself runs with a smaller B; or, with ranks near the modes or on small layers, the dense
A + Δ is formed. Everything about axes, sizes and order is planned once, from hashable values; applying a plan is a
short list of calls of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .axes import Arrangement, Axes, Rows, planned
from .cost import DENSE, cheapest_order
from .operations import Contraction, Form, Weight
from .update import SampleAxisUnknown, Update, flat_mode_product

Ranks = tuple[int, int, int]  # (r1, P · r2, r3)


class Group(NamedTuple):
    """Updates whose thin tensors lie side by side in one operation."""

    members: tuple[int, ...]
    on_x: tuple[tuple[int, int, int, int], ...]  # (factor, axis of x, before, after), in turn
    arrangement: Arrangement  # of B, like the weight


class Plan(NamedTuple):
    """How the updates' part of one operation is computed."""

    order: str
    rows: tuple[Rows, ...]
    groups: tuple[Group, ...]
    depth: int  # of x as a matrix, where the operation is one matrix product; else 0
    place: tuple[int, int, int]  # (axis of y, before, after) of the outputs
    padding: tuple[int, int] | None  # outputs that belong to no coefficient
    sample_shape: tuple[int, ...]  # in which weights per sample broadcast to y without its outputs


def contract(
    c: Contraction,
    weight: Weight,
    base: Callable[[], torch.Tensor],
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor | None:
    """The operation with A + Σ updates; None if it has no factorised form.

    Args:
        c: the operation.
        weight: its weight.
        base: the operation with A, offset included.
        dense: the operation with the dense A + Σ updates.

    Raises:
        SampleAxisUnknown: if updates are weighted by sample, and which rows are whose cannot be told.
    """
    updates = weight.updates
    plan = _plan_for(c, weight)
    if plan is None:
        return None
    if plan.order == DENSE:
        return dense()
    y = None if weight.is_zero else base()
    for group in plan.groups:
        term = _thin_term(plan, group, c, [updates[k] for k in group.members], weight.tensor.dtype)
        y = term if y is None else y + term.to(y.dtype)
    return y + c.offset if weight.is_zero and c.offset is not None else y


def _plan_for(c: Contraction, weight: Weight) -> Plan | None:
    core, *factors = weight.updates[0].factors
    full = [len(factor) for factor in factors]
    full += core.shape[3 : len(weight.axes.starts)]
    ranks, samples, lead = [], 0, ()
    for update in weight.updates:
        r1, r2, r3 = update.ranks
        ranks.append((r1, update.terms * r2, r3))
        if update.weights is not None:
            samples, lead = len(update.weights), tuple(c.x.shape[: c.x.dim() - len(c.form.summed)])
    # Where a graph is compiled the batch may be open, and a plan that looked at it would bind the graph to it.
    positions = None if torch.compiler.is_compiling() else c.x.numel() // c.form.depth
    device = c.x.device.type
    return _plan(c.form, weight.axes, tuple(full), c.x.dim(), positions, tuple(ranks), device, samples, lead)


@planned
def _plan(
    form: Form, axes: Axes, full: tuple[int, ...], ndim: int, positions: int | None, ranks: tuple[Ranks, ...],
    device: str, samples: int, lead: tuple[int, ...],
) -> Plan | None:  # fmt: skip
    """None if there is no factorised form.

    Args:
        form, axes: of the operation and of the weight.
        full: the sizes of the modes of the whole parameter.
        ndim: of x.
        positions: of x; None if open.
        ranks: of the updates, which share one operation.
        device: the kind of device.
        samples: their number, where updates are weighted by sample; else 0.
        lead: then the sizes of x's axes that are not summed.
    """
    carried, summed = dict(form.carried), dict(form.summed)
    output = axes.place("o")
    if output is None or output.axis not in carried:
        return None
    stored = axes.axes[output.axis]
    if stored.is_padded and output.before * output.after > 1:
        return None
    trailing = list(range(ndim - len(summed), ndim))
    is_matrix = form.is_linear and bool(trailing) and sorted(summed.values()) == trailing
    is_matrix = is_matrix and output.before * output.after == 1
    sample_shape = _sample_shape(samples, lead) if samples else ()
    if samples and not (is_matrix and sample_shape):
        raise SampleAxisUnknown
    on_x = ""
    for mode in ("i", "d"):
        place = axes.place(mode)
        if place is not None and place.axis in summed and not axes.axes[place.axis].is_padded:
            on_x += mode
    modes = axes.size("i"), axes.size("o"), axes.size("d")
    kernel = math.prod([axes.size(mode) for mode in axes.modes()[3:]])
    order = ""
    if not samples:
        order = cheapest_order(positions, form.depth, form.terms, modes, kernel, on_x, ranks, device)
    # Without factors on x, all updates share one operation.
    members = [tuple(range(len(ranks)))] if order == "" else [(k,) for k in range(len(ranks))]
    by_x = [output.axis, *sorted(summed, key=summed.__getitem__)]
    groups = []
    for group in members if order != DENSE else ():
        (r1, _, r3), steps, replaced = ranks[group[0]], [], {}
        for mode in order:
            axis, before, _, after = axes.place(mode, replaced)
            steps.append((1 if mode == "i" else 3, summed[axis], before, after))
            replaced[mode] = r1 if mode == "i" else r3
        replaced["o"] = sum([ranks[k][1] for k in group])
        laid = axes.permuted(by_x).arrangement(replaced, flat=1) if is_matrix else axes.arrangement(replaced)
        groups.append(Group(group, tuple(steps), laid))
    rows = tuple([axes.rows(mode, count) for mode, count in zip(axes.modes(), full, strict=True)])
    depth = math.prod([axes.axes[axis].size for axis in summed]) if is_matrix else 0
    place = carried[output.axis], output.before, output.after
    padding = (stored.before, stored.after) if stored.is_padded else None
    return Plan(order, rows, tuple(groups), depth, place, padding, sample_shape)


def _sample_shape(samples: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one number for each sample that broadcasts to `sizes`; none if it is not clear.

    Samples lie along the only axis of their number. Where another one's size is a multiple of it, they may be there.
    """
    axes = [k for k, size in enumerate(sizes) if size % samples == 0]
    if len(axes) != 1 or sizes[axes[0]] != samples:
        return ()
    return tuple([samples if k == axes[0] else 1 for k in range(len(sizes))])


def _thin_term(
    plan: Plan, group: Group, c: Contraction, updates: Sequence[Update], dtype: torch.dtype
) -> torch.Tensor:
    updates = [update.shown(plan.rows) for update in updates]
    B = _joined([update.multiplied(("o", *plan.order)) for update in updates])
    U2 = _joined([update.factors.U2 for update in updates])
    if plan.padding is not None:
        U2 = F.pad(U2, (0, 0, *plan.padding))
    x = c.x
    for factor, axis, before, after in group.on_x:
        x = flat_mode_product(x, updates[0].factors[factor].T.to(x.dtype), axis, before, after)
    thin = group.arrangement(B).to(dtype)
    axis, before, after = plan.place
    if not plan.depth:
        y = c.apply(x, thin)
        return flat_mode_product(y, U2.to(y.dtype), axis, before, after)
    # As one matrix product whose thin side is the rows of B, which is the fast way round for gradients too.
    lead = x.shape[: x.dim() - len(c.form.summed)]
    y = F.linear(x.reshape(-1, thin.shape[1]), thin)
    if plan.sample_shape:
        y = _weighted(y.reshape(*lead, -1), updates, plan.sample_shape)
    y = F.linear(y.flatten(0, -2) if y.dim() > 2 else y, U2.to(y.dtype))
    y = y.reshape(*lead, len(U2)) if len(lead) != 1 else y
    return y if axis == -1 or axis == y.dim() - 1 else y.movedim(-1, axis)


def _weighted(y: torch.Tensor, updates: Sequence[Update], shape: tuple[int, ...]) -> torch.Tensor:
    """Σ_p w_p · y_p of every update, side by side. shape: (..., Σ P · r2) -> (..., Σ r2)"""
    parts = []
    for update, part in zip(updates, y.split([u.terms * u.ranks[1] for u in updates], dim=-1), strict=True):
        weights = update.weights
        if weights is not None:
            weights = weights.to(y.dtype).reshape(*shape, -1, 1)
            part = part.unflatten(-1, (update.terms, -1))
            # Zero, also where the value of an adapter that a sample does not see is not finite.
            part = torch.where(weights == 0, 0, part * weights).sum(-2)
        parts.append(part)
    return _joined(parts, dim=-1)


def _joined(tensors: list[torch.Tensor], dim: int = 1) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


class DensePlan(NamedTuple):
    """How A + Σ updates is formed, lying in memory like A."""

    rows: tuple[Rows, ...]
    last: int  # the factor that is multiplied last, as one matrix product from the left; 0: none in particular
    arrangement: Arrangement


def dense_sum(weight: Weight) -> torch.Tensor:
    """A + Σ updates.

    Raises:
        SampleAxisUnknown: if an update differs from sample to sample.
    """
    total = weight.tensor
    for update in weight.updates:
        if update.weights is not None:
            raise SampleAxisUnknown
        core, *factors = update.factors
        full = (*map(len, factors), *core.shape[3:])
        plan = _dense_plan(weight.axes, full, update.ranks)
        update = update.shown(plan.rows)
        if plan.last:
            rest = plan.arrangement(update.multiplied(("iod"[plan.last - 1],)))
            delta = (update.factors[plan.last] @ rest).reshape(total.shape)
        else:
            delta = plan.arrangement(update.multiplied(()))
        total = total + delta.to(total.dtype)
    # A sum lies like its first term where that is transposed; the layer's operation then rounds as with A.
    return total.contiguous() if weight.tensor.is_contiguous() else total


@planned
def _dense_plan(axes: Axes, full: tuple[int, ...], ranks: tuple[int, int, int]) -> DensePlan:
    rows = tuple([axes.rows(mode, count) for mode, count in zip(axes.modes(), full, strict=True)])
    first = axes.axes[0] if axes.axes else None
    if first is not None and len(first.atoms) == 1 and not any(axis.is_padded for axis in axes.axes):
        mode = first.atoms[0].mode
        if mode in ("i", "o", "d") and axes.size(mode) == first.size:
            last = "iod".index(mode) + 1
            return DensePlan(rows, last, axes.arrangement({mode: ranks[last - 1]}, flat=1))
    return DensePlan(rows, 0, axes.arrangement({}))
