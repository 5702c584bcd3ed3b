"""Layers whose tensors lie elsewhere between forward passes: on the CPU, on disk, or in other processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import named_module_tensors
from torch import nn

from .sharded import FSDPModule, gathered_for_writing


def tensors_in_place(layer: nn.Module) -> AbstractContextManager[None]:
    """While this is entered, the tensors of `layer` and its submodules are in place, and its hooks leave them there.

    Left alone, the hooks of accelerate and FSDP2 would fetch them when a module's forward begins. By then a stand-in
    is in the place of a parameter. They would never fetch an adapter's tensors, whose containers have no forward.

    Raises:
        RuntimeError: if accelerate has offloaded a trainable parameter, and the layer is trained.
    """
    hooked, modules = False, [layer]
    for module in modules:  # `modules()` would take a tenth of a small layer's pass
        for child in module._modules.values():
            if child is not None:
                modules.append(child)
        hooked = hooked or "_hf_hook" in module.__dict__
        if isinstance(module, FSDPModule) and module is not layer:
            module.unshard()
    return _fetched(layer) if hooked else nullcontext()


@contextmanager
def _fetched(layer: nn.Module) -> Iterator[None]:
    hooks = _offloading_hooks(layer.modules())
    for module, hook in hooks if layer.training and torch.is_grad_enabled() else ():
        if trainable := [name for name, tensor in _tensors(module, hook) if tensor.requires_grad]:
            raise RuntimeError(
                f"accelerate has offloaded the trainable {trainable} of a {type(module).__name__}: gradients would go "
                "to copies that exist during one forward pass, and no optimizer sees them. Offload the base before it "
                "gets adapters, or call `eval()`"
            )
    with ExitStack() as stack:
        for module, hook in hooks:
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, torch.empty(0))
            stack.callback(setattr, hook, "offload", True)
            hook.offload = False
        yield


@contextmanager
def writable_tensors(layer: nn.Module, owners: Sequence[nn.Module] = ()) -> Iterator[None]:
    """While this is entered, the tensors of `layer` are in place, and values written to those of `owners` are kept.

    Tensors of `owners` that were on disk are in host memory afterwards.
    """
    # PEFT has a function for this, too, but it loses values that are written to submodules of the base layer.
    hooks = _offloading_hooks(layer.modules())
    away = [(module, hook) for module, hook in hooks if any(tensor.is_meta for _, tensor in _tensors(module, hook))]
    try:
        for module, hook in away:
            hook.pre_forward(module)
        with gathered_for_writing(layer):
            yield
        for module, hook in hooks:
            if module in owners:
                hook.weights_map = {name: tensor.detach().cpu() for name, tensor in _tensors(module, hook)}
    finally:
        for module, hook in away:
            hook.post_forward(module, torch.empty(0))


def _offloading_hooks(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
    found = []
    for module in modules:
        outer = module.__dict__.get("_hf_hook")
        found += [(module, hook) for hook in getattr(outer, "hooks", [outer]) if getattr(hook, "offload", False)]
    return found


def _tensors(module: nn.Module, hook: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return named_module_tensors(module, hook.offload_buffers, hook.place_submodules, remove_non_persistent=True)
