"""The dense oracle of adapted models, and comparisons of tensors."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from operator import attrgetter
from string import ascii_letters

import torch
from torch import nn

from ..coefficients.spec import CoefficientSpec, parse_slice
from ..layers.lotra import adapted_tensors
from ..standin import tensor as standin_tensor


def dense_model(
    base: nn.Module, model: nn.Module, weights: Mapping[str, float] | None = None, task: int | None = None
) -> nn.Module:
    """A copy of `base` with the coefficients A + Σ_j w_j · Δ_j, each Δ_j by one einsum over the layout's axes.

    This is the oracle for an adapted model. It shares no code with the forward pass of the adapter, and it can be
    differentiated with respect to the factors.

    Args:
        base: the model without adapters.
        model: the adapted model.
        weights: w by adapter. The default is 1 for each adapter that is active in a layer.
        task: the number of the task, if the adapters are families of named tasks.
    """
    oracle = copy.deepcopy(base)
    for path, layer in adapted_tensors(model).items():
        spec = layer.spec
        scale = None
        if spec.scale is not None:
            scale = attrgetter(path.removesuffix(spec.parameter) + spec.scale)(oracle).detach()
        coefficients = _coefficients(oracle, path, spec)
        total = torch.zeros_like(coefficients)
        for adapter, weight in (weights or dict.fromkeys(layer.active_adapters, 1.0)).items():
            if adapter not in layer.lotra_core:
                continue
            core, *factors = (getattr(layer, held)._parameters.get(adapter) for held in layer.adapter_layer_names)
            if task is not None:  # each task of a family has its own update
                core = core[..., task]
            update = weight * layer.scaling[adapter] * _update(spec, scale, core, *factors)
            whole = torch.zeros_like(coefficients, dtype=update.dtype)
            part = parse_slice(spec.slice or ":")
            whole[part] = update.reshape(whole[part].shape)
            total = total + whole
        values = (coefficients + total).to(coefficients.dtype)
        for place, value in zip(spec.parameters, values if spec.parts else [values], strict=True):
            owner, _, name = (path.removesuffix(spec.parameter) + place).rpartition(".")
            holder = oracle.get_submodule(owner)
            del holder._parameters[name]
            setattr(holder, name, value)
    return oracle


def _coefficients(model: nn.Module, path: str, spec: CoefficientSpec) -> torch.Tensor:
    layer = path.removesuffix(spec.parameter)
    values = [model.get_parameter(layer + place).detach() for place in spec.parameters]
    return torch.stack(values) if spec.parts else values[0]


def _update(
    spec: CoefficientSpec, scale: torch.Tensor | None, core: torch.Tensor, *factors: torch.Tensor | None
) -> torch.Tensor:
    """G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 / scale, with the axes of the layout (such as i and d2) in the order of storage."""
    stored = _axes(spec.layout.pattern)
    axes = sorted(stored, key=lambda axis: ("iodgthw".index(axis[0]), int(axis[1:] or 0)))
    if factors[3] is not None:
        core = torch.einsum("abck,pk->abcp", core, factors[3])
    ranks = dict(zip(("r1", "r2", "r3"), core.shape, strict=False))
    terms = [(core, [*ranks, *[axis for axis in axes if axis[0] not in "iod"]])]
    for mode, rank, U in zip("iod", ranks, factors, strict=False):
        own = [axis for axis in axes if axis[0] == mode]
        terms.append((torch.eye(ranks[rank]).to(core) if U is None else U, [*own, rank]))
    if scale is not None:
        terms.append((1 / scale.to(core), _axes(spec.scale_layout or "")))
    sizes = {**spec.layout.sizes, **ranks}
    letters = dict(zip(sizes, ascii_letters, strict=False))
    *inputs, output = ("".join(letters[axis] for axis in axes) for axes in [*[own for _, own in terms], stored])
    tensors = [tensor.reshape([sizes[axis] for axis in own]) for tensor, own in terms]
    return torch.einsum(f"{','.join(inputs)}->{output}", *tensors)


def _axes(pattern: str) -> list[str]:
    return re.findall(r"[a-z][0-9]*", pattern)


def margin() -> float:
    """What every tolerance is divided by: the environment variable PEFT_LOTRA_MARGIN, or 1."""
    return float(os.environ.get("PEFT_LOTRA_MARGIN", 1))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Assert equal dtype and shape, and max |actual − expected| ≤ tolerance · max |expected|; 0 demands equal bits.

    The default is for fp64: far above its rounding, and far below what a wrong formula does.
    """
    size = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance / margin() * size)


def assert_differs(actual: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that two tensors are not nearly equal, so that a later `assert_close` is not trivial."""
    assert (actual - other).abs().max() > 1e-3 * other.abs().max()


def forget_warnings() -> None:
    """Let every `PerformanceWarning` appear once more."""
    standin_tensor._warned.clear()
