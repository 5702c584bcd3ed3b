"""A device named "fake", whose memory is the CPU's: it refuses tensors of other devices, and records what is slow.

`register` makes it torch's PrivateUse1 backend, once for a process and before its first backward pass. Every operation
on its tensors comes to `_computed`, which runs it on CPU tensors that share their memory. Views, autograd, torch.func
and modules are torch's own, as for any accelerator. `recorded` lists what would stop a CUDA graph:

- synchronisations: the host waits for a value (`item`, `bool`, `tolist`, `equal`), for a shape that depends on values
  (`nonzero`, `unique`, indexing by a mask), or for a copy to the CPU;
- copies of CPU tensors to the device (`to`, `torch.tensor(..., device=)`, indexing by a list).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = "fake"
PACKAGE = str(Path(__file__).parents[1] / "peft_lotra")

# The host waits for the size of their results, or for their value.
WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim"}
WAITS |= {"unique_consecutive", "bincount", "linalg_eig", "_linalg_eigvals"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Beside pointwise operations, these take numbers on the CPU, as for CUDA.
TAKE_NUMBERS = BY_INDEX | {"fill", "fill_", "masked_fill", "masked_fill_", "where"}

_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_events: list[str] | None = None


def register() -> None:
    """Make the device, or skip the test that needs it."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"a device that is written in Python needs a newer torch than {torch.__version__}")
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_computed, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    # torch's own ones look for kernels of each device.
    for name in ("copy_", "_copy_from", "resize_", "convolution_overrideable", "convolution_backward_overrideable"):
        aten.impl(name, partial(_computed, getattr(torch.ops.aten, name).default), "PrivateUse1")
    # torch's own would ask for memory of the device, which has no allocator.
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: _storage(storage) if DEVICE in place else None
    )
    _Module.libraries = [everything, aten]


class _Module(backend_registration._DummyBackendModule):
    """`torch.fake`: its random numbers are those of the CPU."""

    device = nullcontext

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The synchronisations and copies inside, each with the line of the package that causes it."""
    global _events
    outer, _events = _events, []
    try:
        yield _events
    finally:
        _events = outer


def waits(events: list[str]) -> int:
    """The number of synchronisations among the events."""
    return sum(event.startswith("wait") for event in events)


def _record(kind: str, op: Any) -> None:
    if _events is not None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:]]
        _events.append(f"{kind}: {op} from {' '.join(where) or 'elsewhere'}")


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE


def _computed(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The kernel of every operation."""
    name = op._schema.name.partition("::")[2]
    if name == "set_":
        return op.redispatch(_ON_CPU, *args, **kwargs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    fake = [tensor for tensor in given if _is_fake(tensor)]
    others = [tensor for tensor in given if not _is_fake(tensor)]
    if name in ("copy_", "_copy_from"):
        target, source = args[:2] if name == "copy_" else args[1::-1]
        if not (_is_fake(target) and _is_fake(source)):
            _record("copy" if _is_fake(target) else "wait", name)
    else:
        by_index = [index for index in args[1] if index is not None] if name in BY_INDEX else []
        takes_numbers = torch.Tag.pointwise in op.tags or name in TAKE_NUMBERS
        for tensor in others:
            if any(tensor is index for index in by_index):
                _record("copy", name)
            elif fake and not (takes_numbers and tensor.dim() == 0 and tensor.device.type == "cpu"):
                devices = f"{DEVICE}:0 and {tensor.device}"
                raise RuntimeError(f"{op}: all tensors should be on the same device, but found {devices}")
        if name in WAITS or any(index.dtype in (torch.bool, torch.uint8) for index in by_index):
            _record("wait", name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            _record("wait", name)

    aliases = {id(tensor): _on_host(tensor) for tensor in fake}
    known = {aliases[id(tensor)].untyped_storage()._cdata: tensor.untyped_storage() for tensor in fake}
    args, kwargs = tree_map_only(torch.Tensor, lambda t: aliases.get(id(t), t), (args, kwargs))
    args, kwargs = tree_map_only(
        torch.device, lambda d: torch.device("cpu") if d.type == DEVICE else d, (args, kwargs)
    )
    if name == "convolution_overrideable":
        op = torch.ops.aten.convolution.default
    elif name == "convolution_backward_overrideable":
        op, args = torch.ops.aten.convolution_backward.default, (*args[:3], [len(args[2])], *args[3:])
    # torch shows a number that stands for a tensor as a number; another overload takes it.
    kinds = [str(argument.type) for argument in op._schema.arguments]
    numbers = [kind == "Tensor" and isinstance(v, int | float) for kind, v in zip(kinds, args, strict=False)]
    result = (op.overloadpacket if any(numbers) else op)(*args, **kwargs)

    for tensor in fake:  # an operation may have given an argument another shape or memory
        alias = aliases[id(tensor)]
        moved = alias.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        if moved or alias.shape != tensor.shape or alias.stride() != tensor.stride():
            _set(tensor, alias, {})
    originals = {id(alias): tensor for tensor in fake for alias in [aliases[id(tensor)]]}
    same = {id(tensor): tensor for tensor in others}

    def on_device(value: torch.Tensor) -> torch.Tensor:
        found = originals.get(id(value), same.get(id(value)))
        return _set(torch._C._acc.create_empty_tensor([0], value.dtype), value, known) if found is None else found

    return tree_map_only(torch.Tensor, on_device, result)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor with the same memory."""
    storage = tensor.untyped_storage()
    if not hasattr(storage, "memory"):
        _set(tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"), {})
        storage = tensor.untyped_storage()
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage.memory, *place)


def _set(tensor: torch.Tensor, like: torch.Tensor, known: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """`tensor` with the memory and the shape of a CPU tensor."""
    if like._is_zerotensor():
        like = torch.zeros(like.shape, dtype=like.dtype)
    memory = like.untyped_storage()
    storage = known.get(memory._cdata)
    place = _storage(memory) if storage is None else storage, like.storage_offset(), like.shape, like.stride()
    return torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_ON_CPU, tensor, *place)


def _storage(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """A storage of the device with this memory of the CPU."""
    construct = torch._C._construct_storage_from_data_pointer
    storage = construct(memory.data_ptr(), torch.device(DEVICE, 0), memory.nbytes())
    storage.memory = memory  # a storage keeps its attributes, so this memory lives as long as it is used
    return storage
