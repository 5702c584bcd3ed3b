"""What takes the place of a coefficient parameter while the layer's own forward runs.

The adapter does not know how a layer evaluates its basis. It puts a stand-in where the layer looks for its parameter,
and the layer runs its own code with it. The rest of the package only says which updates are active.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..coefficients.spec import CoefficientSpec, owner_of, tensor_at
from .axes import Axes, expanded_scale
from .placeholder import Ones, PerformanceWarning, StandIn
from .products import Product
from .updates import Update

__all__ = ["PerformanceWarning", "Product", "StandIn", "Update", "adapted", "adapted_coefficients"]


def adapted_coefficients(layer: nn.Module, spec: CoefficientSpec, updates: Iterable[Update]) -> torch.Tensor:
    """parameter · scale + Σ updates, in the layout of the parameter."""
    coefficients = tensor_at(layer, spec.parameter)
    if spec.scale is not None:
        coefficients = coefficients * spec.layout.expand(tensor_at(layer, spec.scale), spec.scale_layout)
    for update in updates:
        coefficients = coefficients + update.dense(spec, coefficients.shape).to(coefficients)
    return coefficients


@contextmanager
def adapted(layer: nn.Module, spec: CoefficientSpec, updates: Sequence[Update], quiet: bool = False) -> Iterator[None]:
    """While this is entered, `layer` finds A + Σ updates where its coefficient parameter is, and ones as its scale.

    Where it has to form that sum, there is a `PerformanceWarning`, unless `quiet`.
    """
    parameter = tensor_at(layer, spec.parameter)
    owner = None if quiet else type(layer).__qualname__
    standin = StandIn(parameter, Axes.of(spec, parameter.shape), updates, owner)
    if spec.scale is None:
        with _shadowed(layer, spec.parameter, standin):
            yield
    else:
        scale = tensor_at(layer, spec.scale)
        standin.scale = expanded_scale(spec, scale)
        with _shadowed(layer, spec.parameter, standin), _shadowed(layer, spec.scale, Ones.like_tensor(scale)):
            yield


_lock = threading.Lock()
_entered: dict[tuple[int, str], int] = {}  # how many forward passes, in all threads, use a shadow


@contextmanager
def _shadowed(layer: nn.Module, path: str, value: Any) -> Iterator[None]:
    # Python looks into the instance dictionary before it asks nn.Module for a parameter of the name. A stand-in holds
    # no state of a forward pass, so that threads can share the one that was put there last.
    owner, name = owner_of(layer, path)
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
                owner.__dict__.pop(name, None)
