"""Tensors of known values, made once for each device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A tensor of these numbers. Nobody may write to it, because the next call with the same numbers gets it, too.

    A copy from the CPU waits for its turn, and cannot be in a CUDA graph. So the last tensors are kept.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # a mode may make tensors of its own
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept(values, device, dtype)


@lru_cache(maxsize=128)
def _kept(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False), torch._C._DisableFuncTorch():  # for calls of other kinds, too
        return torch.tensor(values, dtype=dtype, device=device)
