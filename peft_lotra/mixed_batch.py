"""Mixed batches, in which every sample has its own adapter: the names of the running call, and a layer's pass.

The names are on a stack of the thread, so calls in other threads, and other calls inside this call, do not see them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import families
from .placement.sharded import largest
from .standin import SampleAxisUnknown

BASE = "__base__"  # this name stands for no adapter


@dataclass(frozen=True)
class MixedBatch:
    """The adapters of a call's samples.

    Attributes:
        names: a name for each sample.
        in_encoder: the names that the modules of `encoder` see. Beam search repeats samples only after the encoder.
    """

    names: tuple[str, ...]
    in_encoder: tuple[str, ...] = ()
    encoder: Collection[nn.Module] = ()

    def names_for(self, module: nn.Module) -> tuple[str, ...]:
        return self.in_encoder if module in self.encoder else self.names


@dataclass(frozen=True)
class Shares:
    """Which samples see which adapter, in a pass of the LoTRALayers around one KAN layer."""

    layers: Collection[nn.Module]
    weights: Mapping[str, torch.Tensor | None]  # by adapter, shape (batch, 1); None: all samples


class _Calls(threading.local):
    def __init__(self) -> None:  # an instance attribute, because torch.compile guards on __dict__
        self.stack: tuple[MixedBatch | Shares | None, ...] = ()


_calls = _Calls()


@contextmanager
def entered(entry: MixedBatch | Shares | None) -> Iterator[None]:
    """While this is entered, the thread's calls belong to this mixed batch, or to none if `entry` is None."""
    before = _calls.stack
    _calls.stack = (*before, entry)
    try:
        yield
    finally:
        _calls.stack = before


def current(module: nn.Module) -> MixedBatch | Shares | None:
    """The entry of the running call for a module."""
    for entry in reversed(_calls.stack):
        if not isinstance(entry, Shares) or module in entry.layers:
            return entry
    return None


