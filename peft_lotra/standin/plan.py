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
from ..placement.constants import constant
from .axes import Arrangement, Axes, Rows, planned
from .cost import DENSE, Core, Work, cheapest_order
from .operations import Contraction, Form, Weight
from .update import Products, Slots, Update, flat_mode_product, products_of

Shapes = tuple[Any, ...]  # the shapes of G and of the factors of i, o, d; None where the mode is whole


class Operand(NamedTuple):
    """The other operand x of an operation."""

    ndim: int
    positions: int | None  # None if their number is open
    device: str  # its kind
    per_sample: bool  # whether each sample has gradients of its own
    # In this shape, weights per sample broadcast to the axes that are not summed. () if it is unknown, None if no
    # update has such weights.
    sample_shape: tuple[int, ...] | None
    stacks: tuple[int, ...]  # how many updates are in each that is a stack; otherwise 0


class Roles(NamedTuple):
    """What the axes of a weight are in an operation."""

    outputs: tuple[int, int, int]  # (axis of y, before, after)
    on_x: str  # the modes of i and d that are summed with x
    matrix: tuple[int, ...]  # if the operation is one matrix product: its axis of outputs, and those that are summed


class Group(NamedTuple):
    """Updates whose thin tensors lie side by side in one operation."""

    members: tuple[int, ...]
    products: tuple[Products, ...]  # from each member's core to its B
    on_x: tuple[tuple[str, int, int, int], ...]  # (mode, axis of x, before, after): products with x, in turn
    arrangement: Arrangement  # lays out B like the weight
    stack: int = 0  # how many updates are in the one member, if it is a stack


class DensePlan(NamedTuple):
    """How the sum of A and an update is formed, with A's order in memory."""

    rows: tuple[Rows, ...] | None
    products: Products
    arrangement: Arrangement
    last: str  # the mode whose factor one matrix product from the left multiplies last; "": none
    shape: tuple[int, ...]


class Plan(NamedTuple):
    """How the updates' part of one operation is computed: from A + Δ if there are dense plans, else in groups."""

    dense: tuple[DensePlan, ...]
    groups: tuple[Group, ...]
    roles: Roles
    rows: tuple[Rows, ...] | None
    sample_shape: tuple[int, ...]


def plan_for(c: Contraction, weight: Weight) -> Plan | None:
    """The plan of an operation with A + Σ updates; None if it has no factorised form.

    Raises:
        SampleAxisUnknown: if updates have weights per sample, and it is unknown which rows belong to which sample.
    """
    sample_shape: tuple[int, ...] | None = None
    shapes, stacks = [], []
    for update in weight.updates:
        shapes.append(_shapes(update))
        stacks.append(0 if update.rows is None else len(update.rows))
        if update.weights is not None or update.rows is not None:
            sample_shape = _sample_shape(update.samples, tuple(c.x.shape), c.form)
    # While a graph is compiled, the batch size may be open. A plan that depended on it would bind the graph to it.
    positions = None if torch.compiler.is_compiling() else c.x.numel() // c.form.depth
    transformed = positions is not None and _functorch.peek_interpreter_stack() is not None
    per_sample = transformed and _gradients_per_sample(weight)
    operand = Operand(c.x.dim(), positions, c.x.device.type, per_sample, sample_shape, tuple(stacks))
    return _plan(c.form, weight.axes, tuple(shapes), operand)


def _shapes(update: Update) -> Shapes:
    core, factors = update.tucker
    first = int(update.rows is not None)  # of a stack, the shapes of one member
    shapes: list[Any] = [core.shape[first:]]
    for mode in "iod":  # not in a comprehension, for speed
        shapes.append(factors[mode].shape[first:] if mode in factors else None)
    return tuple(shapes)


