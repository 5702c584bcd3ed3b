"""What a layer finds in the places of its parameters, which depends on the running forward pass.

Python looks into the instance dictionary of a module before it asks nn.Module for a parameter of that name. All
threads see this dictionary. A stand-in there therefore has no values: its meaning is in the context of the running
code, until the pass ends. A plain tensor there is for one thread, and the other threads wait.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..calls.context import Context, hooks, left, tell_checkpoints, variable


class _Place:
    """The place of one parameter, as all threads see it."""

    passes = 0  # how many passes run
    suspended = 0  # how many of them wait until their thread may put a tensor here, or has put one
    thread: int | None = None  # that has put a tensor here
    has_handle = False

    def is_free(self, thread: int) -> bool:
        return self.thread is None or self.thread == thread


_places: defaultdict[tuple[int, str], _Place] = defaultdict(_Place)  # by the id of a module, and a parameter's name
_changed = threading.Condition()  # guards all of this


class Pass(NamedTuple):
    """A layer's pass in a thread, and what it has put at places: (owner, name, meaning, handle or None) for each."""

    places: Sequence[tuple[nn.Module, str, Any, Any]]
    thread: int

    @contextmanager
    def again(self) -> Iterator[None]:
        """While this is entered, a part of the pass runs again."""
        own, before = enter(self.places)
        try:
            yield
        finally:
            leave(own, before)


def running(owner: nn.Module, name: str, optional: bool = False) -> Any:
    """What the running forward pass has put at a place, as `enter` was given it; None if `optional` and nothing.

    Raises:
        RuntimeError: if the running code is in no pass of the layer.
    """
    context = variable.get()
    if hooks(True) is not None:
        tell_checkpoints(context)  # those that the layer's own code makes
    for one in reversed(context.passes):
        for module, path, meant, _ in one.places:
            if module is owner and path == name:
                return meant
    if optional:
        return None
    raise RuntimeError(
        f"`{name}` of a {type(owner).__qualname__} is read in a thread that runs no forward pass of its adapted "
        "layer, while another thread runs one: call the model, not the layer inside the adapter"
    )


def enter(places: Sequence[tuple[nn.Module, str, Any, Any]]) -> tuple[Context, Context]:
    """Put meanings at places for the running code, until `leave` gets the result, contexts with and without them.

    Args:
        places: (owner, name, meaning, handle or None) for each place.
    """
    thread = threading.get_ident()
    with _changed:
        for owner, name, _, handle in places:
            key = id(owner), name
            if _places[key].thread is not None:
                _changed.wait_for(lambda key=key: _places[key].is_free(thread))  # type: ignore[misc]
            place = _places[key]
            place.passes += 1
            if handle is not None:
                owner.__dict__[name], place.has_handle = handle, True
    before = variable.get()
    own = Context(before.entries, (*before.passes, Pass(places, thread)), before.backward, before.known)
    variable.set(own)
    return own, before


def leave(own: Context, before: Context) -> None:
    """End what `enter` has begun. Raises RuntimeError if the layer has put something else at one of the places."""
    places, assigned = own.passes[-1].places, False
    left(own, before, own.passes[-1:])
    with _changed:
        for owner, name, _, _ in places:
            place = _places[id(owner), name]
            place.passes -= 1
            if not place.passes:
                if place.has_handle:
                    place.has_handle = False
                    assigned = owner.__dict__.pop(name, None) is None or assigned
                if place.thread is None and not place.suspended:
                    del _places[id(owner), name]
        _changed.notify_all()
    if assigned:
        raise _assigned(places)


def _assigned(places: Sequence[tuple[nn.Module, str, Any, Any]]) -> RuntimeError:
    owner, names = places[0][0], " or ".join([f"`{name}`" for _, name, _, _ in places])
    return RuntimeError(f"{type(owner).__qualname__} assigned its coefficients {names} in forward")


@contextmanager
def held(owner: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[None]:
    """While this is entered, `tensor` is at a place, and no other thread runs a pass of the layer."""
    key, thread = (id(owner), name), threading.get_ident()
    passes = [one for one in variable.get().passes if one.thread == thread]
    own = sum([module is owner and path == name for one in passes for module, path, *_ in one.places])
    with _changed:
        place = _places[key]
        # Other threads do not wait for passes of this one, or two could wait for each other.
        place.suspended += own
        _changed.notify_all()
        try:
            _changed.wait_for(lambda: _places[key].is_free(thread) and _places[key].passes <= _places[key].suspended)
            place = _places[key]
            outer, before = place.thread, owner.__dict__.get(name)
            place.thread, owner.__dict__[name] = thread, tensor
        except BaseException:
            place.suspended -= own
            raise
    try:
        yield
    finally:
        with _changed:
            place.suspended -= own
            place.thread = outer
            assigned = owner.__dict__.pop(name, None) is not tensor
            if before is not None:
                owner.__dict__[name] = before
            if outer is None and not (place.passes or place.suspended):
                del _places[key]
            _changed.notify_all()
    if assigned:
        raise _assigned([(owner, name, None, None)])
