"""Lets several processes, each with a part of the data, make one fit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn

_T = TypeVar("_T")


class Processes:
    """Sums over processes, and decisions that are the same in all processes. With one process, nothing is sent.

    `across` is the argument `across_processes` of `fit_gauss_newton`.
    """

    def __init__(self, across: bool | None) -> None:
        if across is not None and not isinstance(across, bool):
            raise TypeError(f"`across_processes` should be True, False or None but the value passed is {across!r}")
        started = distributed.is_available() and distributed.is_initialized()
        count = distributed.get_world_size() if started else 1
        if across is None and count > 1:
            raise ValueError(
                f"`across_processes` should be given where torch.distributed has {count} processes: True if `data` is "
                "this process's part of the data and all processes make one fit; False if this process fits by itself"
            )
        self.several = bool(across) and count > 1
        self.count = count if self.several else 1
        self.is_first = not self.several or distributed.get_rank() == 0
        self.interrupted = False

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Σ over all processes, in place."""
        if self.several:
            distributed.all_reduce(tensor)
        return tensor

    def totals(self, *numbers: float) -> list[float]:
        """Σ over all processes, for each number."""
        if not self.several:
            return list(numbers)
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=_device())).tolist()

    def any(self, *conditions: bool) -> list[bool]:
        """Whether each condition holds in some process."""
        return [total > 0 for total in self.totals(*map(float, conditions))]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values = [value] * self.count
        if self.several:
            distributed.all_gather_object(values, value)
        return values

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's tensor, written into `tensor`. Other machines may round differently."""
        if self.several:
            distributed.broadcast(tensor, src=0)
        return tensor

    def agreed(self, function: Callable[..., _T], *args: Any) -> _T:
        """`function(*args)`. If it fails in one process, all raise, so that none waits for another forever."""
        if not self.several:
            return function(*args)
        try:
            result, error = [function(*args)], None
        except (Exception, KeyboardInterrupt) as raised:
            result, error = [], raised
        if any(self.any(error is not None)):
            told = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank = next(rank for rank, text in enumerate(told) if text is not None)
            raise RuntimeError(f"process {rank} failed, so that all of them end: {told[rank]}")
        return result[0]

    def check_same(self, model: nn.Module) -> None:
        """Raise ValueError unless all processes have the same parameters."""
        if not self.several:
            return
        wide = (p.detach().double() for p in model.parameters())
        mine = torch.stack([value.to(_device()) for p in wide for value in (p.sum(), p.square().sum())])
        if any(self.any(not torch.equal(mine, self.of_first(mine.clone())))):
            raise ValueError(
                "`model` should have the same parameters in all processes, but they differ: set the same seed before "
                "the model is made, or load the same state dict in all processes"
            )

    @contextmanager
    def interrupts_kept(self) -> Iterator[None]:
        """Ctrl-C sets `interrupted`, so that all processes can end together. A second Ctrl-C raises at once."""
        if not self.several or threading.current_thread() is not threading.main_thread():
            yield
            return

        def keep(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, keep)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _device() -> torch.device:
    return torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