def _sample_shape(samples: Samples | None, sizes: tuple[int, ...], form: Form) -> tuple[int, ...]:
    """The shape in which one number for each sample broadcasts to y without its axis of outputs; () if it is unclear.

    It is clear if x, with these sizes, begins with the axes of the layer's first tensor but the last, keeps that of
    the samples in y, and keeps no other axis with as many entries. If all other axes of x are summed, it has to begin
    with nothing else. Otherwise the layer may have moved or flattened axes.
    """
    kept = dict(form.kept) or {axis: axis for axis in range(len(sizes) - len(form.summed))}
    output = form.carried[0][1] if form.kept else len(kept)
    if samples is None or samples.axis not in kept or sizes[: len(samples.sizes)] != samples.sizes:
        return ()
    count, own = sizes[samples.axis], [sizes[axis] for axis in kept]
    if own.count(count) != 1 or not (form.kept or len(own) == len(samples.sizes)):
        return ()
    shape = [count if axis == kept[samples.axis] else 1 for axis in range(len(kept) + 1)]
    return tuple(shape[:output] + shape[output + 1 :])


def _gradients_per_sample(weight: Weight) -> bool:
    """Whether torch.func differentiates by a factor inside `torch.func.vmap`, so that each sample has a gradient."""
    tensors = [tensor for update in weight.updates for tensor in update.tucker.tensors()]
    level = max([_functorch.maybe_get_level(t) for t in tensors if _functorch.is_gradtrackingtensor(t)], default=0)
    transforms = _functorch.get_interpreter_stack()
    return any([one.key() == _functorch.TransformType.Vmap and one.level() < level for one in transforms])


# The stages of a plan: roles of axes, sizes, order, groups. They depend on hashable values alone.


@planned
def _plan(form: Form, axes: Axes, shapes: tuple[Shapes, ...], x: Operand) -> Plan | None:
    roles = _roles(form, axes, x.ndim)
    if roles is None:
        return None
    rows, cores = _rows(axes, shapes[0]), tuple([_core(axes, own) for own in shapes])
    if x.sample_shape is not None:
        is_kept = bool(form.kept) and roles.outputs[1] * roles.outputs[2] == 1
        if not (x.sample_shape and (roles.matrix or is_kept)):
            raise SampleAxisUnknown
        order = ""
    else:
        modes, kernel = axes.shape()[:3], math.prod(axes.shape()[3:])
        sizes = x.positions, form.depth, form.terms, modes, kernel, roles.on_x, x.device, x.per_sample
        order = cheapest_order(Work(*sizes), cores)
    if order == DENSE:
        return Plan(tuple([_dense_plan(axes, own) for own in shapes]), (), roles, rows, ())
    # Without factors on x, all updates share one operation, except stacks.
    together = tuple([k for k in range(len(cores)) if order == "" and not x.stacks[k]])
    members = [together] * bool(together) + [(k,) for k in range(len(cores)) if k not in together]
    groups = tuple([_group(order, own, cores, axes, roles, dict(form.summed), x.stacks[own[0]]) for own in members])
    return Plan((), groups, roles, rows, x.sample_shape or ())


def _roles(form: Form, axes: Axes, ndim: int) -> Roles | None:
    """The roles of a weight's axes, for x with `ndim` axes; None if there is no factorised form."""
    carried, summed = dict(form.carried), dict(form.summed)
    output = axes.place("o")
    if output is None or output.axis not in carried or axes.axes[output.axis].is_padded:
        return None
    places = {mode: axes.place(mode) for mode in "id"}
    on_x = [mode for mode, p in places.items() if p and p.axis in summed and not axes.axes[p.axis].is_padded]
    trailing = list(range(ndim - len(summed), ndim))
    is_matrix = form.is_linear and output.before * output.after == 1 and sorted(summed.values()) == trailing
    matrix = (output.axis, *sorted(summed, key=summed.__getitem__)) if is_matrix and summed else ()
    return Roles((carried[output.axis], output.before, output.after), "".join(on_x), matrix)


def _core(axes: Axes, shapes: Shapes) -> Core:
    core, *sides = shapes
    r1, r2, r3 = [n if U is None else U[1] for n, U in zip(axes.shape(), sides, strict=False)]
    terms = math.prod(core[len(axes.modes()) :])  # P, side by side like the outputs
    return Core((r1, r2 * terms, r3), "".join([mode for mode, U in zip("iod", sides, strict=True) if U is None]))


