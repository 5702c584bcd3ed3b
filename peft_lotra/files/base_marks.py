"""What an adapter's file says of the coefficients that it was trained on, so that others are noticed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..coefficients.spec import tensor_at
from ..layers.lotra import adapted_tensors
from ..placement.sharded import any_sharded

Marks = dict[str, list[float]]

_SOME = 2**12  # entries that are taken of each tensor, or nearly so
_SAME = 0.03  # of the norm: the rounding of a base in bf16 or fp16 stays far below


def some_entries(tensor: torch.Tensor) -> torch.Tensor:
    """Up to some thousand entries at equal distances, on the CPU."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SOME)].cpu()


def _coefficients(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The coefficient tensors under an adapter; {} where they are not at hand as they were trained."""
    layers = adapted_tensors(model, adapter_name)
    tensors = {name: tensor_at(layer.get_base_layer(), layer.spec.parameter) for name, layer in layers.items()}
    if any(layer.merged for layer in layers.values()) or any_sharded(tensors.values()):
        return {}
    return {name: t for name, t in tensors.items() if t.is_floating_point() and not t.is_meta and t.numel()}


@torch.no_grad()
def marks_of(model: nn.Module, adapter_name: str) -> Marks:
    """‖a‖ and Σ_k ± a_k, for some entries a of each coefficient tensor under an adapter, with fixed signs."""
    found = {}
    for name, tensor in _coefficients(model, adapter_name).items():
        a = some_entries(tensor).double()
        signs = 1 - 2 * (torch.arange(len(a)) * 2654435761 // 2**16 % 2).double()
        found[name] = [float(f"{value:.4g}") for value in (a.norm(), a.dot(signs))]
    return found


def warn_of_another_base(model: nn.Module, adapter_name: str, marks: Mapping[str, Sequence[float]]) -> None:
    """Warn if coefficients under an adapter are not those of its `marks`."""
    other = []
    for name, own in (marks_of(model, adapter_name) if marks else {}).items():
        theirs = marks.get(name, own)
        if any(abs(a - b) > _SAME * max(own[0], theirs[0]) for a, b in zip(own, theirs, strict=True)):
            other.append(name)
    if other:
        warnings.warn(
            f"the adapter {adapter_name!r} was trained on other coefficients than the model has in {other}: load the "
            "base that it was trained on; after a fit of base and adapter together, the base that was saved then",
            stacklevel=3,
        )


def warn_of_a_trained_base(model: nn.Module, adapter_name: str) -> None:
    """Warn if coefficients under an adapter are trained as well, which no adapter's file holds."""
    if any(tensor.requires_grad for tensor in _coefficients(model, adapter_name).values()):
        warnings.warn(
            f"the base model's coefficients are trainable, too, and the file of the adapter {adapter_name!r} does not "
            "hold them: save them by `torch.save(base_state_dict(model), ...)`, and load them before the adapter",
            stacklevel=3,
        )
