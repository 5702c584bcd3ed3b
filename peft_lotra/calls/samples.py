"""A layer's pass in which samples differ: each may have an adapter, or a task, of its own.

If the layer's contractions keep the samples apart, there is one pass for all of them. Otherwise there is one pass for
all samples that see the same update. If somebody differentiates by the tasks, each sample then has a pass of its own,
because equal tasks may have other derivatives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..placement.constants import constant
from ..placement.sharded import gathers_inside, largest, reshard_inside
from .context import BASE, Batch, Context, Samples, Shares, entered

# An adapter's name, or None for the active adapters; the rows that see the same update; c by family.
Group = tuple[str | None, list[int], dict[str, torch.Tensor]]


class SampleAxisUnknown(ValueError):
    """An update has weights per sample, and the operation's samples cannot be told apart."""

    def __init__(self) -> None:
        super().__init__("one update is needed, but every sample has a task or an adapter of its own: give one task")


def run(layer: Any, kind: type, context: Context, args: Any, kwargs: Any) -> Any:
    """A forward pass of a LoTRALayer in a context that says something of its samples, or of the task of all.

    Args:
        layer: the LoTRALayer.
        kind: the class LoTRALayer.
        context: of this pass.
        args, kwargs: the arguments of the pass.

    Raises:
        ValueError: if the samples are not on the axis that was named, an adapter of `adapter_names` is merged, or the
            layer's results do not belong to single samples.
        RuntimeError: if a backward pass repeats this pass, and it is unknown whether that had `adapter_names`.
    """
    batch = context.batch(layer)
    if isinstance(batch, Shares):
        return layer._run_once(args, kwargs)
    if batch is None:
        check_known(context, layer)
    names = None if batch is None else batch.names_for(layer)
    layers = [layer]
    while isinstance(layers[-1].base_layer, kind):
        layers.append(layers[-1].base_layer)
    tasks = _tasks(context, layers, names)
    together = bool(gathers_inside(layer.base_layer))
    if names is None and not tasks and not together:
        return layer._run_once(args, kwargs)
    layers += [module for module in layers[-1].base_layer.modules() if isinstance(module, kind)]
    tasks = _tasks(context, layers, names)
    axis = {axis for _, axis in tasks.values()} | ({batch.axis} if isinstance(batch, Batch) else set()) or {0}
    tasks_of = {name: c for name, (c, _) in tasks.items()}
    leaves = args if args and _is_batched(args[0]) else tree_leaves((args, kwargs))
    first = next((leaf for leaf in leaves if _is_batched(leaf)), torch.empty(0))
    samples = _samples(first, axis, names, [len(c) for c in tasks_of.values()], layer.get_base_layer())
    if names is not None:
        if any(inner.merged for inner in layers):
            what = "Cannot pass `adapter_names` when there are merged adapters"
            raise ValueError(f"{what}, please call `unmerge_adapter` first.")
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            for inner in layers:
                inner._had_names = True
        held = [inner.lotra_core for inner in layers]
        own = {name for name in {*names} if any([name in cores for cores in held])}
        names = tuple([name if name in own else BASE for name in names])
    count = first.shape[samples.axis]
    groups = _groups(names, tasks_of, count) if together else []
    passes = _passes_everywhere(groups, count, layers) if together else 1
    if not any(inner._needs_tensor for inner in layers):
        rows_of = _rows_by_name(names)
        if passes > 1:
            rows_of = _for_each_sample(rows_of or dict.fromkeys(layer.active_adapters), layers, count)
        try:
            with entered(Shares(set(layers), rows_of, tasks_of, samples)):
                return layer._run_once(args, kwargs)
        except SampleAxisUnknown:
            reshard_inside(layer.base_layer)
    groups = _cut(groups or _groups(names, tasks_of, count), passes)
    results = []
    for name, rows, weights in groups:
        with entered(Shares(set(layers), None if name is None else {name: None}, weights)):
            results.append(layer._run_once(*_rows_of((args, kwargs), rows, count, samples.axis)))
    return _joined(results, [rows for _, rows, _ in groups], samples.axis, first.dim())


def may_pass_again(layer: Any) -> bool:
    """Whether another process, with samples that differ, may need several passes of a layer, and this one as many."""
    return not layer.training and not layer.disable_adapters and bool(gathers_inside(layer.base_layer))


def checked_axis(axis: Any) -> int:
    """`batch_axis`, if it is an integer; otherwise raise TypeError."""
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"`batch_axis` should be an integer but the value passed is {axis!r}")
    return axis


def check_known(context: Context, module: Any) -> None:
    """Raise RuntimeError if `module` has seen `adapter_names`, and those of the running pass are unknown."""
    if not context.known and getattr(module, "_had_names", False):
        raise RuntimeError(
            f"a backward pass repeats a pass of a {type(module).__qualname__} that may have had `adapter_names`, and "
            "these are not known there: checkpoint with `use_reentrant=False` (and torch 2.8 or newer), or checkpoint "
            "a function that passes the names itself"
        )


def _tasks(
    context: Context, layers: Sequence[Any], names: Sequence[str] | None
) -> dict[str, tuple[torch.Tensor, int]]:
    """c, shape (batch, P), and the axis of the samples, for those families in use that have a task for each sample."""
    found = {}
    for layer in layers:
        for name in layer.active_adapters if names is None else dict.fromkeys(names):
            if layer.terms.get(name) and name not in layer.merged_adapters and not layer.disable_adapters:
                task = context.task(name, layer)
                if task is not None and task[0].dim() == 2:
                    found[name] = task
    return found


def _samples(
    first: torch.Tensor, axes: set[int], names: Sequence[str] | None, counts: Sequence[int], layer: nn.Module
) -> Samples:
    """Where the samples are in a layer's first tensor. Raise ValueError if they cannot be there."""
    kind, dim = type(layer).__qualname__, first.dim()
    given = min(axes)
    axis = given + dim if given < 0 else given
    if {one % dim for one in axes if -dim <= one < dim} != {axis}:
        raise ValueError(
            f"`batch_axis`={' and '.join(map(str, sorted(axes)))} for the first tensor of a {kind}, whose shape is "
            f"{tuple(first.shape)}: give one axis that it has, and the same one for `adapter_names` and for the tasks"
        )
    if axis == dim - 1 > 0 and (first.is_floating_point() or first.is_complex()):
        raise ValueError(
            f"`batch_axis`={given} is the last axis of the first tensor of a {kind}, whose shape is "
            f"{tuple(first.shape)}: this axis is of features; name the axis of the samples"
        )
    size = first.shape[axis]
    if names is not None and len(names) != size:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {size} respectively, in a {kind}. "
            f"The samples have to be on axis {axis} of the layer's first tensor; `batch_axis` names another"
        )
    for count in counts:
        if count != size:
            raise ValueError(
                f"a task for each of {count} samples is passed to a {kind}, but axis {axis} of its first tensor has "
                f"{size} entries: name the axis of the samples by `batch_axis`, or give one task"
            )
    return Samples(axis, tuple(first.shape[:-1]), size)


def _rows_by_name(names: Sequence[str] | None) -> dict[str, tuple[int, ...] | None] | None:
    """The samples of each adapter; None if they are all samples."""
    if names is None:
        return None
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: None if len(own) == len(names) else tuple(own) for name, own in rows.items()}


def _for_each_sample(
    rows_of: Mapping[str, tuple[int, ...] | None], layers: Sequence[Any], count: int
) -> dict[str, tuple[int, ...] | None]:
    """Rows that mean the same, and with which a pass fails if one with other rows fails in another process."""
    every = tuple(range(count))
    found: dict[str, tuple[int, ...] | None] = {name: every if r is None else r for name, r in rows_of.items()}
    held = {name: terms for inner in layers for name, terms in inner.terms.items()}
    if not found.keys() & held.keys():  # these samples have no adapter; take one for none of them
        found |= {name: () for name in sorted(held, key=lambda name: held[name])[:1]}
    return found


def _groups(names: Sequence[str] | None, tasks: Mapping[str, torch.Tensor], count: int) -> list[Group]:
    """The samples that see the same update; one group without samples if there are none."""
    by_name: dict[str | None, list[int]] = {}
    for row in range(count):
        by_name.setdefault(None if names is None else names[row], []).append(row)
    groups: list[Group] = []
    for name, rows in by_name.items():
        own = {family: c for family, c in tasks.items() if name in (None, family)}
        parts = _with_equal_tasks(torch.cat(list(own.values()), dim=1), rows) if own else [rows]
        groups += [(name, part, {family: c[part[0]] for family, c in own.items()}) for part in parts]
    nothing = {family: c.new_zeros(c.shape[1]) for family, c in tasks.items()}
    return groups or [(None if names is None else BASE, [], nothing)]