def _rows(axes: Axes, shapes: Shapes) -> tuple[Rows, ...] | None:
    """The rows that a view shows of each mode of the whole tensor; None if all."""
    core, *sides = shapes
    full = *[n if U is None else U[0] for n, U in zip(core, sides, strict=False)], *core[3:]
    rows = tuple([axes.rows(mode, count) for mode, count in zip(axes.modes(), full, strict=False)])
    return rows if any([part is not None for part in rows]) else None


def _group(
    order: str, members: tuple[int, ...], cores: Sequence[Core], axes: Axes, roles: Roles, summed: dict[int, int],
    stack: int,
) -> Group:  # fmt: skip
    """The group of these members; several of them only if the order is empty."""
    own = [cores[k] for k in members]
    on_x = []
    ranks: dict[str, int] = {}
    for mode in order:
        place = axes.place(mode, ranks)
        if place is not None and mode not in own[0].whole:
            on_x.append((mode, summed[place.axis], place.before, place.after))
            ranks[mode] = own[0].ranks["iod".index(mode)]
    shape, kept = axes.shape(), "".join(["o", *ranks])
    products = [products_of((*core.ranks, *shape[3:]), shape[:3], kept, core.whole) for core in own]
    ranks["o"] = sum([core.ranks[1] for core in own]) * (stack or 1)
    laid_out = axes.permuted(roles.matrix).arrangement(ranks, 1) if roles.matrix else axes.arrangement(ranks)
    return Group(members, tuple(products), tuple(on_x), laid_out, stack)


@planned
def _dense_plan(axes: Axes, shapes: Shapes) -> DensePlan:
    core, last = _core(axes, shapes), ""
    if axes.axes and len(axes.axes[0].atoms) == 1 and not any([axis.is_padded for axis in axes.axes]):
        mode, size, _ = axes.axes[0].atoms[0]
        if mode in ("i", "o", "d") and mode not in core.whole and axes.size(mode) == size:
            last = mode
    shape = axes.shape()
    products = products_of((*core.ranks, *shape[3:]), shape[:3], last, core.whole)
    laid_out = axes.arrangement({last: core.ranks["iod".index(last)]}, 1) if last else axes.arrangement({})
    return DensePlan(_rows(axes, shapes), products, laid_out, last, tuple([axis.size for axis in axes.axes]))


@planned
def planned_slots(rows: tuple[tuple[int, ...], ...], count: int) -> Slots:
    return Slots.of(rows, count)


# Plans are applied.


def apply(plan: Plan, c: Contraction, weight: Weight, y: torch.Tensor | None) -> torch.Tensor:
    """The operation with A + Σ updates in factorised form.

    Args:
        plan: a plan in groups.
        c, weight: the operation.
        y: the result of the operation with A; None if A is zero.
    """
    for group in plan.groups:
        term = (_stacked_term if group.stack else _thin_term)(plan, group, c, weight)
        y = term if y is None else y + term.to(y.dtype)
    assert y is not None  # there is at least one group
    return y


def _thin_term(plan: Plan, group: Group, c: Contraction, weight: Weight) -> torch.Tensor:
    """The contraction of x with B, expanded by U2."""
    updates = [weight.updates[k].shown(plan.rows) for k in group.members]
    B, U2 = _thin(group, updates)
    x = c.x
    for mode, axis, before, after in group.on_x:
        x = flat_mode_product(x, updates[0].tucker.factors[mode].T.to(x.dtype), axis, before, after)
    if B.dtype != weight.tensor.dtype:
        B = B.to(weight.tensor.dtype)
    axis, before, after = plan.roles.outputs
    if not plan.roles.matrix:
        y = c.apply(x, B)
        if plan.sample_shape:
            y = _weighted(y.movedim(axis, -1), updates, plan.sample_shape).movedim(-1, axis)
        return y if U2 is None else flat_mode_product(y, U2.to(y.dtype), axis, before, after)
    # One matrix product whose thin side is the rows of B. This is also fast for gradients.
    lead = x.shape[: x.dim() - len(c.form.summed)]
    y = F.linear(x.reshape(-1, B.shape[1]), B)
    if plan.sample_shape:
        y = _weighted(y.reshape(*lead, -1), updates, plan.sample_shape)
    y = y.flatten(0, -2) if y.dim() > 2 else y
    y = y if U2 is None else F.linear(y, U2.to(y.dtype))
    y = y.reshape(*lead, y.shape[1]) if len(lead) != 1 else y
    return y if axis == -1 or axis == y.dim() - 1 else y.movedim(-1, axis)


