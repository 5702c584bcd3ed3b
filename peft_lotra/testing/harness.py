"""Tests for any KAN layer, against a dense oracle that shares no code with the adapter.

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
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..adapters.family import at_task
from ..config.lotra_config import LoTRAConfig
from ..inference.verify import verify_coefficients
from ..layers.lotra import adapted_tensors
from ..preserved import first_tensor
from .oracle import assert_close, assert_differs, dense_model


class KANLayerTests:
    """Derive a class that pytest collects, and define `make_layer` and `make_sample`.

    Attributes:
        coefficients: as in `LoTRAConfig(coefficients=...)`, for a class that is not registered.
        ranks: `r` of the adapters.
        dtypes: the dtypes in which the layer itself runs. Values are compared in float64.
    """

    coefficients: dict[str, Any] = {}
    ranks: int | tuple[int | None, ...] = 2
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)

    def make_layer(self) -> nn.Module:
        """A new layer. Its weights may be random."""
        raise NotImplementedError

    def make_sample(self) -> torch.Tensor:
        """An input for the layer, in fp32 or complex64."""
        raise NotImplementedError

    def _models(self, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[nn.Module, PeftModel, torch.Tensor]:
        """A base, an adapted copy of it with an update about as large as the coefficients, and an input."""
        torch.manual_seed(0)
        base = nn.Sequential(self.make_layer()).eval()
        for tensor in (*base.parameters(), *base.buffers()):
            tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
        x = self.make_sample()
        torch.manual_seed(1)
        given = {"r": self.ranks, "alpha": 0.7, "coefficients": self.coefficients, "init_weights": False}
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(**given | config))
        return base, model, x.to(dtype.to_complex() if x.is_complex() else dtype)

    def _check_gradients(self, base: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
        """Check values, and gradients with respect to the input and every factor, against the oracle."""
        factors, x = _factors(model), x.clone().requires_grad_()
        y, expected = _output(model, x), _output(dense_model(base, model), x)
        assert_close(y, expected)
        assert_differs(y, _output(base, x))
        weights = torch.randn_like(y)
        pairs = [torch.autograd.grad((output * weights).sum(), [x, *factors]) for output in (y, expected)]
        for a, e in zip(*pairs, strict=True):
            assert e.any()
            assert_close(_as_real(a), _as_real(e))

    def _skip_unless_samples_are_apart(self, base: nn.Module, x: torch.Tensor) -> None:
        try:
            y, part = _by_sample(base, x), _by_sample(base, x[:1])
        except Exception as error:
            pytest.skip(f"the layer takes no part of this batch: {error}")
        if y[:1].shape != part.shape or not torch.allclose(y[:1], part, rtol=1e-9, atol=1e-12):
            pytest.skip("the layer's output for a sample depends on the others")

    def test_layout(self) -> None:
        base, _, x = self._models(torch.float32)
        verify_coefficients(base, x, coefficients=self.coefficients)

    def test_fresh_adapter_changes_nothing(self) -> None:
        base, model, x = self._models(init_weights=True)
        assert adapted_tensors(model)
        assert_close(_output(model, x), _output(base, x), 0)

    def test_values_and_gradients(self) -> None:
        base, model, x = self._models()
        layers = adapted_tensors(model).values()
        assert len(_factors(model)) == sum(len(layer.tucker("default").tensors()) for layer in layers)
        self._check_gradients(base, model, x)

    def test_second_derivatives(self) -> None:
        base, model, x = self._models()
        x.requires_grad_()

        def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return torch.autograd.grad(_as_real(slope).square().sum(), _factors(model))

        try:
            expected = gradients(_output(dense_model(base, model), x))
        except RuntimeError as error:
            pytest.skip(f"the layer itself has no second derivatives: {error}")
        for a, e in zip(gradients(_output(model, x)), expected, strict=True):
            assert_close(a, e, 1e-9)

    def test_whole_modes(self) -> None:
        for r in ((None, 1, 1), (1, None, 1), (1, 1, None)):
            self._check_gradients(*self._models(r=r))

    def test_family(self) -> None:
        """Runs a family with one task for all samples, and with a task for each sample."""
        tasks = ["first", "second", "third"]
        base, model, x = self._models(family=tasks)
        expected = [_by_sample(dense_model(base, model, task=k), x) for k in range(3)]
        for k, task in enumerate(tasks):
            with at_task(model, task=task):
                assert_close(_by_sample(model, x), expected[k])
        assert_differs(expected[0], expected[1])
        self._skip_unless_samples_are_apart(base, x)
        own = [(2 * k + 1) % 3 for k in range(len(x))]
        with at_task(model, task=[tasks[k] for k in own]):
            y = _by_sample(model, x)
        assert_close(y, torch.stack([expected[k][row] for row, k in enumerate(own)]))

    def test_mixed_batch(self) -> None:
        base, model, x = self._models()
        self._skip_unless_samples_are_apart(base, x)
        model.eval().add_adapter("second", LoTRAConfig(r=1, coefficients=self.coefficients, init_weights=False))
        expected = {"__base__": _by_sample(base, x)}
        for name in ("default", "second"):
            expected[name] = _by_sample(dense_model(base, model, {name: 1.0}), x)
        names = [list(expected)[k % 3] for k in range(1, len(x) + 1)]
        y = _by_sample(model, x, adapter_names=names)
        assert_close(y, torch.stack([expected[name][row] for row, name in enumerate(names)]))

    def test_merge_and_unmerge(self) -> None:
        for dtype in self.dtypes:
            base, model, x = self._models(dtype)
            y, expected = _output(model, x).detach(), _output(dense_model(base, model), x)
            model.merge_adapter(safe_merge=True)
            merged = _output(model, x)
            model.unmerge_adapter()
            assert_close(_output(model, x), y, 0)
            unloaded = model.merge_and_unload()
            assert [type(module) for module in unloaded.modules()] == [type(module) for module in base.modules()]
            for found in (y, merged, _output(unloaded, x)):
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                if dtype == torch.float64:  # rounding in lower precision has no fixed size
                    assert_close(found, expected)

    def test_unload(self) -> None:
        base, model, x = self._models()
        assert_differs(_output(model, x), _output(base, x))
        held = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
        assert {key for key in held if ".lotra_" not in key} == base.state_dict().keys()
        for key, value in base.state_dict().items():
            assert_close(held[key], value, 0)
        assert_close(_output(model.unload(), x), _output(base, x), 0)

    def test_save_and_load(self, tmp_path: Path) -> None:
        for dtype in self.dtypes:
            base, model, x = self._models(dtype)
            model.save_pretrained(str(tmp_path / str(dtype)))
            torch.manual_seed(2)
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(dtype))
            assert_close(_output(loaded, x), _output(model, x), 0)

    def test_copies(self) -> None:
        base, model, x = self._models()
        y = _output(model, x).detach()
        assert_close(_output(copy.deepcopy(model), x), y, 0)
        try:
            pickle.dumps(base)
        except (pickle.PicklingError, AttributeError, TypeError):
            return  # the layer itself cannot be pickled
        assert_close(_output(pickle.loads(pickle.dumps(model)), x), y, 0)


def _factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _output(model: nn.Module, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The first tensor that a model returns, as real numbers."""
    return _as_real(first_tensor(model(x, **kwargs)))


def _by_sample(model: nn.Module, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The first tensor that a model returns, with one row for each row of x. Some layers flatten leading axes."""
    y = _output(model, x, **kwargs).detach()
    return y.unflatten(0, (len(x), -1))
