"""Tests that any KAN layer can be put through, against a dense oracle that shares no code with the adapter.

class TestMyLayer(KANLayerTests):
    coefficients = {"weight": "o i d"}  # not needed for a registered class

    def make_layer(self):
        return MyLayer(3, 4)

    def make_sample(self):
        return torch.randn(8, 3)
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from .coefficients import CoefficientSpec
from .config import LoTRAConfig
from .inference.verify import verify_coefficients
from .layer import adapted_tensors, first_tensor
from .standin import plan
from .standin import tensor as standin_tensor
from .standin.cost import DENSE

# Relative to the largest entry of the expected tensor.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class KANLayerTests:
    """Inherit from this in a class that pytest collects, and say how to make a layer and a sample input.

    Attributes:
        coefficients: as in `LoTRAConfig(coefficients=...)`, for a class that is not registered.
        ranks: `r` of the adapters.
        dtypes: those that the layer itself runs in.
    """

    coefficients: dict[str, Any] = {}
    ranks: int | tuple[int | None, ...] = 2
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)

    def make_layer(self) -> nn.Module:
        """A new layer; its weights may be random."""
        raise NotImplementedError

    def make_sample(self) -> torch.Tensor:
        """An input for the layer, in fp32."""
        raise NotImplementedError

    # What the tests are made of --------------------------------------------------------------------------------------

    def _base(self, dtype: torch.dtype) -> tuple[nn.Sequential, torch.Tensor]:
        torch.manual_seed(0)
        base = nn.Sequential(self.make_layer()).eval()
        for tensor in (*base.parameters(), *base.buffers()):
            tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
        return base, self.make_sample().to(dtype)

    def _adapted(self, base: nn.Module, **kwargs: Any) -> PeftModel:
        """An adapted copy of `base`, its update about as large as the coefficients."""
        torch.manual_seed(1)
        config = LoTRAConfig(r=self.ranks, coefficients=self.coefficients, **{"init_weights": False} | kwargs)
        return get_peft_model(copy.deepcopy(base), config)

    # The tests -------------------------------------------------------------------------------------------------------

    def test_layout(self) -> None:
        base, x = self._base(torch.float32)
        verify_coefficients(base, x, coefficients=self.coefficients)

    def test_fresh_adapter_changes_nothing(self) -> None:
        base, x = self._base(torch.float64)
        model = self._adapted(base, init_weights=True)
        assert adapted_tensors(model)
        assert_close(first_tensor(model(x)), first_tensor(base(x)), 0)

    def test_values(self) -> None:
        for dtype in self.dtypes:
            base, x = self._base(dtype)
            model = self._adapted(base, alpha=0.7)
            y = first_tensor(model(x))
            assert_differs(y, first_tensor(base(x)))
            assert_close(y, first_tensor(dense_model(base, model)(x)))

    def test_gradients(self) -> None:
        base, x = self._base(torch.float64)
        model = self._adapted(base)
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(factors) == sum(
            len(layer.factors("default").tensors()) for layer in adapted_tensors(model).values()
        )
        x.requires_grad_()
        weights = torch.randn_like(first_tensor(base(x)))
        actual = torch.autograd.grad((first_tensor(model(x)) * weights).sum(), [x, *factors])
        expected = torch.autograd.grad((first_tensor(dense_model(base, model)(x)) * weights).sum(), [x, *factors])
        for a, e in zip(actual, expected, strict=True):
            assert e.any()
            assert_close(a, e)

    def test_second_derivatives(self) -> None:
        base, x = self._base(torch.float64)
        model = self._adapted(base)
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        x.requires_grad_()

        def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), factors)

        try:
            expected = gradients(first_tensor(dense_model(base, model)(x)))
        except RuntimeError as error:
            pytest.skip(f"the layer itself has no second derivatives: {error}")
        for a, e in zip(gradients(first_tensor(model(x))), expected, strict=True):
            assert_close(a, e, 1e-9)

    def test_merge_and_unmerge(self) -> None:
        for dtype in self.dtypes:
            base, x = self._base(dtype)
            model = self._adapted(base)
            y = first_tensor(model(x)).detach()
            model.merge_adapter(safe_merge=True)
            assert_close(first_tensor(model(x)), y)
            model.unmerge_adapter()
            assert_close(first_tensor(model(x)), y, 0)
            merged = model.merge_and_unload()
            assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
            assert_close(first_tensor(merged(x)), y)

    def test_unload(self) -> None:
        base, x = self._base(torch.float64)
        model = self._adapted(base)
        assert_differs(first_tensor(model(x)), first_tensor(base(x)))
        assert_close(first_tensor(model.unload()(x)), first_tensor(base(x)), 0)

    def test_save_and_load(self, tmp_path: Path) -> None:
        for dtype in self.dtypes:
            base, x = self._base(dtype)
            model = self._adapted(base)
            y = first_tensor(model(x)).detach()
            model.save_pretrained(str(tmp_path / str(dtype)))
            torch.manual_seed(2)
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(dtype))
            assert_close(first_tensor(loaded(x)), y, 0)

    def test_state_dict(self) -> None:
        base, _ = self._base(torch.float64)
        model = self._adapted(base)
        held = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
        adapters = {key for key in held if ".lotra_" in key}
        assert held.keys() - adapters == base.state_dict().keys()
        for key, value in base.state_dict().items():
            assert_close(held[key], value, 0)

    def test_copies(self) -> None:
        base, x = self._base(torch.float64)
        model = self._adapted(base)
        y = first_tensor(model(x)).detach()
        copies = [copy.deepcopy(model)]
        try:
            pickle.dumps(base)
        except (pickle.PicklingError, AttributeError, TypeError):
            pass  # the layer itself cannot be pickled
        else:
            copies.append(pickle.loads(pickle.dumps(model)))
        for twin in copies:
            assert_close(first_tensor(twin(x)), y, 0)


@contextmanager
def forced_order(order: str) -> Iterator[SimpleNamespace]:
    """While this is entered, contractions go this way round where they can; `taken.times` counts the plans that do.

    Args:
        order: one of `peft_lotra.standin.cost.ORDERS`, or `DENSE`.
    """
    taken, counted = SimpleNamespace(times=0), plan.cheapest_order
    room: Any = plan

    def forced(*sizes: Any) -> str:
        on_x = sizes[5]
        possible = order == DENSE or set(order) <= set(on_x)
        taken.times += possible
        return order if possible else ""

    room.cheapest_order = forced
    room._plan.cache_clear()
    try:
        yield taken
    finally:
        room.cheapest_order = counted
        room._plan.cache_clear()


def forget_warnings() -> None:
    """Let every `PerformanceWarning` come once again."""
    standin_tensor._warned.clear()


def dense_model(base: nn.Module, model: nn.Module, weights: Mapping[str, float] | None = None) -> nn.Module:
    """A copy of `base` whose coefficients are A + Σ_j w_j · Δ_j: every stored entry looks its own (i, o, d, ...) up.

    The oracle for an adapted model: it shares no code with the adapter, and is differentiable by the factors.

    Args:
        base: the plain model.
        model: the adapted one.
        weights: w by adapter; by default 1 for those that are active in a layer.
    """
    oracle = copy.deepcopy(base)
    for path, layer in adapted_tensors(model).items():
        spec = layer.spec
        plain = oracle.get_submodule(path.removesuffix(spec.parameter).removesuffix("."))
        owner, _, name = spec.parameter.rpartition(".")
        holder = plain.get_submodule(owner)
        coefficients = getattr(holder, name).detach()
        total = torch.zeros_like(coefficients)
        for adapter, weight in (weights or dict.fromkeys(layer.active_adapters, 1.0)).items():
            if adapter not in layer.lotra_core:
                continue
            held = [getattr(layer, container)._parameters.get(adapter) for container in layer.adapter_layer_names]
            update = weight * layer.scaling[adapter] * _scattered(spec, *held[:5])  # a family has no one update
            if spec.scale is not None:
                update = update / _repeated(spec, tensor_at(plain, spec.scale))
            whole = torch.zeros_like(coefficients, dtype=update.dtype)
            whole[_region(spec)] = update
            total = total + whole
        del holder._parameters[name]
        setattr(holder, name, (coefficients + total).to(coefficients.dtype))
    return oracle


def tensor_at(layer: nn.Module, path: str) -> torch.Tensor:
    """The tensor at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(layer.get_submodule(owner), name)


