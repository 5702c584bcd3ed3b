"""What takes the place of a coefficient parameter while the layer's own forward runs.

The adapter does not know how a layer evaluates its basis. It puts something where the layer looks for its parameter,
and the layer runs its own code with it. This room decides what that something is; the rest of the package only says
which updates are active. Now it is the dense tensor A + Σ s · G ×₁ U1 ×₂ U2 ×₃ U3 in the stored layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .coefficients.spec import CoefficientSpec, owner_of, tensor_at
from .tucker import TuckerFactors, reconstruct


class Update(NamedTuple):
    """s · G ×₁ U1 ×₂ U2 ×₃ U3: one adapter's change of a coefficient tensor."""

    factors: TuckerFactors
    scaling: float

    def dense(self, spec: CoefficientSpec, shape: torch.Size) -> torch.Tensor:
        """The update of a parameter of this shape, in its layout; 16-bit factors are multiplied out in fp32."""
        dtype = self.factors.core.dtype
        if dtype in (torch.float16, torch.bfloat16):
            factors = TuckerFactors(*(factor.float() for factor in self.factors))
        else:
            factors = self.factors
        return spec.stored_update(reconstruct(factors) * self.scaling, shape).to(dtype)


def adapted_coefficients(layer: nn.Module, spec: CoefficientSpec, updates: Iterable[Update]) -> torch.Tensor:
    """parameter · scale + Σ updates, in the layout of the parameter."""
    coefficients = tensor_at(layer, spec.parameter)
    if spec.scale is not None:
        coefficients = coefficients * spec.layout.expand(tensor_at(layer, spec.scale), spec.scale_layout)
    for update in updates:
        coefficients = coefficients + update.dense(spec, coefficients.shape).to(coefficients)
    return coefficients


@contextmanager
def adapted(layer: nn.Module, spec: CoefficientSpec, updates: Sequence[Update]) -> Iterator[None]:
    """While this is entered, `layer` finds A + Σ updates where its coefficient parameter is, and ones as its scale."""
    with replaced(layer, spec, adapted_coefficients(layer, spec, updates).contiguous()):
        yield


@contextmanager
def replaced(layer: nn.Module, spec: CoefficientSpec, coefficients: torch.Tensor) -> Iterator[None]:
    """While this is entered, `layer` finds `coefficients` where its parameter is, and ones as its scale."""
    with _shadowed(layer, spec.parameter, coefficients):
        if spec.scale is None:
            yield
        else:
            with _shadowed(layer, spec.scale, torch.ones_like(tensor_at(layer, spec.scale))):
                yield


@contextmanager
def _shadowed(layer: nn.Module, path: str, value: Any) -> Iterator[None]:
    # Python looks into the instance dictionary before it asks nn.Module for a parameter of the name.
    owner, name = owner_of(layer, path)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        del owner.__dict__[name]
