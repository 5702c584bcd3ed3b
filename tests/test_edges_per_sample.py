"""Layers that return every edge, as pykan's: samples with tasks or adapters of their own take one pass."""

import copy

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import chebyshev
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, at_task
from peft_lotra.layers.lotra import LoTRALayer, adapted_tensors

LAM = {"lam": (1.0, 1.6)}


class Edges(nn.Module):
    """y[b, i, o] = Σ_d φ_d(x_bi) A[i, o, d], summed over i outside of the contraction, in one of several orders."""

    def __init__(self, equation, order):
        super().__init__()
        self.equation = equation
        self.coefficients = nn.Parameter(torch.randn([{"i": 3, "o": 4, "d": 5}[axis] for axis in order]))

    def forward(self, x):
        y = torch.einsum(self.equation, chebyshev(x, 4), self.coefficients)
        return y.sum(self.equation.partition("->")[2].index("i"))


KINDS = {
    "b i o": (lambda: Edges("bid,iod->bio", "iod"), "i o d"),
    "b o i": (lambda: Edges("bid,oid->boi", "oid"), "o i d"),
    "o first": (lambda: Edges("bid,iod->oib", "iod"), "i o d"),
}


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of layers."""
    counted, run = [], LoTRALayer._run_once
    monkeypatch.setattr(LoTRALayer, "_run_once", lambda self, *args: (counted.append(self), run(self, *args))[1])
    return counted


def adapted(name, **fields):
    fields = {"coefficients": {"coefficients": KINDS[name][1]}, "r": 2} | fields
    model = get_peft_model(nn.Sequential(KINDS[name][0]()), LoTRAConfig(**fields))
    for layer in adapted_tensors(model).values():
        for core in layer.lotra_core.values():
            nn.init.normal_(core, std=0.5)
    return model


def on_first_axis(name, y):
    return y.T if name == "o first" else y


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("r", [2, (2, None, 3), (None, 2, None)])
def test_a_task_for_each_sample(name, r, passes):
    model = adapted(name, r=r, family=LAM, family_degree=2)
    x, lam = torch.rand(7, 3), torch.linspace(1, 1.6, 7)
    with at_task(model, lam=lam):
        y = on_first_axis(name, model(x))
    assert len(passes) == 1
    for k, value in enumerate(lam):
        with at_task(model, lam=value):
            assert_equal(y[k], on_first_axis(name, model(x))[k])
    assert_different(y[0], y[1])


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_for_each_sample(name, passes):
    model = adapted(name)
    fields = {"coefficients": {"coefficients": KINDS[name][1]}}
    model.add_adapter("other", LoTRAConfig(r=3, init_weights=False, **fields))
    model.eval()
    x, names = torch.rand(6, 3), ["default", "other", "__base__", "default", "other", "other"]
    y = on_first_axis(name, model(x, adapter_names=names))
    assert len(passes) == 1
    for k, own in enumerate(names):
        assert_equal(y[k], on_first_axis(name, model(x, adapter_names=[own] * 6))[k])


@pytest.mark.parametrize("name", KINDS)
def test_gradients_by_the_tasks_and_by_the_adapter(name, passes):
    model = adapted(name, family=LAM, family_degree=2)
    x, lam = torch.rand(5, 3), torch.linspace(1.05, 1.5, 5).requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(rows):
        total = 0
        for own in rows:
            with at_task(model, lam=lam[own]):
                y = model(x[own])
            total = total + (on_first_axis(name, y) * torch.arange(1.0, 5)).sin().sum()
        return torch.autograd.grad(total, [lam, *parameters])

    together, apart = gradients([slice(None)]), gradients([slice(k, k + 1) for k in range(5)])
    assert len(passes) == 6
    for one, other in zip(together, apart, strict=True):
        assert_equal(one, other)


def test_as_many_samples_as_inputs(passes):
    """It is not clear then which axis has the samples, so that there is a pass for each task."""
    model = adapted("b i o", family=LAM, family_degree=2)
    x, lam = torch.rand(3, 3), torch.tensor([1.0, 1.3, 1.6])
    with at_task(model, lam=lam):
        y = model(x)
    assert len(passes) > 1
    for k, value in enumerate(lam):
        with at_task(model, lam=value):
            assert_equal(y[k], model(x)[k])


@pytest.mark.filterwarnings("ignore:std")
def test_pykan_takes_one_pass_for_each_layer(passes):
    from kan import KAN

    torch.manual_seed(0)
    base = KAN(width=[2, 5, 1], grid=4, k=3, auto_save=False, seed=0).double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(2, 3, None), family=LAM, family_degree=2))
    for layer in adapted_tensors(model).values():
        nn.init.normal_(layer.lotra_core["default"], std=0.5)
    x, lam = 2 * torch.rand(30, 2) - 1, torch.linspace(1, 1.6, 30)
    with at_task(model, lam=lam):
        y = model(x)
    assert len(passes) == 2
    for k in (0, 11, 29):
        with at_task(model, lam=lam[k]):
            assert_equal(y[k], model(x)[k])
