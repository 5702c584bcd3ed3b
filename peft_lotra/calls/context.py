"""The context of a running call: adapters' names, tasks, the axis of samples, and layers' passes that are under way.

It is one immutable value in a ContextVar, so threads and tasks of asyncio have contexts of their own, and take a copy
along where Python gives them one (`asyncio.to_thread`, `create_task`). To leave a context removes its own entry and
nothing else, so the order does not matter. A generator that yields inside of a context shows it to its caller.

autograd may repeat a pass in a backward pass (activation checkpointing). What is around the backward pass is not the
context of the repeated pass. torch's checkpoints without reentrant autograd are told it; elsewhere it is unknown.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

BASE = "__base__"  # this name stands for no adapter


@dataclass(eq=False)
class Tasks:
    """Tasks of families: c by adapter, shape (P,) or (batch, P), for calls of some layers.

    Attributes:
        weights: c, or a function that returns it, because codes of tasks may change from pass to pass.
        axis: the axis of a layer's first tensor on which the samples are.
        configs: of the model's adapters as they are now, by name.
        families: what they said of the families when this was made. c is for adapters of these families.
        owner: the thread, and the task of asyncio, that has entered this.
        left: whether it is over. A copy of the context may outlive it, but its owner's context may not.
    """

    layers: Collection[nn.Module]
    weights: Mapping[str, torch.Tensor | Callable[[], torch.Tensor]]
    axis: int
    configs: Mapping[str, Any]
    families: Mapping[str, Any]
    owner: Any = None
    left: bool = False

    def is_for(self, adapter: str) -> bool:
        """Whether the adapter of this name is still of the family of which c is."""
        config = self.configs.get(adapter)
        return config is not None and self.families[adapter] == fields_of_family(config)


def fields_of_family(config: Any) -> tuple[Any, ...]:
    """The fields of a config on which c depends."""
    return config.family, config.family_degree, config.family_code


@dataclass(frozen=True, eq=False)
class Batch:
    """The adapters of a call's samples.

    Attributes:
        names: a name for each sample; None: the call has no such names.
        modules: those that the call is for; None: all.
        axis: as in `Tasks`.
        in_encoder: the names that the modules of `encoder` see. Beam search repeats samples only after the encoder.
    """

    names: tuple[str, ...] | None = None
    modules: Collection[nn.Module] | None = None
    axis: int = 0
    in_encoder: tuple[str, ...] = ()
    encoder: Collection[nn.Module] = ()

    def names_for(self, module: nn.Module) -> tuple[str, ...] | None:
        return self.in_encoder if module in self.encoder else self.names


class Samples(NamedTuple):
    """Where the samples are in a layer's first tensor: its axis, and all sizes but the last, which is of features."""

    axis: int
    sizes: tuple[int, ...]
    number: int  # of samples


@dataclass(frozen=True, eq=False)
class Shares:
    """Which samples see which update, in a pass of the LoTRALayers in one module.

    Attributes:
        rows: the samples of each adapter, or None for all of them; None: all samples see the active adapters.
        weights: c by family, shape (P,) or (batch, P).
        samples: where the samples are; None if they are all alike in this pass.
    """

    layers: Collection[nn.Module]
    rows: Mapping[str, tuple[int, ...] | None] | None
    weights: Mapping[str, torch.Tensor]
    samples: Samples | None = None


Entry = Tasks | Batch | Shares


class Context(NamedTuple):
    """What a pass finds around it.

    Attributes:
        entries: the inner ones come last.
        passes: what passes of layers, the inner ones last, have put at places (`standin/places.py`).
        backward: the backward pass of autograd in which this was entered; -1: none.
        known: whether these are all entries. Those around a pass that a backward pass repeats may be unknown.
    """

    entries: tuple[Entry, ...] = ()
    passes: tuple[Any, ...] = ()
    backward: int = -1
    known: bool = True

    def batch(self, module: nn.Module) -> Batch | Shares | None:
        """The names of the running call for a module, or the shares of the pass that it is in."""
        for entry in reversed(self.entries):
            if isinstance(entry, Shares):
                if module in entry.layers:
                    return entry
            elif isinstance(entry, Batch) and (entry.modules is None or module in entry.modules):
                return None if entry.names is None else entry
        return None

    def task(self, adapter: str, layer: nn.Module) -> tuple[torch.Tensor, int] | None:
        """c for an adapter of a layer, shape (P,) or (batch, P), and the axis of the samples; None: no task."""
        in_pass = True
        for entry in reversed(self.entries):
            if isinstance(entry, Batch):
                in_pass = in_pass and not (entry.modules is None or layer in entry.modules)
            elif adapter in entry.weights and layer in entry.layers:
                if isinstance(entry, Shares):
                    if in_pass:
                        return entry.weights[adapter], 0
                elif entry.is_for(adapter):
                    c = entry.weights[adapter]
                    return c if isinstance(c, torch.Tensor) else c(), entry.axis
        return None


_EMPTY = Context()
variable: ContextVar[Context] = ContextVar("peft_lotra", default=_EMPTY)