def _scattered(spec: CoefficientSpec, core: torch.Tensor, *factors: torch.Tensor | None) -> torch.Tensor:
    """G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 in the stored layout: every stored entry looks up its own (i, o, d, ...)."""
    U1, U2, U3, U4 = (
        torch.eye(n).to(core) if U is None else U for U, n in zip(factors, (*core.shape, 1), strict=False)
    )
    index = _canonical_index(spec)
    if factors[3] is not None:
        core = torch.einsum("abck,pk->abcp", core, U4)
        sizes = [int(part.max()) + 1 for part in index[3:]]
        core = core.reshape(*core.shape[:3], *sizes)
    dense = torch.einsum("abc...,ia,ob,dc->iod...", core, U1, U2, U3)
    return dense[index]


def _digits(spec: CoefficientSpec) -> dict[str, torch.Tensor]:
    """For each axis of the layout, its index at every stored entry; from the layout string by arithmetic."""
    groups, sizes = _groups(spec.layout.pattern), spec.layout.sizes
    shape = [torch.Size([sizes[axis] for axis in group]).numel() for group in groups]
    digits = {}
    for group, position in zip(groups, torch.meshgrid(*map(torch.arange, shape), indexing="ij"), strict=True):
        for axis in reversed(group):
            digits[axis] = position % sizes[axis]
            position = position // sizes[axis]
    return digits


