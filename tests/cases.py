"""The KAN models that the tests adapt, each with a formula for the update that is written for its library by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kan import KAN as PyKAN
from kan_layers import KAN, ChebyKAN, FastKAN, MatrixKANLayer, NaiveFourierKANLayer
from torch import nn

from peft_lotra import LoTRAConfig, LoTRALayer


@dataclass(frozen=True)
class Case:
    """A model with 3 inputs and KAN layers of one library."""

    make: Callable[[], nn.Module]
    parameter: str  # of the KAN layer
    delta: Callable[
        [Any], torch.Tensor
    ]  # the update in the stored layout, from the LoTRALayer's factors G, U1, U2, U3
    scale: str | None = None
    coefficients: dict[str, Any] = field(default_factory=dict)  # for the config, if the class is not registered
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _iod(f):
    return torch.einsum("abc,ia,ob,dc->iod", *f)


def _oid(f):
    return torch.einsum("abc,ia,ob,dc->oid", *f)


def _matrix_id(f):
    return torch.einsum("abc,ia,ob,dc->oid", *f).flatten(1)


def _matrix_di(f):
    return torch.einsum("abc,ia,ob,dc->odi", *f).flatten(1)


def _fourier(f):
    both = torch.einsum("abc,ia,ob,dc->doi", *f)  # cosines first, then sines
    return torch.stack([frequencies.movedim(0, -1) for frequencies in both.chunk(2)])


CASES = {
    "pykan": Case(
        # pykan evaluates its splines in fp32 buffers; 16-bit inputs are not its affair.
        lambda: PyKAN(width=[3, 5, 2], grid=4, k=3, auto_save=False, seed=7),
        "coef",
        _iod,
        dtypes=(torch.float64, torch.float32),
    ),
    "efficient-kan": Case(lambda: KAN([3, 5, 2]), "spline_weight", _oid, scale="spline_scaler"),
    "efficient-kan, no scaler": Case(
        lambda: KAN([3, 5, 2], enable_standalone_scale_spline=False), "spline_weight", _oid
    ),
    "fast-kan": Case(lambda: FastKAN([3, 5, 2]), "spline_linear.weight", _matrix_id),
    "ChebyKAN": Case(lambda: ChebyKAN([3, 5, 2]), "cheby_coeffs", _iod),
    "o (d i), given": Case(
        lambda: nn.Sequential(MatrixKANLayer(3, 5, order="d i"), MatrixKANLayer(5, 2, order="d i")),
        "weight",
        _matrix_di,
        coefficients={"weight": {"layout": "o (d i)", "sizes": {"d": 4}}},
    ),
    "FourierKAN, given": Case(
        lambda: nn.Sequential(NaiveFourierKANLayer(3, 5), NaiveFourierKANLayer(5, 2)),
        "fouriercoeffs",
        _fourier,
        coefficients={"fouriercoeffs": "d1 o i d2"},
    ),
}

INPUT = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).reshape(8, 3)[:, torch.tensor([1, 0, 2])]


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """The model of a case and an input for it."""
    model = CASES[name].make()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype)
    return model, INPUT.to(dtype)


def config(name: str, **kwargs: Any) -> LoTRAConfig:
    """A config for the model of a case: ranks up to (2, 2, 3) unless said otherwise."""
    if not {"r", "compression_ratio"} & set(kwargs):
        kwargs["r"] = (2, 2, 3)
    return LoTRAConfig(coefficients=CASES[name].coefficients, **kwargs)


def lotra_layers(model: nn.Module) -> dict[str, Any]:
    """The LoTRALayers of a PEFT model by their names in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoTRALayer)
    }


def randomize(model: nn.Module, adapter: str = "default", std: float = 1.0) -> None:
    """Give an adapter a core that is not zero."""
    for layer in lotra_layers(model).values():
        if adapter in layer.lotra_core:
            nn.init.normal_(layer.lotra_core[adapter], std=std)


def dense_oracle(name: str, base: nn.Module, model: nn.Module, adapters: tuple[str, ...] = ("default",)) -> nn.Module:
    """A plain copy of `base` whose coefficients are A + Σ updates, by the case's own formula; differentiable."""
    case = CASES[name]
    oracle = copy.deepcopy(base)
    for path, adapter_layer in lotra_layers(model).items():
        layer = oracle.get_submodule(path)
        owner = layer.get_submodule(case.parameter.rpartition(".")[0])
        attribute = case.parameter.rpartition(".")[2]
        coefficients = getattr(owner, attribute).detach()
        delta = sum(
            adapter_layer.scaling[adapter] * case.delta(factors)
            for adapter in adapters
            if (factors := factors_of(adapter_layer, adapter)) is not None
        )
        if case.scale is not None:
            delta = delta / getattr(layer, case.scale).detach().unsqueeze(-1)
        del owner._parameters[attribute]
        setattr(owner, attribute, coefficients + delta)
    return oracle


def factors_of(layer: Any, adapter: str) -> tuple[torch.Tensor, ...] | None:
    containers = (layer.lotra_core, layer.lotra_U1, layer.lotra_U2, layer.lotra_U3)
    return tuple(container[adapter] for container in containers) if adapter in layer.lotra_core else None
