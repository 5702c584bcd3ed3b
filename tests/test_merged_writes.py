"""What is written to coefficients while an adapter is merged into them is not lost when it is unmerged."""

import copy

import pytest
import torch
from conftest import assert_different, assert_equal
from family_models import X, at, fill, kan, polynomials
from kan_layers import ChebyKAN, KANLinear
from layer_table import lotra_layers
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, at_task

WRITTEN = r"`{}`.*has been written to.*merged.*`merge_and_unload\(\)`"


def models():
    torch.manual_seed(1)
    base = ChebyKAN([3, 6, 4]).double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    fill(model)
    return base, model


def load_state_dict(parameter, model):
    state = copy.deepcopy(model.state_dict())
    name = next(name for name, p in model.named_parameters() if p is parameter)
    state[name] *= 2
    model.load_state_dict(state)


WRITES = {
    "load_state_dict": load_state_dict,
    "copy_": lambda parameter, _: parameter.copy_(2 * parameter),
    "data": lambda parameter, _: parameter.data.mul_(2),
    "one entry": lambda parameter, _: parameter[1, 2, 1].add_(1e-12),
    "another order": lambda parameter, _: parameter.copy_(parameter.flip(0)),
    "set_data": lambda parameter, _: setattr(parameter, "data", 2 * parameter.data),
}


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_a_write_to_merged_coefficients(write, which):
    base, model = models()
    model.merge_adapter()
    merged = model(X)
    assert_different(merged, base(X))
    layers = list(lotra_layers(model).values())
    parameter = layers[which].get_base_layer().cheby_coeffs
    WRITES[write](parameter, model)
    after = model(X)
    assert not torch.equal(after, merged)
    held = [layer.get_base_layer().cheby_coeffs.clone() for layer in layers]
    with pytest.raises(RuntimeError, match=WRITTEN.format("cheby_coeffs")):
        model.unmerge_adapter()
    with pytest.raises(RuntimeError, match=WRITTEN.format("cheby_coeffs")):
        with model.disable_adapter():
            model(X)
    for layer, values in zip(layers, held, strict=True):  # of no layer
        assert layer.merged
        assert_equal(layer.get_base_layer().cheby_coeffs, values, 0)
    assert_equal(model(X), after, 0)
    assert_equal(model.merge_and_unload()(X), after, 0)


@pytest.mark.parametrize("factor", [-1, 2, 0.5, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_a_write_to_the_same_bits_of_many_entries(factor, dtype):
    """Of all 256, whose changes would cancel in a sum of bits."""
    torch.manual_seed(1)
    model = get_peft_model(ChebyKAN([8, 8]).to(dtype), LoTRAConfig(r=2, init_weights=False))
    model.merge_adapter()
    (layer,) = lotra_layers(model).values()
    parameter = layer.get_base_layer().cheby_coeffs
    parameter.mul_(factor)
    with pytest.raises(RuntimeError, match=WRITTEN.format("cheby_coeffs")):
        model.unmerge_adapter()
    parameter.div_(factor)
    model.unmerge_adapter()


@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_what_would_unmerge_or_merge_more_changes_no_layer(which):
    _, model = models()
    model.add_adapter("two", LoTRAConfig(r=2, init_weights=False))
    model.merge_adapter()
    layers = list(lotra_layers(model).values())
    layers[which].get_base_layer().cheby_coeffs.mul_(2)
    y = model(X)
    steps = {
        "set_adapter": lambda: model.set_adapter("two"),
        "merge_adapter": lambda: model.merge_adapter(["two"]),
        "add_adapter": lambda: model.add_adapter("three", LoTRAConfig(r=1)),
        "add_weighted_adapter": lambda: model.add_weighted_adapter(["two"], [1.0], "three", "cat"),
    }
    for step in steps.values():
        with pytest.raises(RuntimeError, match=WRITTEN.format("cheby_coeffs")):
            step()
        assert list(model.peft_config) == ["default", "two"]
        assert all(layer.merged_adapters == layer.active_adapters == ["default"] for layer in layers)
        assert_equal(model(X), y, 0)


@torch.no_grad()
def test_a_write_of_the_same_values_is_none():
    base, model = models()
    for _ in range(2):
        model.merge_adapter()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model.unmerge_adapter()
        for layer, plain in zip(lotra_layers(model).values(), base.layers, strict=True):
            assert_equal(layer.get_base_layer().cheby_coeffs, plain.cheby_coeffs, 0)


@torch.no_grad()
def test_what_was_written_may_be_put_back():
    base, model = models()
    model.merge_adapter()
    parameter = next(iter(lotra_layers(model).values())).get_base_layer().cheby_coeffs
    before = parameter.clone()
    parameter.zero_()
    with pytest.raises(RuntimeError, match=WRITTEN.format("cheby_coeffs")):
        model.unmerge_adapter()
    parameter.copy_(before)
    model.unmerge_adapter()
    assert_equal(model(X) - model(X), 0 * model(X), 0)
    with model.disable_adapter():
        assert_equal(model(X), base(X), 0)


@torch.no_grad()
def test_a_scale_that_is_written_to():
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(KANLinear(3, 4)).double(), LoTRAConfig(r=2, init_weights=False))
    model.merge_adapter()
    (layer,) = lotra_layers(model).values()
    layer.get_base_layer().spline_scaler.mul_(2)
    with pytest.raises(RuntimeError, match=WRITTEN.format("spline_scaler")):
        model.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@torch.no_grad()
def test_other_dtypes_and_further_adapters(dtype):
    torch.manual_seed(1)
    base = ChebyKAN([3, 4]).to(dtype)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, init_weights=False))
    model.add_adapter("two", LoTRAConfig(r=2, init_weights=False))
    model.merge_adapter(["default"])
    model.merge_adapter(["two"])
    (layer,) = lotra_layers(model).values()
    parameter = layer.get_base_layer().cheby_coeffs
    parameter.mul_(2)
    with pytest.raises(RuntimeError, match=WRITTEN.format("cheby_coeffs")):
        model.unmerge_adapter()
    parameter.div_(2)
    model.unmerge_adapter()
    assert_equal(parameter, base.layers[0].cheby_coeffs, 0)


@torch.no_grad()
def test_a_cast_is_no_write():
    base, model = models()
    model.merge_adapter()
    y = model(X)
    model.float().double()
    assert_equal(model(X), y, 1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_equal(model(X), base(X), 0)


@torch.no_grad()
def test_a_merged_family():
    base, model = kan()
    with at_task(model, lam=1.25):
        model.merge_adapter()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.unmerge_adapter()
    with at_task(model, lam=1.6):
        assert_equal(model(X), at(base, model, polynomials(1.6))(X))