def _groups(pattern: str) -> list[list[str]]:
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", pattern)]


def _joined(spec: CoefficientSpec, digits: dict[str, torch.Tensor], axes: list[str]) -> torch.Tensor:
    """The index along several axes as one, the last running fastest."""
    index = torch.zeros_like(digits[axes[0]])
    for axis in axes:
        index = index * spec.layout.sizes[axis] + digits[axis]
    return index


def _canonical_index(spec: CoefficientSpec) -> tuple[torch.Tensor, ...]:
    """For each axis of A, its index at every stored entry."""
    digits = _digits(spec)
    modes = ([axis for axis in digits if axis[0] == letter] for letter in "iodgthw")
    return tuple(_joined(spec, digits, sorted(axes, key=lambda axis: int(axis[1:] or 0))) for axes in modes if axes)


def _region(spec: CoefficientSpec) -> tuple[slice, ...]:
    """The part of the parameter that is the coefficient tensor."""
    ranges = [part.split(":") for part in (spec.slice or ":").split(",")]
    return tuple(slice(*(int(bound) if bound.strip() else None for bound in bounds)) for bounds in ranges)


def _repeated(spec: CoefficientSpec, scale: torch.Tensor) -> torch.Tensor:
    """The scale at every stored entry of the coefficients."""
    digits = _digits(spec)
    return scale.detach()[tuple(_joined(spec, digits, axes) for axes in _groups(spec.scale_layout or ""))]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """max |actual − expected| ≤ tolerance · max |expected|, with equal dtype and shape; 0 demands equal bits."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    tolerance = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * size, f"off by {error:.3g}, allowed are {tolerance:g} of {size:.3g}"


def assert_differs(actual: torch.Tensor, other: torch.Tensor) -> None:
    """The two are not nearly equal, so that a later `assert_close` is not trivial."""
    assert (actual - other).abs().max() > 1e-3 * other.abs().max()
