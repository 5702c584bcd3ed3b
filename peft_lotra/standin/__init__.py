"""What takes the place of a coefficient parameter while the layer's own forward runs.

The adapter does not know how a layer evaluates its basis. It puts a stand-in where the layer looks for its parameter,
and the layer runs its own code with it. The rest of the package only says which updates are active.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..coefficients.spec import CoefficientSpec, owner_of, tensor_at
from ..placement.sharded import full_shape, full_tensor, is_sharded
from . import einops_backend, products  # noqa: F401  (they make themselves known)
from .axes import Axes, expanded_scale
from .placeholder import Ones, PerformanceWarning, StandIn, warn
from .updates import SampleAxisUnknown, Update

__all__ = [
    "PerformanceWarning",
    "SampleAxisUnknown",
    "Update",
    "adapted",
    "adapted_coefficients",
    "give_tensors_to",
    "is_refusal",
    "replaced",
    "takes_tensors_only",
]


def adapted_coefficients(layer: nn.Module, spec: CoefficientSpec, updates: Iterable[Update]) -> torch.Tensor:
    """parameter · scale + Σ updates, in the layout of the parameter; whole where they are sharded."""
    coefficients = full_tensor(_stored(layer, spec.parameter))
    if spec.scale is not None:
        coefficients = coefficients * expanded_scale(spec, full_tensor(_stored(layer, spec.scale)))
    for update in updates:
        coefficients = coefficients + update.dense(spec, coefficients.shape).to(coefficients)
    return coefficients


def adapted(
    layer: nn.Module, spec: CoefficientSpec, updates: Sequence[Update], quiet: bool = False
) -> AbstractContextManager[None]:
    """While this is entered, `layer` finds A + Σ updates where its coefficient parameter is, and ones as its scale.

    Where it has to form that sum, there is a `PerformanceWarning`, unless `quiet`.
    """
    parameter = _stored(layer, spec.parameter)
    scale = None if spec.scale is None else _stored(layer, spec.scale)
    ones = None
    if takes_tensors_only(layer) or _is_any_sharded(parameter, scale, updates):
        value = adapted_coefficients(layer, spec, updates).contiguous()
        if scale is not None:
            ones = torch.ones(full_shape(scale), dtype=scale.dtype, device=scale.device)
    else:
        owner = None if quiet else type(layer).__qualname__
        value = StandIn(parameter, Axes.of(spec, parameter.shape), updates, owner)
        value.recorded &= not quiet  # a method may well look at coefficients without gradients
        if scale is not None:
            value.scale, ones = expanded_scale(spec, scale), Ones.like_tensor(scale)
    return _placed(layer, spec, value, ones)


def _is_any_sharded(parameter: torch.Tensor, scale: torch.Tensor | None, updates: Sequence[Update]) -> bool:
    """Whether this is no forward pass, in which sharded parameters are whole, but a method that was called alone."""
    factors = [factor for update in updates for factor in update.factors]
    return any(is_sharded(tensor) for tensor in (parameter, scale, *factors) if tensor is not None)


def replaced(layer: nn.Module, spec: CoefficientSpec, coefficients: torch.Tensor) -> AbstractContextManager[None]:
    """While this is entered, `layer` finds `coefficients` where its parameter is, and ones as its scale."""
    ones = None if spec.scale is None else torch.ones_like(_stored(layer, spec.scale))
    return _placed(layer, spec, coefficients, ones)


@contextmanager
def _placed(layer: nn.Module, spec: CoefficientSpec, value: Any, ones: Any) -> Iterator[None]:
    with _shadowed(layer, spec.parameter, value):
        if ones is None:
            yield
        else:
            with _shadowed(layer, spec.scale, ones):
                yield


# Classes of layers that give their coefficients to code that takes tensors only: TorchScript and
# `torch.autograd.Function` do not ask the stand-in. It takes a failed forward pass to find that out.
_tensors_only: set[type[nn.Module]] = set()


def takes_tensors_only(layer: nn.Module) -> bool:
    """Whether layers of this class get the dense A + Σ updates in place of a stand-in."""
    return type(layer) in _tensors_only


def is_refusal(error: Exception) -> bool:
    """Whether code that takes tensors only raised this about a stand-in."""
    return "StandIn" in str(error) and "Creating a Parameter" not in str(error)


def give_tensors_to(layer: nn.Module) -> None:
    """From now on, layers of this class get the dense A + Σ updates."""
    _tensors_only.add(type(layer))
    warn("TorchScript or torch.autograd.Function", type(layer).__qualname__)


def _stored(layer: nn.Module, path: str) -> torch.Tensor:
    """The tensor itself, also while another thread has a stand-in in front of it."""
    owner, name = owner_of(layer, path)
    # Not by `get`, which does not tell ZeRO-3 that the parameter is needed.
    tensor = owner._parameters[name] if name in owner._parameters else None
    return tensor_at(layer, path) if tensor is None else tensor


def _check_held(layer: nn.Module, path: str) -> None:
    """Refuse wrappers that pass attributes on from the module they wrap, as of FSDP1 and activation checkpointing.

    They would hide a stand-in from the layer, or run the layer again when the stand-in is gone.
    """
    module = layer
    *modules, tensor = path.split(".")
    for name in modules:
        _check_holds(module, name, path)
        module = getattr(module, name)
    _check_holds(module, tensor, path)


def _check_holds(module: nn.Module, name: str, path: str) -> None:
    held = name in module._parameters or name in module._modules or name in module._buffers or name in vars(module)
    if not held and not hasattr(type(module), name):
        raise RuntimeError(
            f"{type(module).__qualname__} stands between an adapter and the layer whose `{path}` it adapts: "
            "wrap the LoTRALayer instead, or a larger part of the model"
        )


_lock = threading.Lock()
_entered: dict[tuple[int, str], int] = {}  # how many forward passes, in all threads, use a shadow


@contextmanager
def _shadowed(layer: nn.Module, path: str, value: Any) -> Iterator[None]:
    # Python looks into the instance dictionary before it asks nn.Module for a parameter of the name. A stand-in holds
    # no state of a forward pass, so that threads can share the one that was put there last.
    owner, name = owner_of(layer, path)
    _check_held(layer, path)
    if torch.compiler.is_compiling():
        owner.__dict__[name] = value
        try:
            yield
        finally:
            del owner.__dict__[name]
        return
    key = (id(owner), name)
    with _lock:
        _entered[key] = _entered.get(key, 0) + 1
        owner.__dict__[name] = value
    try:
        yield
    finally:
        with _lock:
            _entered[key] -= 1
            if not _entered[key]:
                del _entered[key]
                if owner.__dict__.pop(name, None) is None:
                    raise RuntimeError(f"{type(owner).__qualname__} assigned its coefficients `{name}` in forward")
