"""Parameters of which every process holds a part: torch's FSDP2 and DeepSpeed's ZeRO-3."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor
else:

    class FSDPModule:
        """None exists."""

    DTensor, _module_state_mapping = FSDPModule, {}


PATIENCE = 30.0  # seconds after which a process that gathers alone says so


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape with the parts of all processes. A ZeRO-3 parameter that is not gathered has an empty `shape`."""
    return getattr(tensor, "ds_shape", tensor.shape)


def any_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether this process has, at this moment, only a part of some of these tensors."""
    return any(isinstance(tensor, DTensor) or is_released(tensor) for tensor in tensors)


@contextmanager
def _telling_who_waits() -> Iterator[None]:
    """Warn after a while. A process that gathers alone would else wait in silence until the group's time-out."""
    text = (
        f"process {dist.get_rank()} has waited {PATIENCE:.0f} s for the others to gather coefficients or factors: all "
        "processes have to call what reads a sharded model together (`merge_adapter`, `merge_and_unload`, "
        "`get_delta_weight`, `adapter_at`, `save_task`, …)"
    )
    timer = threading.Timer(PATIENCE, warnings.warn, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_released(tensor: Any) -> bool:
    """Whether ZeRO-3 keeps a part of the tensor in each process at this moment."""
    return not torch.compiler.is_compiling() and hasattr(tensor, "ds_shape") and tensor.numel() != tensor.ds_numel


def check_not_sharded(module: nn.Module, what: str, instead: str) -> None:
    """Raise ValueError, saying what to do `instead`, if the module is sharded, even if it is gathered now."""
    parameters = list(module.parameters())
    if fsdp_modules(module) or any_sharded(parameters) or any(hasattr(p, "ds_shape") for p in parameters):
        raise ValueError(f"{what} is sharded (FSDP2 or ZeRO-3): {instead}")


def full_tensor(tensor: Any) -> torch.Tensor:
    """The tensor with the values of all processes. All processes must call this.

    The gradient is the mean over the processes, as for any sharded parameter.

    Raises:
        RuntimeError: for a ZeRO-3 parameter outside of `deepspeed.zero.GatheredParameters`.
    """
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        with _telling_who_waits():
            gathered = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        if gathered.requires_grad:
            gathered.register_hook(lambda gradient: gradient / mesh.size())
        return gathered
    if is_released(tensor):
        raise RuntimeError(
            f"coefficients or factors of shape {tuple(tensor.ds_shape)} are read outside of forward, where ZeRO-3 "
            "keeps a part of them in each process: read them in the model's forward, or, if no gradients are needed, "
            "in `deepspeed.zero.GatheredParameters(layer.parameters())`"
        )
    return tensor


@torch.no_grad()
def write(tensor: torch.Tensor, values: torch.Tensor, rows: slice = slice(None)) -> None:
    """tensor[rows] ← values. If the tensor is sharded, `rows` are all rows, and this process's part is written."""
    if isinstance(tensor, DTensor) and not isinstance(values, DTensor):
        values = distribute_tensor(values.to(tensor), tensor.device_mesh, tensor.placements)
    (tensor.data if rows == slice(None) else tensor.data[rows]).copy_(values)


@torch.no_grad()
def checksum(tensor: Any) -> int:
    """Σ_i mix(bits(x_i) + i · φ) mod 2^64 of this process's part of a tensor. Any change of one entry changes it.

    φ and the one-to-one function `mix` are those of splitmix64. In a sum of the bits themselves, changes of upper bits
    alone, as of signs or by a factor of 2, would cancel.
    """
    flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.long, device=bits.device)
    for k, block in enumerate(bits.split(2**16)):
        places = torch.arange(k * 2**16, k * 2**16 + len(block), device=bits.device)
        mixed = places * -0x61C8864680B583EB + block
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            mixed ^= (mixed >> shift) & (2 ** (64 - shift) - 1)
            mixed *= factor
        total += mixed.sum()
    return int(total)


@contextmanager
def gathered_for_writing(layer: nn.Module) -> Iterator[None]:
    """While this is entered, values written to the layer's parameters are kept. All processes must write the same.

    After a forward pass, FSDP2 leaves the gathered copies of its root in place. Values written to them would be lost.
    """
    for module in fsdp_modules(layer):
        module.reshard()
    partitioned = [parameter for parameter in layer.parameters() if hasattr(parameter, "ds_shape")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


_meshes: WeakKeyDictionary[nn.Module, tuple[int, list[Any]]] = WeakKeyDictionary()  # with the number of groups


def gathers_inside(module: nn.Module) -> list[tuple[Any, str]]:
    """The groups of processes that hold parts of `module`, and the kind of their devices: where FSDP2 shards something
    in it as a group of its own, and with ZeRO-3.

    A pass of the module gathers these parts, so all of these processes have to make equally many passes.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    for parameter in module.parameters():
        if hasattr(parameter, "ds_process_group"):
            return [(parameter.ds_process_group, parameter.device.type)]
    groups: list[Any] = [inner for inner in module.modules() if isinstance(inner, FSDPModule)]
    groups = [inner for inner in groups if not isinstance(inner, nn.ParameterDict)]  # has no forward
    if groups and _meshes.get(module, (0, []))[0] != len(groups):
        # torch.func's levels hide which tensors are parts.
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            # During a pass, parameters are whole. `state_dict` puts the parts back.
            tensors = [tensor for group in groups for tensor in group.state_dict().values()]
        meshes = dict.fromkeys([tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)])
        every = [(mesh.get_group(dim), mesh.device_type) for mesh in meshes for dim in range(mesh.ndim)]
        _meshes[module] = len(groups), every
    return _meshes[module][1] if groups else []


def reshard_inside(module: nn.Module) -> None:
    """After a pass that has failed: the next one has to gather the parts again, as it does in other processes."""
    for inner in module.modules() if dist.is_available() and dist.is_initialized() else ():
        if isinstance(inner, FSDPModule):
            inner.reshard()


def largest(numbers: Sequence[int], module: nn.Module) -> Sequence[int]:
    """The largest of each number over the processes of `gathers_inside`. All of these processes must call this."""
    # torch.func's levels would wrap the numbers.
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        for group, device in gathers_inside(module):
            found = torch.tensor(numbers, device=device)
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            numbers = found.tolist()
    return numbers


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The modules given to `fully_shard` that contain `module` or lie in it, in the order in which they were given."""
    # A module does not know the modules around it. torch keeps a list of those given to `fully_shard`.
    sharded = [other for other in list(_module_state_mapping) if isinstance(other, FSDPModule)]
    own = set(module.modules()) if sharded else set()
    return [other for other in sharded if other in own or any(inner is module for inner in other.modules())]