def _stacked_term(plan: Plan, group: Group, c: Contraction, weight: Weight) -> torch.Tensor:
    """The contraction of each sample with the B of the member of a stack that it sees, expanded by that one's U2.

    Each member multiplies its own samples alone, all members in one batched product.
    """
    update = weight.updates[group.members[0]].shown(plan.rows)
    assert update.rows is not None
    core, factors = update.tucker
    B = group.products[0].stacked(core if update.scaling == 1 else core * update.scaling, factors)
    B = group.arrangement(B.movedim(0, 1).flatten(1, 2))
    B = B.reshape(group.stack, -1, B.shape[1]).to(weight.tensor.dtype)
    lead = c.x.shape[: c.x.dim() - len(c.form.summed)]
    where = next(axis for axis, size in enumerate(plan.sample_shape) if size != 1)
    x = c.x if len(c.form.summed) == 1 else c.x.reshape(*lead, -1)
    x = x.movedim(where, 0) if where else x
    slots = planned_slots(update.rows, len(x))
    samples, places = [constant(tuple(own), x.device) for own in slots]
    y = torch.bmm(x.index_select(0, samples).reshape(group.stack, -1, B.shape[2]), B.mT)
    y = torch.bmm(y, factors["o"].mT.to(y.dtype)) if "o" in factors else y
    y = y.reshape(len(samples), *x.shape[1:-1], y.shape[2])
    if len(samples) in slots.places:
        y = torch.cat([y, y.new_zeros(1, *y.shape[1:])])
    y, axis = y.index_select(0, places), plan.roles.outputs[0]
    y = y.movedim(0, where) if where else y
    return y if axis == -1 or axis == y.dim() - 1 else y.movedim(-1, axis)


def _thin(group: Group, updates: Sequence[Update]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B, laid out like the weight, and U2, each of all updates side by side; no U2 if the outputs are whole."""
    thin, sides = [], []
    for update, products in zip(updates, group.products, strict=True):
        core, factors = update.tucker
        U2 = factors.get("o")
        if U2 is None and len(updates) > 1:
            U2 = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
        sides.append(U2)
        core = core if update.scaling == 1 else core * update.scaling
        if update.weights is not None and update.weights.shape[1] > 1:  # P terms, side by side like the outputs
            core = core.movedim(-1, 1).flatten(1, 2)
        thin.append(products(core, factors))
    if len(thin) == 1:
        return group.arrangement(thin[0]), sides[0]
    return group.arrangement(torch.cat(thin, 1)), torch.cat(sides, 1)  # type: ignore[arg-type]


def _weighted(y: torch.Tensor, updates: Sequence[Update], shape: tuple[int, ...]) -> torch.Tensor:
    """Σ_p w_p · y_p for every update, side by side. shapes: (..., Σ P · r2) -> (..., Σ r2)"""
    parts = []
    sizes = [u.tucker.core.shape[1] * (1 if u.weights is None else u.weights.shape[1]) for u in updates]
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
    total, compiling = weight.tensor, torch.compiler.is_compiling()  # which fuses the sum with the copies around it
    for k, update in enumerate(weight.updates):
        update.check_common()
        plan = plans[k] if plans else _dense_plan(weight.axes, _shapes(update))
        core, factors = update.shown(plan.rows).tucker
        delta = plan.arrangement(plan.products(core, factors))
        if not plan.last:
            total = total + (delta * update.scaling).to(total.dtype)
        elif delta.dtype == total.dtype and not compiling and not torch.is_autocast_enabled(total.device.type):
            flat = total.reshape(plan.shape[0], -1)
            total = torch.addmm(flat, factors[plan.last], delta, alpha=update.scaling).view(plan.shape)
        else:
            total = total + (factors[plan.last] @ delta * update.scaling).view(plan.shape).to(total.dtype)
    # The sum lies in memory as A does, so that the layer's operation rounds as it does with A.
    return total if total.is_contiguous() or not weight.tensor.is_contiguous() else total.contiguous()
