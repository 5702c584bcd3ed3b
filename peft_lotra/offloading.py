"""Layers whose tensors are elsewhere between their forward passes: on the CPU, on disk, in other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .sharding import FSDPModule


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """While this is entered, the tensors of `layer` and its submodules are in place, and its hooks leave them there.

    The hooks of accelerate and FSDP2 would fetch them when a module's forward begins, with a stand-in already where a
    parameter was, and never those of an adapter, whose containers have no forward.
    """
    fetched: list[tuple[nn.Module, Any]] = []
    try:
        for module in () if torch.compiler.is_compiling() else layer.modules():
            if isinstance(module, FSDPModule) and module is not layer:
                module.unshard()
            outer = module.__dict__.get("_hf_hook")
            for hook in getattr(outer, "hooks", [outer]):
                if getattr(hook, "offload", False):
                    hook.pre_forward(module)
                    hook.offload = False
                    fetched.append((module, hook))
        yield
    finally:
        for module, hook in fetched:
            hook.offload = True
            hook.post_forward(module, torch.empty(0))
