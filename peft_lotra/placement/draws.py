"""Checks that the parts into which FSDP2 has cut random factors are parts of one draw.

Every process draws all factors itself. Under FSDP2 it then keeps its own part of them. DDP and ZeRO-3 send the factors
of the first process to the others, and so does FSDP2 with accelerate's `cpu_ram_efficient_loading`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .sharded import DTensor, any_sharded, fsdp_modules

_NOTHING = (0, -(2**33))  # from a process that no longer holds its draw: below every (c, -c)


def row_sums(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A checksum of each row of each tensor, by which rows are recognised later; empty if this is the only process."""
    if dist.is_available() and dist.is_initialized():
        several = dist.get_world_size() > 1
    else:
        several = os.environ.get("WORLD_SIZE", "1") != "1"  # launchers set it
    return tuple(map(_row_sums, tensors)) if several else ()


def _row_sums(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.detach().float().flatten(1).view(torch.int32).long()
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(1)


@temporarily_clear_interpreter_stack()  # levels of torch.func hide which tensors are parts
@torch.no_grad()
def check_one_draw(layer: nn.Module, containers: Sequence[str], adapters: Sequence[str]) -> None:
    """Raise RuntimeError, in all processes, if FSDP2 has made a factor of parts that come from different draws.

    Call this in a forward pass that all processes make. It checks each adapter of the layer once. For each factor, it
    compares the processes whose rows are still as drawn, and not loaded, broadcast or trained since.

    Args:
        layer: a layer that holds the checksums of its draws in `_drawn`, by adapter.
        containers: the names of the layer's dicts of factors.
        adapters: the active adapters.
    """
    drawn: Any = layer._drawn
    around, unchecked = fsdp_modules(layer), [name for name in adapters if name in drawn]
    if not (around and unchecked):
        return
    # Parameters are whole during a pass, and a state dict puts the parts back.
    parts = [getattr(layer, name).state_dict() for name in containers]
    if not any_sharded([part for container in parts for part in container.values()]):
        return
    found: dict[Any, list[tuple[int, int]]] = {}  # checksums of draws, by the mesh of the processes
    for adapter in unchecked:
        own = [container[adapter] for container in parts if adapter in container]
        for part, rows in zip(own, drawn[adapter], strict=True):
            if isinstance(part, DTensor):
                found.setdefault(part.device_mesh, []).append(_checksum(part.to_local(), rows))
    for module in around:
        module.unshard()
    for mesh, sums in found.items():
        extremes = torch.tensor(sums, device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        largest, smallest = extremes[:, 0], -extremes[:, 1]
        if (largest > smallest).any():
            raise RuntimeError(
                "the factors of the adapters were drawn differently in the processes, and each process has kept a "
                "part of its own draw: call `accelerate.utils.set_seed` with the same seed in all processes before "
                "`get_peft_model`, or call `initialize_lotra_weights` before the model is sharded, or load a saved "
                "adapter"
            )
    for adapter in unchecked:
        del drawn[adapter]


def _checksum(part: torch.Tensor, rows: torch.Tensor) -> tuple[int, int]:
    """(c, -c) for a checksum c of the draw, if `part` consists of rows of it; else `_NOTHING`."""
    if rows.is_meta or part.numel() == 0 or not torch.isin(_row_sums(part), rows.to(part.device)).all():
        return _NOTHING
    checksum = zlib.crc32(rows.cpu().numpy().tobytes()) + 1
    return checksum, -checksum
