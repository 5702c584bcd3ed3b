"""Measures the cost of a call: FLOPs, bytes saved for the backward pass, peak memory, wall time; and its growth."""

from __future__ import annotations

import math
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions. Elementwise operations are not counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """The bytes that autograd keeps from `forward` for the backward pass: whole storages, once each, no parameters."""
    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in parameter_storages)
    del kept
    return total


def peak_bytes(run: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes of tensors that are alive at one time during `run`, those of `held` included.

    An accelerator's allocator reports this. The CPU's allocator keeps no record, and the resident memory of the
    process shows the habits of the heap more than the needs of the step. On the CPU, every tensor that an operation
    returns is therefore followed until it is freed. This leaves out scratch memory inside kernels. torch.profiler's
    record of allocations gave the same peaks for every method here, but it prints to stderr at each use.
    """
    tracker = _LiveBytes()
    for tensor in held:
        tracker.see(tensor)
    backend = getattr(torch, device.type)
    if not hasattr(backend, "max_memory_allocated"):
        with tracker:
            run()
        return tracker.peak
    synchronize(device)
    backend.reset_peak_memory_stats(device)
    before = backend.memory_allocated(device)  # much of it belongs to the methods that are not running
    run()
    synchronize(device)
    return tracker.now + backend.max_memory_allocated(device) - before


class _LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return. Autograd calls its operations under it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class CountedKernels(TorchDispatchMode):
    """Counts the operations that compute: no views, no memory that is only set aside, no marks for a profiler."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        idle = ("empty", "detach", "_unsafe_view", "_record_function")
        self.number += not (func.is_view or func.overloadpacket.__name__.startswith(idle))
        return func(*args, **(kwargs or {}))


def device_name(device: str | torch.device = "cpu") -> str:
    """The card, or the processor as the system names it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor() or platform.machine()])[0]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(device: torch.device, *stages: Callable[[], object]) -> list[float]:
    """The seconds of each stage, run one after the other.

    On CUDA, events on the stream are timed, so the program may run ahead of the stream, as in training.
    """
    synchronize(device)
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
        synchronize(device)
        return [events[0].elapsed_time(event) / 1e3 for event in events[1:]]
    start, ends = time.perf_counter(), []
    for stage in stages:
        stage()
        synchronize(device)
        ends.append(time.perf_counter() - start)
    return ends


def steady(device: torch.device, *stages: Callable[[], object], seconds: float = 0.03) -> list[float]:
    """The mean of `clock` over several passes in a row: three, or as many as take the given seconds.

    A first pass is left out, because another method has filled the caches. In training that does not happen.
    """
    repeats = max(3, math.ceil(seconds / clock(device, *stages)[-1]))
    ends = clock(device, *(stages * repeats))
    lengths = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    return list(accumulate(sum(lengths[k :: len(stages)]) / repeats for k in range(len(stages))))


def interleaved(
    runs: Mapping[str, Callable[[], list[float]]], rounds: int = 5, seconds: float = 0, warm_up: int = 1
) -> dict[str, list[list[float]]]:
    """Each of `runs` once per round, in a new random order, so that a disturbance of the machine hits all alike.

    Args:
        rounds: the least number of rounds.
        seconds: rounds go on until this time has passed.
        warm_up: the number of rounds before, which are left out.
    """
    order, results = list(runs), {name: [] for name in runs}
    shuffle = random.Random(0).shuffle
    start, number = time.perf_counter(), 0
    while number < warm_up + rounds or time.perf_counter() - start < seconds:
        shuffle(order)
        for name in order:
            result = runs[name]()
            if number >= warm_up:
                results[name].append(result)
        number += 1
    return results


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The median over the rounds of seconds / reference."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """p of the least-squares fit cost ≈ c · sizeᵖ in logarithms; None if a cost is not positive."""
    if min(costs) <= 0:
        return None
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope
