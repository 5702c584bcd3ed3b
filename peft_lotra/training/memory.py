"""Measures how much memory a computation takes for each sample, to find how many samples it may take at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The bytes that a chunk of samples may take, if a quarter of `max_memory` is not less. With four times as many, J of a
# wide KAN takes longer: the system takes large blocks back after each use, and clears them for the next one
# (`examples/benchmarks/gauss_newton_cost.py --parts chunks`).
_CHUNK_BYTES = 2**26
# Numbers of samples at which memory is measured.
_FEW, _MORE = 16, 64


class LiveBytes(TorchDispatchMode):
    """While this is entered, `peak` is the most bytes that tensors made by operations have occupied at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if _has_storage(leaf)):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def _has_storage(leaf: Any) -> bool:
    return type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout == torch.strided


class Chunks:
    """How many samples each computation takes at a time, measured once. The whole fit may take `max_memory` bytes."""

    def __init__(self, max_memory: int) -> None:
        self.budget = min(_CHUNK_BYTES, max_memory // 4)
        self._found: dict[str, tuple[int, int]] = {}

    @property
    def of_one(self) -> int:
        """The bytes that a chunk of one sample takes."""
        return max((taken for _, taken in self._found.values()), default=0)

    def rows(self, key: str, size: int, run: Callable[[int], object]) -> int:
        """How many of the `size` samples to take at a time, at least 1. `run(n)` does the computation for n."""
        if key not in self._found:
            few, more = (_peak(run, min(rows, size)) for rows in (_FEW, _MORE))
            each = max(1, (more - few) // (_MORE - _FEW) if size >= _MORE else more // size)
            constant = max(0, more - each * min(_MORE, size))
            self._found[key] = max(1, (self.budget - constant) // each), constant + each
        return self._found[key][0]


def _peak(run: Callable[[int], object], rows: int) -> int:
    with LiveBytes() as live:
        run(rows)
    return live.peak
