"""Calls of a model in several threads, and changes of its adapters beside them."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _Exclusion:
    """Calls run side by side. A change waits for the calls before it, and the calls after it wait for it.

    What a thread does within a call or a change of its own does not wait.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: Counter[int] = Counter()  # by thread
        self._changing: Counter[int] = Counter()
        self._queue: list[list[bool]] = []  # what waits, in order, each with whether it is a change

    @contextmanager
    def call(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._condition:
            if me not in self._calls and me not in self._changing:
                self._wait(False, lambda ahead: not self._changing and [True] not in ahead)
            self._calls[me] += 1
        try:
            yield
        finally:
            self._end(self._calls, me)

    @contextmanager
    def change(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._condition:
            if me in self._calls:  # two such threads would wait for each other's calls
                self._condition.wait_for(lambda: not self._changing.keys() - {me})
            elif me not in self._changing:
                self._wait(True, lambda ahead: not self._changing and not self._calls and not ahead)
            self._changing[me] += 1
        try:
            yield
        finally:
            self._end(self._changing, me)

    def _wait(self, is_change: bool, ready: Callable[[list[list[bool]]], bool]) -> None:
        """Wait until `ready`, which is given what waits for longer."""
        if not self._queue and ready([]):
            return
        own = [is_change]
        self._queue.append(own)
        try:
            self._condition.wait_for(lambda: ready([*takewhile(lambda waiting: waiting is not own, self._queue)]))
        finally:
            self._queue[:] = [waiting for waiting in self._queue if waiting is not own]
            self._condition.notify_all()

    def _end(self, running: Counter[int], thread: int) -> None:
        with self._condition:
            running[thread] -= 1
            if not running[thread]:
                del running[thread]
            self._condition.notify_all()


_made: WeakKeyDictionary[nn.Module, _Exclusion] = WeakKeyDictionary()
_making = threading.Lock()
if hasattr(os, "register_at_fork"):  # the calls of other threads never end in a fork
    os.register_at_fork(after_in_child=_made.clear)


def _of(model: nn.Module) -> _Exclusion:
    with _making:
        return _made.setdefault(model, _Exclusion())


def calling(model: nn.Module) -> AbstractContextManager[None]:
    """While this is entered, no other thread changes the adapters of `model`, the base model with them in it."""
    # A compiled pass takes no lock.
    return nullcontext() if torch.compiler.is_compiling() else _of(model).call()


def changing(model: nn.Module) -> AbstractContextManager[None]:
    """While this is entered, no other thread calls `model` or changes its adapters."""
    return _of(model).change()
