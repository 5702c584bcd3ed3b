"""y = contract(x, A) + expand(contract(x, B), U2): one contraction with a coefficient tensor and its Tucker updates.

The thin tensor B = s · G ×₁ U1 ×₃ U3 has A's size with r2 in place of the m outputs. If it is cheaper, x is contracted
with U1 or U3 first, and the operation runs with a smaller B. If ranks are near the modes, or layers small, the dense
A + Δ is formed. Axes, sizes and order are planned once, from hashable values. To apply a plan takes a few calls of
torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._C import _functorch

from ..calls.context import Samples
from ..calls.samples import SampleAxisUnknown
from .axes import Arrangement, Axes, Rows, planned
from .cost import DENSE, cheapest_order
from .operations import Contraction, Form, Weight
from .update import Step, Update, flat_mode_product, multiplied, planned_steps

Shapes = tuple[Any, ...]  # the shapes of G, U1, U2, U3; None where the mode is whole


class Group(NamedTuple):
    """Updates whose thin tensors lie side by side in one operation."""

    members: tuple[int, ...]
    steps: tuple[tuple[Step, ...], ...]  # the products from each member's core to its B
    joined: tuple[tuple[int, ...], ...]  # the shape of each member's B, to be joined along o
    on_x: tuple[tuple[int, int, int, int], ...]  # (factor, axis of x, before, after): products with x, in turn
    arrangement: Arrangement  # lays out B like the weight


class DensePlan(NamedTuple):
    """How the sum of A and an update is formed, with A's order in memory."""

    rows: tuple[Rows, ...] | None
    steps: tuple[Step, ...]
    joined: tuple[int, ...]  # the shape of the product of the steps
    arrangement: Arrangement
    last: int  # the factor that one matrix product from the left multiplies last; 0: none
    shape: tuple[int, ...]


class Plan(NamedTuple):
    """How the updates' part of one operation is computed."""

    order: str
    dense: tuple[DensePlan, ...]  # for each update, if the order is dense
    rows: tuple[Rows, ...] | None
    groups: tuple[Group, ...]
    depth: int  # columns of x as a matrix, if the operation is one matrix product; else 0
    outputs: tuple[int, int, int]  # (axis of y, before, after)
    padding: tuple[int, int] | None  # numbers of outputs before and after that belong to no coefficient
    sample_shape: tuple[int, ...]  # in this shape, weights per sample broadcast to y without its output axis


def plan_for(c: Contraction, weight: Weight) -> Plan | None:
    """The plan of an operation with A + Σ updates; None if it has no factorised form.

    Raises:
        SampleAxisUnknown: if updates have weights per sample, and it is unknown which rows belong to which sample.
    """
    sample_shape: tuple[int, ...] | None = None
    shapes = []
    for update in weight.updates:
        shapes.append(_shapes(update))
        if update.weights is not None:
            sample_shape = _sample_shape(update.samples, tuple(c.x.shape[: c.x.dim() - len(c.form.summed)]))
    # While a graph is compiled, the batch size may be open. A plan that depended on it would bind the graph to it.
    positions = None if torch.compiler.is_compiling() else c.x.numel() // c.form.depth
    transformed = positions is not None and _functorch.peek_interpreter_stack() is not None
    per_sample = transformed and _gradients_per_sample(weight)
    device = c.x.device.type
    return _plan(c.form, weight.axes, tuple(shapes), c.x.dim(), positions, device, per_sample, sample_shape)


def _gradients_per_sample(weight: Weight) -> bool:
    """Whether torch.func differentiates by a factor inside `torch.func.vmap`, so that each sample has a gradient."""
    tensors = [tensor for update in weight.updates for tensor in update.factors if tensor is not None]
    level = max([_functorch.maybe_get_level(t) for t in tensors if _functorch.is_gradtrackingtensor(t)], default=0)
    transforms = _functorch.get_interpreter_stack()
    return any([one.key() == _functorch.TransformType.Vmap and one.level() < level for one in transforms])


@planned
def _plan(
    form: Form, axes: Axes, shapes: tuple[Shapes, ...], ndim: int, positions: int | None, device: str,
    per_sample: bool, sample_shape: tuple[int, ...] | None,
) -> Plan | None:  # fmt: skip
    """The plan; None if there is no factorised form.

    Args:
        form, axes: the form of the operation, and the axes of the weight.
        shapes: the shapes of the updates' factors.
        ndim: the number of axes of x.
        positions: the number of positions of x; None if it is open.
        device: the kind of device.
        per_sample: whether each sample has gradients of its own.
        sample_shape: in this shape, weights per sample broadcast to x's axes that are not summed; () if it is
            unknown, None if no update has such weights.
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
    if sample_shape is not None and not (is_matrix and sample_shape):
        raise SampleAxisUnknown
    on_x = ""
    for mode in ("i", "d"):
        place = axes.place(mode)
        if place is not None and place.axis in summed and not axes.axes[place.axis].is_padded:
            on_x += mode
    modes = axes.size("i"), axes.size("o"), axes.size("d")
    kernel = tuple([axes.size(mode) for mode in axes.modes()[3:]])
    whole, ranks = tuple(map(_whole, shapes)), []
    for own in shapes:
        r1, r2, r3 = _ranks(own, modes)
        ranks.append((r1, r2 * math.prod(own[0][len(axes.modes()) :]), r3))  # P terms
    order = ""
    if sample_shape is None:
        order = cheapest_order(
            positions, form.depth, form.terms, modes, math.prod(kernel), on_x, tuple(ranks), whole, device, per_sample
        )
    # Without factors on x, all updates share one operation.
    members = [tuple(range(len(ranks)))] if order == "" else [(k,) for k in range(len(ranks))]
    by_x = [output.axis, *sorted(summed, key=summed.__getitem__)]
    groups = []
    for group in members if order != DENSE else ():
        r1, _, r3 = ranks[group[0]]
        steps: list[tuple[int, int, int, int]] = []
        replaced: dict[str, int] = {}
        kept = "".join([mode for mode in order if mode not in whole[group[0]]])
        for mode in kept:
            place = axes.place(mode, replaced)
            if place is not None:  # always, for the order to be this one
                steps.append((1 if mode == "i" else 3, summed[place.axis], place.before, place.after))
            replaced[mode] = r1 if mode == "i" else r3
        replaced["o"] = sum([ranks[k][1] for k in group])
        cores = [(*ranks[k], *kernel) for k in group]
        planned = [planned_steps(core, modes, "o" + kept, whole[k]) for core, k in zip(cores, group, strict=True)]
        sequences = [one for one, _ in planned]
        joined = [(*[core[k] if "iod"[k] in "o" + kept else modes[k] for k in range(3)], *kernel) for core in cores]
        laid = axes.permuted(by_x) if is_matrix else axes
        laid_out = laid.arrangement(replaced, 1 if is_matrix else None)
        groups.append(Group(group, tuple(sequences), tuple(joined), tuple(steps), laid_out))
    dense = tuple([_dense_plan(axes, own) for own in shapes]) if order == DENSE else ()
    depth = math.prod([axes.axes[axis].size for axis in summed]) if is_matrix else 0
    outputs = carried[output.axis], output.before, output.after
    padding = (stored.before, stored.after) if stored.is_padded else None
    return Plan(order, dense, _rows(axes, shapes[0]), tuple(groups), depth, outputs, padding, sample_shape or ())


def _shapes(update: Update) -> Shapes:
    core, U1, U2, U3, *_ = update.factors
    # Written out, for speed.
    return (
        core.shape,
        None if U1 is None else U1.shape,
        None if U2 is None else U2.shape,
        None if U3 is None else U3.shape,
    )


def _whole(shapes: Shapes) -> str:
    return "".join([mode for mode, shape in zip("iod", shapes[1:], strict=True) if shape is None])


def _ranks(shapes: Shapes, modes: tuple[int, int, int]) -> tuple[int, ...]:
    """(r1, r2, r3) of an update. For a whole mode, this is the size of the mode in the view."""
    return tuple([n if U is None else U[1] for n, U in zip(modes, shapes[1:], strict=True)])


def _rows(axes: Axes, shapes: Shapes) -> tuple[Rows, ...] | None:
    """The rows that a view shows, of U1, U2, U3 or the core's whole modes, and of its further axes; None if all."""
    core, *sides = shapes
    full = *[n if U is None else U[0] for n, U in zip(core, sides, strict=False)], *core[3:]
    rows = tuple([axes.rows(mode, count) for mode, count in zip(axes.modes(), full, strict=False)])
    return rows if any([part is not None for part in rows]) else None


