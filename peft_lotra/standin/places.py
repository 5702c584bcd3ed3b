"""What a layer finds in the places of its parameters, which depends on the running forward pass.

Python looks into the instance dictionary of a module before it asks nn.Module for a parameter of that name. All
threads see this dictionary. A stand-in there therefore has no values: its meaning is in the context of the running
code, until the pass ends. A plain tensor there is for one thread, and the other threads wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..calls.context import Context, left, variable

Place = tuple[int, str]  # the id of a module, and the name of its parameter

_lock = threading.RLock()
_changed = threading.Condition(_lock)
_waiting = [0]  # the number of threads that wait
_passes: dict[Place, int] = {}  # how many passes run, in all threads
_handles: set[Place] = set()  # the places whose attribute is a handle
_held: dict[Place, int] = {}  # the thread that has put a tensor there
_suspended: dict[Place, int] = {}  # how many of the passes wait until they may put a tensor there, or have put one


class Pass(NamedTuple):
    """A layer's pass in a thread, and what it has put at places: (owner, name, meaning, handle or None) for each."""

    places: Sequence[tuple[nn.Module, str, Any, Any]]
    thread: int


def running(owner: nn.Module, name: str) -> Any:
    """What the running forward pass has put at a place, as `enter` was given it.

    Raises:
        RuntimeError: if the running code is in no pass of the layer.
    """
    for one in reversed(variable.get().passes):
        for module, path, meant, _ in one.places:
            if module is owner and path == name:
                return meant
    raise RuntimeError(
        f"`{name}` of a {type(owner).__qualname__} is read in a thread that runs no forward pass of its adapted "
        "layer, while another thread runs one: call the model, not the layer inside the adapter"
    )


def enter(places: Sequence[tuple[nn.Module, str, Any, Any]]) -> tuple[Context, Context]:
    """Put meanings at places for the running code, until `leave` gets the result, contexts with and without them.

    Args:
        places: (owner, name, meaning, handle or None) for each place.
    """
    for owner, name, _, handle in places:
        place = id(owner), name
        with _lock:
            if place in _held:
                _wait(partial(_is_free, place, threading.get_ident()))
            _passes[place] = _passes.get(place, 0) + 1
            if handle is not None:
                owner.__dict__[name] = handle
                _handles.add(place)
    before = variable.get()
    own = Context(before.entries, (*before.passes, Pass(places, threading.get_ident())), before.backward, before.known)
    variable.set(own)
    return own, before


def leave(own: Context, before: Context) -> None:
    places, assigned = own.passes[-1].places, False
    left(own, before, own.passes[-1:])
    for owner, name, _, _ in places:
        place = id(owner), name
        with _lock:
            _passes[place] -= 1
            if not _passes[place]:
                del _passes[place]
                if place in _handles:
                    _handles.remove(place)
                    assigned = owner.__dict__.pop(name, None) is None or assigned
            if _waiting[0]:
                _changed.notify_all()
    if assigned:
        raise _assigned(places)


def _is_free(place: Place, thread: int) -> bool:
    return _held.get(place, thread) == thread


def _suspend(place: Place, passes: int) -> None:
    """Count suspended passes of this thread. Others do not wait for their end, or two could wait for each other."""
    if passes:
        _suspended[place] = _suspended.get(place, 0) + passes
        if not _suspended[place]:
            del _suspended[place]
        _changed.notify_all()


def _wait(free: Callable[[], bool]) -> None:
    """Release the lock until `free()` is true."""
    _waiting[0] += 1
    try:
        _changed.wait_for(free)
    finally:
        _waiting[0] -= 1


def _assigned(places: Sequence[tuple[nn.Module, str, Any, Any]]) -> RuntimeError:
    owner, names = places[0][0], " or ".join([f"`{name}`" for _, name, _, _ in places])
    return RuntimeError(f"{type(owner).__qualname__} assigned its coefficients {names} in forward")


@contextmanager
def held(owner: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[None]:
    """While this is entered, `tensor` is at a place, and no other thread runs a pass of the layer."""
    place, thread = (id(owner), name), threading.get_ident()
    passes = [one for one in variable.get().passes if one.thread == thread]
    own = sum([module is owner and path == name for one in passes for module, path, *_ in one.places])
    with _lock:
        _suspend(place, own)
        try:
            _wait(lambda: _is_free(place, thread) and _passes.get(place, 0) <= _suspended.get(place, 0))
        except BaseException:
            _suspend(place, -own)
            raise
        outer, before = _held.get(place), owner.__dict__.get(name)
        _held[place] = thread
        owner.__dict__[name] = tensor
    try:
        yield
    finally:
        with _lock:
            _suspend(place, -own)
            if outer is None:
                del _held[place]
            assigned = owner.__dict__.pop(name, None) is not tensor
            if before is not None:
                owner.__dict__[name] = before
            _changed.notify_all()
        if assigned:
            raise _assigned([(owner, name, None, None)])