class _Traced(threading.local):
    """The context that a compiled graph has entered. torch.compile traces no ContextVar, but attributes."""

    def __init__(self) -> None:  # an instance attribute, because torch.compile guards on __dict__
        self.context: Context | None = None


class _Seen:
    """`_seen.context` is the context of eager code, in the form of an attribute, on which torch.compile can guard."""

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {"context": _now()}  # torch.compile looks here while it traces,

    def __getattr__(self, name: str) -> Any:
        if name != "context":
            raise AttributeError(name)
        return _now()  # and its guards here


_traced, _seen = _Traced(), _Seen()
_backward = torch._C._current_graph_task_id
# Before torch 2.8, nobody can ask for the hooks of saved tensors, by which checkpoints are found.
hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def now() -> Context:
    """The context of the running code."""
    if torch.compiler.is_dynamo_compiling():
        return _traced.context or _seen.context  # type: ignore[no-any-return]
    return _now()


def _now() -> Context:  # guards call it, so it is not the function that torch.compile may compile and guard
    context, backward = _traced.context or variable.get(), _backward()
    if context.entries:
        context = _traced.context or _present()
    if backward not in (-1, context.backward):
        return Context((), context.passes, backward, False)
    if hooks(True) is not None:
        tell_checkpoints(context)
    return context


def _present() -> Context:
    """The value of `variable` without tasks that their owner has left elsewhere, in a copy of the context."""
    context = variable.get()
    if any([isinstance(entry, Tasks) and entry.left for entry in context.entries]):
        here = _owner()
        entries = [e for e in context.entries if not (isinstance(e, Tasks) and e.left and e.owner == here)]
        if len(entries) < len(context.entries):
            context = context._replace(entries=tuple(entries))
            variable.set(context)
    return context


@contextmanager
def entered(*entries: Entry) -> Iterator[None]:
    """While this is entered, the calls of the running code have these entries in their context, the last innermost."""
    if not entries:
        yield
        return
    own = now()
    if torch.compiler.is_dynamo_compiling() or _traced.context is not None:
        # Without the number of the backward pass, on which the graph would depend.
        outer, _traced.context = _traced.context, Context((*own.entries, *entries), known=own.known)
        try:
            yield
        finally:
            _traced.context = outer
        return
    own = own._replace(entries=(*own.entries, *entries))
    tasks = [entry for entry in entries if isinstance(entry, Tasks)]
    for entry in tasks:
        entry.owner, entry.left = _owner(), False
    before = variable.get()
    variable.set(own)
    try:
        yield
    finally:
        for entry in tasks:
            entry.left = True  # if this is a copy of the context, another one has the entry, too
        left(own, before, entries)


def left(own: Context, before: Context, added: Sequence[Any]) -> None:
    """Remove the entries, or passes, that were added to `before` to make `own`."""
    present = variable.get()
    if present is own:
        variable.set(before)
    else:
        entries, passes = (tuple([e for e in held if not any(e is a for a in added)]) for held in present[:2])
        variable.set(Context(entries, passes, present.backward, present.known))


@torch.compiler.disable
def _owner() -> Any:
    """The thread, and the task of asyncio, that is running."""
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return threading.get_ident(), None


@torch.compiler.disable
def tell_checkpoints(context: Context) -> None:
    """Let the checkpoints in which the code is running repeat it at this context, whenever they do.

    A checkpoint catches the tensors that autograd saves by hooks, which hold its frame. The first adapted layer, or
    the first `entered`, in a checkpoint comes here before anything changes the context. If a layer's own forward makes
    the checkpoint, the first operation with the coefficients comes here, and the pass is then a part of the context.
    """
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    # Copies of tasks, which are not over when the tasks are left.
    entries = tuple([replace(entry) if isinstance(entry, Tasks) else entry for entry in context.entries])
    outer = []
    try:
        while (held_by := hooks(True)) is not None:
            pack: Any = held_by[0]
            if getattr(pack, "__qualname__", "").startswith("_recomputation_hook"):
                break  # what is around it belongs to the code that called the backward pass
            held = getattr(getattr(pack, "__code__", None), "co_freevars", ())
            frame = pack.__closure__[held.index("frame")].cell_contents if "frame" in held else None
            recompute = getattr(frame, "recompute_fn", None)
            if getattr(recompute, "func", None) is _repeat:
                break  # it has been told, and so have those around it
            if frame is not None and recompute is not None:
                frame.recompute_fn = partial(_repeat, context._replace(entries=entries), recompute)
            autograd._pop_saved_tensors_default_hooks()
            outer.append(held_by)
    finally:
        for held_by in reversed(outer):
            autograd._push_saved_tensors_default_hooks(*held_by)


def _repeat(context: Context, function: Any, *args: Any) -> Any:
    before = variable.get()
    variable.set(Context(context.entries, before.passes, _backward(), context.known))
    try:
        with ExitStack() as stack:
            for one in context.passes:  # a layer's own code has this checkpoint in it
                stack.enter_context(one.again())
            return function(*args)
    finally:
        variable.set(before)
