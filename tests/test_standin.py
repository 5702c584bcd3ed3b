"""The stand-in in whole layers: values, gradients and second derivatives against the dense oracle."""

import pytest
import torch
from adapted_layers import adapt, adapted, dense, factors_of
from conftest import assert_different, assert_equal
from kan_layers import PreActivatedKANLayer
from layer_table import LAYERS
from rounding import rounding_of
from torch import nn

from peft_lotra.standin import PerformanceWarning
from peft_lotra.standin.cost import DENSE, ORDERS

FLAT = (9, 6)
all_layers = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("order", [*ORDERS, DENSE, "counted"], indirect=True)
@all_layers
def test_values_and_derivatives(name, order, adapters):
    base, model, x = adapted(name, adapters=adapters)
    oracle = dense(base, model)
    y, expected = model(x), oracle(x)
    assert_different(y, base(x))
    assert_equal(y, expected)
    weights, inputs = torch.randn_like(y), [x, *factors_of(model)]
    gradients = [torch.autograd.grad((z * weights).sum(), inputs) for z in (model(x), oracle(x))]
    for a, e in zip(*gradients, strict=True):
        assert e.abs().max() > 0
        assert_equal(a, e, 1e-9)
    slopes = [torch.autograd.grad(z.square().sum(), x, create_graph=True)[0] for z in (model(x), oracle(x))]
    seconds = [torch.autograd.grad(slope.square().sum(), factors_of(model)) for slope in slopes]
    for a, e in zip(*seconds, strict=True):
        assert e.abs().max() > 0
        assert_equal(a, e, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["", "di", DENSE], indirect=True)
@all_layers
def test_a_zero_core_changes_no_bit(name, order, dtype):
    base, model, x = adapted(name, dtype)
    assert_different(model(x), base(x))
    for key, parameter in model.named_parameters():
        if "lotra_core" in key:
            nn.init.zeros_(parameter)
    assert_equal(model(x), base(x), 0)


@pytest.mark.parametrize("order", ["", "di", DENSE], indirect=True)
@all_layers
def test_training_and_inference_give_the_same_bits(name, order):
    base, model, x = adapted(name)
    y = model(x)
    assert_different(y, base(x))
    with torch.no_grad():
        assert_equal(model(x), y, 0)
    model.requires_grad_(False)
    assert_equal(model(x.detach()), y, 0)


@all_layers
def test_fp32(name):
    base, model, x = adapted(name, torch.float32)
    y = model(x)
    assert_different(y, base(x))
    rounding_of(base, model, x).check(y)


def test_an_undeclared_scale_is_warned_of_and_exact():
    base, model, x = adapt(PreActivatedKANLayer(6, 5), {"coeffs": "i o d"}, FLAT, torch.float64, r=2)
    with pytest.warns(PerformanceWarning, match="PreActivatedKANLayer calls `einsum`"):
        y = model(x)
    assert_different(y, base(x))
    assert_equal(y, dense(base, model)(x))
