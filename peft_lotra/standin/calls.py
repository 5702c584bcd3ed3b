"""What a layer finds in its parameters' places: it belongs to the running forward pass, in its thread.

Python looks into the instance dictionary of a module before it asks nn.Module for a parameter of the name. What is put
there is seen by all threads, so it says nothing itself: what it stands for is on a stack of each thread, and is gone
from there when the pass ends. A tensor that is put there as it is, is for one thread alone, and the others wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Place = tuple[int, str]  # the id of a module, and the name of its parameter


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.at: dict[Place, list[Any]] = {}


_stacks = _Stacks()
_changed = threading.Condition()
_passes: dict[Place, int] = {}  # how many passes run, in all threads
_handles: set[Place] = set()  # where the module's attribute is a handle
_held: dict[Place, int] = {}  # the thread that has a tensor there


def running(owner: nn.Module, name: str) -> Any:
    """What this thread's forward pass has at a place; None where it has the parameter itself.

    Raises:
        RuntimeError: if the thread runs none.
    """
    stack = _stacks.at.get((id(owner), name))
    if not stack:
        raise RuntimeError(
            f"`{name}` of a {type(owner).__qualname__} is read in a thread that runs no forward pass of its adapted "
            "layer, while another thread does: call the model, and not the layer inside the adapter"
        )
    return stack[-1]


class Occupied:
    """While this is entered, this thread has `meant` at a place; with a `handle`, the module's attribute is that."""

    def __init__(self, owner: nn.Module, name: str, meant: Any, handle: Any = None) -> None:
        self.owner, self.name, self.meant, self.handle = owner, name, meant, handle

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            if self.handle is not None:
                self.owner.__dict__[self.name] = self.handle
            return
        place = id(self.owner), self.name
        with _changed:
            while _held.get(place, threading.get_ident()) != threading.get_ident():
                _changed.wait()
            _passes[place] = _passes.get(place, 0) + 1
            if self.handle is not None:
                self.owner.__dict__[self.name] = self.handle
                _handles.add(place)
        _stacks.at.setdefault(place, []).append(self.meant)

    def __exit__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            if self.handle is not None:
                del self.owner.__dict__[self.name]
            return
        place = id(self.owner), self.name
        stack = _stacks.at[place]
        stack.pop()
        if not stack:
            del _stacks.at[place]
        with _changed:
            _passes[place] -= 1
            if _passes[place]:
                return
            del _passes[place]
            _changed.notify_all()
            assigned = place in _handles and self.owner.__dict__.pop(self.name, None) is None
            _handles.discard(place)
        if assigned:
            raise RuntimeError(f"{type(self.owner).__qualname__} assigned its coefficients `{self.name}` in forward")


@contextmanager
def held(owner: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[None]:
    """While this is entered, `tensor` is at a place, and no other thread runs a pass of the layer."""
    if torch.compiler.is_compiling():
        owner.__dict__[name] = tensor
        try:
            yield
        finally:
            del owner.__dict__[name]
        return
    place, thread = (id(owner), name), threading.get_ident()
    with _changed:
        own = len(_stacks.at.get(place, ()))
        while _held.get(place, thread) != thread or _passes.get(place, 0) > own:
            _changed.wait()
        outer, before = _held.get(place), owner.__dict__.get(name)
        _held[place] = thread
        owner.__dict__[name] = tensor
    try:
        yield
    finally:
        with _changed:
            if outer is None:
                del _held[place]
            assigned = owner.__dict__.pop(name, None) is not tensor
            if before is not None:
                owner.__dict__[name] = before
            _changed.notify_all()
        if assigned:
            raise RuntimeError(f"{type(owner).__qualname__} assigned its coefficients `{name}` in forward")
