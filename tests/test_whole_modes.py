"""Modes without a factor, and the factor of groups and kernel positions, against the dense oracle."""

import itertools

import pytest
import torch
from adapted_layers import adapt, dense, factors_of
from layer_table import LAYERS

from peft_lotra.standin.cost import DENSE, ORDERS
from peft_lotra.testing import assert_close, assert_differs, forced_order

RANKS = [r for r in itertools.product((2, None), repeat=3) if None in r]


def whole(name, r, adapters=1):
    row = LAYERS[name]
    return adapt(row.make(), row.declared, row.sample(torch.float64).shape, torch.float64, adapters, r)


def compare(base, model, x):
    """Values, gradients and second derivatives."""
    parameters = [x, *factors_of(model)]
    results = []
    for function in (model, dense(base, model)):
        y = function(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        gradients = torch.autograd.grad((y * weights).sum(), parameters, create_graph=True)
        results.append([y, *gradients])
        if gradients[0].requires_grad:
            results[-1] += torch.autograd.grad(gradients[0].square().sum(), parameters, allow_unused=True)
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_close(actual, expected, 1e-9)
    assert_differs(results[0][0], base(x))


@pytest.mark.parametrize("r", RANKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_whole_modes_of_every_layer(name, r):
    compare(*whole(name, r))


@pytest.mark.parametrize("order", [*ORDERS, DENSE])
@pytest.mark.parametrize("r", RANKS, ids=str)
@pytest.mark.parametrize("name", ["efficient-kan KANLinear", "conv", "pykan KANLayer"])
def test_whole_modes_in_every_order(name, r, order):
    if name not in LAYERS:
        name = next(key for key in LAYERS if name.split()[0].lower() in key.lower())
    base, model, x = whole(name, r)
    with forced_order(order):
        compare(base, model, x)