def _with_equal_tasks(c: torch.Tensor, rows: list[int]) -> list[list[int]]:
    """The rows in parts of equal tasks. If somebody may differentiate by the tasks, each row is a part."""
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(c)
    if transformed or torch.compiler.is_compiling() or (c.requires_grad and torch.is_grad_enabled()):
        return [[row] for row in rows]
    if torch.autograd.forward_ad.unpack_dual(c).tangent is not None:
        return [[row] for row in rows]
    distinct, owner = torch.unique(c.detach().cpu()[rows], dim=0, return_inverse=True)
    owners = owner.tolist()
    return [[row for row, k in zip(rows, owners, strict=True) if k == part] for part in range(len(distinct))]


def _passes_everywhere(groups: list[Group], count: int, layers: Sequence[Any]) -> int:
    """The largest number of groups in one of the processes that share the parts of a sharded layer.

    Raises:
        ValueError: if a process has fewer samples than another has groups.
    """
    for inner in layers:  # ZeRO-3 gathers what is read, and other processes may read other adapters
        for name in inner.lotra_core:
            inner.tucker(name)
    layer = layers[0]
    passes, shortest = largest([len(groups), -count], layer.base_layer)
    if passes > max(-shortest, 1):
        raise ValueError(
            f"samples that differ: with {passes} updates in one process and a batch of {-shortest} in another, a "
            f"sharded {type(layer.get_base_layer()).__qualname__} cannot make equally many passes in both: give "
            "`fully_shard` the LoTRALayer, or use equal batches"
        )
    return passes


def _cut(groups: list[Group], passes: int) -> list[Group]:
    """The groups, of which some are cut into as many as there are passes."""
    while len(groups) < passes:
        name, rows, weights = max(groups, key=lambda group: len(group[1]))
        groups.append((name, [rows.pop() for _ in range(len(rows) // 2)], weights))
    return groups


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _rows_of(tree: Any, rows: Sequence[int], count: int, axis: int) -> Any:
    """Nested arguments with these rows of every tensor that has `count` entries on the axis. Other values stay."""
    if len(rows) == count:
        return tree

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() <= axis or leaf.shape[axis] != count:
            return leaf
        return leaf.index_select(axis, constant(tuple(rows), leaf.device))

    return tree_map(taken, tree)


def _joined(results: Sequence[Any], rows: Sequence[Collection[int]], axis: int, dim: int) -> Any:
    """One result from several: y with y[rows[j]] = results[j] on the axis, for every tensor in nested results.

    If the samples are first, a layer may flatten leading axes into its rows. All samples then have the same number of
    rows. Elsewhere, a tensor has one entry for each sample, and as many axes as the layer's first tensor, `dim`.

    Raises:
        ValueError: if the results cannot be joined sample by sample.
    """
    if len(results) == 1:
        return results[0]
    leaves, specs = zip(*map(tree_flatten, results), strict=True)
    joint = [row for part in rows for row in part]
    order = tuple(sorted(range(len(joint)), key=joint.__getitem__))

    def joined(parts: Sequence[Any]) -> Any:
        if not any(isinstance(part, torch.Tensor) for part in parts):
            if all(part == parts[0] for part in parts):
                return parts[0]
        elif all(_is_batched(part) and (axis == 0 or part.dim() == dim) for part in parts):
            each = {divmod(part.shape[axis], len(own)) for part, own in zip(parts, rows, strict=True)}
            if len(each) == 1 and (size := each.pop())[1] == 0 and (axis == 0 or size[0] == 1):
                whole = torch.cat(list(parts), axis).unflatten(axis, (len(order), size[0]))
                return whole.index_select(axis, constant(order, whole.device)).flatten(axis, axis + 1)
        raise ValueError(
            "`adapter_names`, or a task for each sample: the layer returns values that do not belong to single "
            "samples; call the model once for each adapter, with `set_adapter`, or once for each task"
        )

    if any(spec != specs[0] for spec in specs):
        raise ValueError(
            "`adapter_names`, or a task for each sample: the layer returns other structures for other samples"
        )
    return tree_unflatten([joined(parts) for parts in zip(*leaves, strict=True)], specs[0])