def _sample_shape(samples: Samples | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which one number for each sample broadcasts to `sizes`; () if the axis of samples is not clear.

    It is clear if the sizes are those of the layer's first tensor without its last axis, and only one of them is the
    number of samples. Otherwise the layer may have moved or flattened axes.
    """
    if samples is None:
        return ()
    count = samples.sizes[samples.axis] if samples.axis < len(samples.sizes) else 0
    given, own = ([size for size in held if size != 1] for held in (samples.sizes, sizes))
    if given != own or own.count(count) != 1:
        return ()
    return tuple([size if size == count else 1 for size in sizes])


def apply(plan: Plan, c: Contraction, weight: Weight, y: torch.Tensor | None) -> torch.Tensor:
    """The operation with A + Σ updates in factorised form.

    Args:
        plan: a plan whose order is not dense.
        c, weight: the operation.
        y: the result of the operation with A, with the offset; None if A is zero.
    """
    total = c.offset if y is None else y
    for group in plan.groups:
        term = _thin_term(plan, group, c, weight)
        total = term if total is None else total + term.to(total.dtype)
    assert total is not None  # there is at least one group
    return total


def _thin_term(plan: Plan, group: Group, c: Contraction, weight: Weight) -> torch.Tensor:
    updates, tensors = [], []
    factors: list[Any] = []
    for k, steps in zip(group.members, group.steps, strict=True):
        update = weight.updates[k].shown(plan.rows)
        core = update.factors.core if update.scaling == 1 else update.factors.core * update.scaling
        if update.weights is not None and update.weights.shape[1] > 1:  # P terms, side by side like the outputs
            core = core.movedim(-1, 1).flatten(1, 2)
        updates.append(update)
        tensors.append(multiplied(steps, core, update.factors))
        U2 = update.factors.U2
        if U2 is None and (len(group.members) > 1 or plan.padding is not None):
            U2 = torch.eye(update.factors.core.shape[1], dtype=core.dtype, device=core.device)
        factors.append(U2)
    tensors = [t.reshape(shape) for t, shape in zip(tensors, group.joined, strict=True)]
    B, U2 = tensors[0], factors[0]
    if len(tensors) > 1:
        B, U2 = torch.cat(tensors, dim=1), torch.cat(factors, dim=1)
    if plan.padding is not None:
        U2 = F.pad(U2, (0, 0, *plan.padding))
    x = c.x
    for factor, axis, before, after in group.on_x:
        own: Any = updates[0].factors[factor]
        x = flat_mode_product(x, own.T.to(x.dtype), axis, before, after)
    thin = group.arrangement(B)
    if thin.dtype != weight.tensor.dtype:
        thin = thin.to(weight.tensor.dtype)
    axis, before, after = plan.outputs
    if not plan.depth:
        y = c.apply(x, thin)
        return y if U2 is None else flat_mode_product(y, U2.to(y.dtype), axis, before, after)
    # One matrix product whose thin side is the rows of B. This is also fast for gradients.
    lead = x.shape[: x.dim() - len(c.form.summed)]
    y = F.linear(x.reshape(-1, thin.shape[1]), thin)
    if plan.sample_shape:
        y = _weighted(y.reshape(*lead, -1), updates, plan.sample_shape)
    y = y.flatten(0, -2) if y.dim() > 2 else y
    y = y if U2 is None else F.linear(y, U2.to(y.dtype))
    y = y.reshape(*lead, y.shape[1]) if len(lead) != 1 else y
    return y if axis == -1 or axis == y.dim() - 1 else y.movedim(-1, axis)


def _weighted(y: torch.Tensor, updates: Sequence[Update], shape: tuple[int, ...]) -> torch.Tensor:
    """Σ_p w_p · y_p for every update, side by side. shapes: (..., Σ P · r2) -> (..., Σ r2)"""
    parts = []
    sizes = [u.factors.core.shape[1] * (1 if u.weights is None else u.weights.shape[1]) for u in updates]
    for update, part in zip(updates, y.split(sizes, dim=-1), strict=True):
        weights = update.weights
        if weights is not None:
            weights = weights.reshape(*shape, -1, 1)
            part = part.unflatten(-1, (weights.shape[-2], -1))
            if weights.dtype == torch.bool:
                # A sample gets exact zeros from an adapter that it does not see, even if that adapter is not finite.
                part = torch.where(weights, part, 0).sum(-2)
            else:
                part = (part * weights.to(y.dtype)).sum(-2)
        parts.append(part)
    return torch.cat(parts, dim=-1)


def dense_sum(weight: Weight, plans: tuple[DensePlan, ...] = ()) -> torch.Tensor:
    """A + Σ updates.

    Args:
        weight: A and the updates.
        plans: the plans of the updates, if they are known.

    Raises:
        SampleAxisUnknown: if an update differs from sample to sample.
    """
    total = weight.tensor
    for k, update in enumerate(weight.updates):
        update.check_common()
        plan = plans[k] if plans else _dense_plan(weight.axes, _shapes(update))
        update = update.shown(plan.rows)
        scaling = update.scaling
        factors: tuple[Any, ...] = update.factors
        delta = plan.arrangement(multiplied(plan.steps, factors[0], factors).reshape(plan.joined))
        if not plan.last:
            total = total + (delta * scaling).to(total.dtype)
        elif delta.dtype == total.dtype and not torch.is_autocast_enabled(total.device.type):
            flat = total.reshape(plan.shape[0], -1)
            total = torch.addmm(flat, factors[plan.last], delta, alpha=scaling).view(plan.shape)
        else:
            total = total + (factors[plan.last] @ delta * scaling).view(plan.shape).to(total.dtype)
    # The sum lies in memory as A does, so that the layer's operation rounds as it does with A.
    return total if total.is_contiguous() or not weight.tensor.is_contiguous() else total.contiguous()


@planned
def _dense_plan(axes: Axes, shapes: Shapes) -> DensePlan:
    modes = axes.size("i"), axes.size("o"), axes.size("d")
    whole, ranks = _whole(shapes), _ranks(shapes, modes)
    core = (*ranks, *[axes.size(mode) for mode in axes.modes()[3:]])
    shape, last, kept = tuple([axis.size for axis in axes.axes]), 0, ""
    first = axes.axes[0] if axes.axes else None
    if first is not None and len(first.atoms) == 1 and not any([axis.is_padded for axis in axes.axes]):
        mode = first.atoms[0].mode
        if mode in ("i", "o", "d") and mode not in whole and axes.size(mode) == first.size:
            last, kept = "iod".index(mode) + 1, mode
    steps, _ = planned_steps(core, modes, kept, whole)
    replaced = {kept: core[last - 1]} if kept else {}
    joined = (*[core[k] if "iod"[k] == kept else modes[k] for k in range(3)], *core[3:])
    return DensePlan(_rows(axes, shapes), steps, joined, axes.arrangement(replaced, 1 if kept else None), last, shape)
