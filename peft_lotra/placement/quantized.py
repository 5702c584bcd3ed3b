"""Linear layers with a quantized weight, whose numbers only the layer's own forward understands.

Such a layer computes its output as it is, and the adapter's part is added: y + x Δᵀ. So torchao's tensors, and the
linear layers of bitsandbytes and of others that keep int8, uint8 or fp8, are never dequantized here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = torch.Tensor.dequantize


def has_quantized_weight(layer: nn.Module) -> bool:
    """Whether this is a linear layer that computes with a quantized weight."""
    weight = layer._parameters.get("weight")
    if weight is None or shape_of_linear(layer) is None:
        return False
    # nn.Linear itself does not compute with plain tensors in dtypes of one byte.
    in_bytes = weight.dtype.itemsize == 1 and type(layer).forward is not nn.Linear.forward
    return in_bytes or type(weight).dequantize is not PLAIN


def shape_of_linear(layer: nn.Module) -> torch.Size | None:
    """(m, n) of a linear layer, whatever the shape of its stored weight; None for other layers."""
    sizes: Any = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return torch.Size(sizes) if all(type(size) is int for size in sizes) else None


def refuse_dense(path: str, owner: nn.Module) -> RuntimeError:
    """The error for uses of a quantized weight's values."""
    return RuntimeError(
        f"`{path}` of a {type(owner).__qualname__} is quantized ({type(owner.weight).__name__}), "
        "and with an update merged into it, it would have to be rounded again: keep the adapter beside it, or load "
        "the base without quantization to merge or to read A + Δ"
    )