def pass_names_on(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook for PEFT's own modules, which take the names as an argument."""
    batch = current(module)
    if not isinstance(batch, MixedBatch) or not batch.names or module.disable_adapters:
        return None  # PEFT's modules fail on a batch without samples, and on names while adapters are disabled
    names = [name if name in module._adapters else BASE for name in batch.names_for(module)]
    return args, kwargs | {"adapter_names": names}


def use_copies(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook for the same modules. Without it, they ignore the names if the active adapter has no copy."""
    if "adapter_names" not in kwargs or module._adapters.issuperset(module.active_adapters):
        return output
    return module._mixed_batch_forward(*args, **kwargs)


_lock = threading.Lock()


def tell(module: nn.Module) -> None:
    """From now on, pass the names of each running call to one of PEFT's own modules."""
    with _lock:
        if pass_names_on not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(pass_names_on, with_kwargs=True)
            module.register_forward_hook(use_copies, with_kwargs=True)


def check_names(names: Sequence[str], args: Any, kwargs: Any, layer: nn.Module) -> None:
    """Raise ValueError unless there is one name for each row of the first tensor that a layer takes."""
    length = next((len(leaf) for leaf in tree_leaves((args, kwargs)) if _is_batched(leaf)), 0)
    if len(names) != length:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {length} respectively, in a {type(layer).__qualname__}. "
            "The batch has to be the first axis of the layer's first tensor"
        )


def run_mixed(
    layers: Collection[nn.Module],
    adapters: Collection[str],
    names: Sequence[str],
    run: Callable[[Any, Any], Any],
    args: Any,
    kwargs: Any,
    in_one_pass: bool,
) -> Any:
    """A forward pass in which every sample sees the update of its own adapter.

    If the base layer's contractions keep the samples apart, there is one pass for all samples. Otherwise there is one
    pass for each adapter, with its samples.

    Args:
        layers: the LoTRALayers around the KAN layer.
        adapters: the adapters of these layers.
        names: a name for each sample.
        run: the pass, a function of args and kwargs.
        in_one_pass: whether to try one pass for all samples.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name if name in adapters else BASE, []).append(row)
    rows = rows or {BASE: []}  # the batch has no samples
    if len(rows) > 1 and in_one_pass:
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if _is_batched(leaf))
        places = [list(rows).index(name if name in rows else BASE) for name in names]
        owners = torch.tensor(places, device=device)[:, None]
        try:
            with entered(Shares(layers, {name: owners == k for k, name in enumerate(rows)})):
                return run(args, kwargs)
        except SampleAxisUnknown:
            pass
    results = []
    for name, own in rows.items():
        by_sample: dict[str, torch.Tensor] = {}
        for layer in layers:
            by_sample |= families.per_sample([name], layer)
        if by_sample:
            raise ValueError(
                f"`adapter_names` has the family {name!r} with a task for each sample, in a layer whose samples "
                "cannot be told apart: call the model once for each task, or make an adapter of each by `adapter_at`"
            )
        with entered(Shares(layers, {name: None})):
            results.append(run(*_batch_rows((args, kwargs), own, len(names))))
    return _joined_batch(results, list(rows.values()))


def run_at_each(
    weights: Mapping[str, torch.Tensor],
    run: Callable[[Any, Any], Any],
    args: Any,
    kwargs: Any,
    layer: Any,
) -> Any:
    """A pass in which every sample has its own task, as one pass for each distinct task, with its samples.

    If FSDP2 has sharded a module inside the layer, all processes make the same number of passes.

    Args:
        weights: c by family adapter, shape (batch, P).
        run: the pass, a function of args and kwargs.
        layer: the LoTRALayer.

    Raises:
        ValueError: if the batch is not the first axis of the layer's first tensor, if a task requires gradients, or
            if a process has fewer samples than another has tasks.
    """
    joint = torch.cat(list(weights.values()), dim=1)
    kind = type(layer.get_base_layer()).__qualname__
    length = next((len(leaf) for leaf in tree_leaves((args, kwargs)) if _is_batched(leaf)), 0)
    if length != len(joint) or joint.requires_grad:
        what = "gradients by the tasks cannot be computed" if length == len(joint) else f"{length} rows are passed"
        raise ValueError(
            f"a task for each of {len(joint)} samples: where a {kind} uses its coefficients, samples cannot be told "
            f"apart, and {what}; call the model once for each task"
        )
    distinct, owner = torch.unique(joint.detach(), dim=0, return_inverse=True)
    rows = [(owner == k).nonzero()[:, 0].tolist() for k in range(len(distinct))]
    passes, shortest = largest([len(rows), -length], layer.base_layer)
    if passes > -shortest:
        raise ValueError(
            f"a task for each sample: with {passes} tasks in one process and a batch of {-shortest} in another, a "
            f"sharded {kind} cannot make equally many passes in both: give `fully_shard` the LoTRALayer, or use equal "
            "batches"
        )
    while len(rows) < passes:
        longest = max(rows, key=len)
        rows.append([longest.pop() for _ in range(len(longest) // 2)])
    results = []
    for own in rows:
        with families.entered({name: c[own[0]] for name, c in weights.items()}, set(layer.modules())):
            results.append(run(*_batch_rows((args, kwargs), own, length)))
    return _joined_batch(results, rows)


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _batch_rows(tree: Any, rows: Sequence[int], length: int) -> Any:
    """Nested arguments with x[rows] for every tensor x of `length` rows. Other values stay."""
    if len(rows) == length:
        return tree

    def taken(leaf: Any) -> Any:
        if not _is_batched(leaf) or len(leaf) != length:
            return leaf
        return leaf.index_select(0, torch.tensor(rows, device=leaf.device))

    return tree_map(taken, tree)


def _joined_batch(results: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """One result from several: y with y[rows[j]] = results[j], for every tensor in nested results.

    A layer may flatten leading axes into its rows. All samples then have the same number of rows.

    Raises:
        ValueError: if the results cannot be joined row by row.
    """
    if len(results) == 1:
        return results[0]
    leaves, specs = zip(*map(tree_flatten, results), strict=True)
    order = torch.tensor([row for part in rows for row in part]).argsort()

    def joined(parts: Sequence[Any]) -> Any:
        if not any(isinstance(part, torch.Tensor) for part in parts):
            if all(part == parts[0] for part in parts):
                return parts[0]
        elif all(_is_batched(part) for part in parts):
            each = {divmod(len(part), len(own)) for part, own in zip(parts, rows, strict=True)}
            if len(each) == 1 and (size := each.pop())[1] == 0:
                whole = torch.cat(list(parts)).unflatten(0, (len(order), size[0]))
                return whole.index_select(0, order.to(whole.device)).flatten(0, 1)
        raise ValueError(
            "`adapter_names`: the layer returns values that do not belong to single samples; call the model once for "
            "each adapter, with `set_adapter`"
        )

    if any(spec != specs[0] for spec in specs):
        raise ValueError("`adapter_names`: the layer returns other structures for other samples")
    return tree_unflatten([joined(parts) for parts in zip(*leaves, strict=True)], specs[0])
