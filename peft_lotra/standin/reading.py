"""Adapted coefficients that are read outside of a forward pass."""

from __future__ import annotations

from typing import Any

import torch

from .tensor import writes


class EffectiveCoefficients(torch.Tensor):
    """A + Σ updates, or ones for a scale that A contains, computed when they are read; the model does not see changes.

    Operations return plain tensors. Operations that write to it, also by `.data` or `.detach()`, raise RuntimeError.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = next(iter((*args, *kwargs.values())), None)
        written = [kwargs.get("out"), first if writes(func, {}) else None]
        if any(isinstance(tensor, cls) for tensor in written):
            raise RuntimeError(  # after a TypeError, `*=` would make a new tensor
                f"`{name}` would write to adapted coefficients, which are computed when they are read: write to the "
                "parameter in `base_layer`, or call `merge_and_unload()` first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        shared = isinstance(result, torch.Tensor) and isinstance(first, cls) and result.data_ptr() == first.data_ptr()
        return result.as_subclass(cls) if shared else result


def read_only(values: torch.Tensor) -> torch.Tensor:
    """The values as a tensor that refuses to be written to. While a graph is compiled, the plain values."""
    return values if torch.compiler.is_compiling() else values.as_subclass(EffectiveCoefficients)
