"""Samples are on the first axis of a layer's first tensor, or on the axis that is named; derivatives by tasks."""

import copy
import re

import pytest
import torch
from conftest import FULLGRAPH, assert_different, assert_equal, parts
from family_models import LAM, at, fill, polynomials
from kan_layers import ChebyKANLayer, FastKANLayer, MatrixKANLayer
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, at_task
from peft_lotra.testing import dense_model

WEIGHT = {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}
BATCH = 6
TASKS = torch.tensor([1.0, 1.5, 1.0, 1.2, 1.5, 1.6], dtype=torch.float64)
NAMES = ["default", "two", "__base__", "two", "default", "default"]


class Turned(MatrixKANLayer):
    """Swaps the first two axes and back, so that they have other places where the weight is used."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def stack(kind):
    """Two layers of features on the last axis, whatever comes before; what a config says of them."""
    torch.manual_seed(1)
    if kind == "nn.Linear":
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double(), {"target_modules": "all-linear"}
    if kind == "FastKAN":
        return nn.Sequential(FastKANLayer(3, 5), FastKANLayer(5, 4)).double(), {}
    layer = {"matrix": MatrixKANLayer, "turned": Turned}[kind]
    return nn.Sequential(layer(3, 5), layer(5, 4)).double(), {"coefficients": WEIGHT}


def with_family(base, **kwargs):
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, family=LAM, **kwargs))
    fill(model)
    return model.eval()


def with_two(base, **kwargs):
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, **kwargs))
    model.add_adapter("two", LoTRAConfig(r=1, **kwargs))
    fill(model)
    return model.eval()


def sample_by_sample(oracles, x, axis):
    """The dense oracle of each sample, with its sample alone."""
    return torch.cat([net(part) for net, part in zip(oracles, x.split(1, axis), strict=True)], axis)


def of_tasks(base, model, tasks):
    return [at(base, model, polynomials(value.item())) for value in tasks.detach()]


def of_names(base, model, names):
    oracles = {name: dense_model(base, model, {name: 1.0}) for name in ("default", "two")} | {"__base__": base}
    return [oracles[name] for name in names]


KINDS = pytest.mark.parametrize("kind", ["matrix", "turned", "nn.Linear", "FastKAN"])


# The axis ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5, BATCH, 12])
@KINDS
def test_tokens_come_first_and_the_caller_names_the_axis(kind, tokens):
    base, said = stack(kind)
    x = torch.rand(tokens, BATCH, 3, dtype=torch.float64) * 1.6 - 0.8
    model = with_family(base, **said)
    expected = sample_by_sample(of_tasks(base, model, TASKS), x, 1)
    assert_different(expected, base(x))
    with at_task(model, lam=TASKS, batch_axis=1):
        assert_equal(model(x), expected)
    with at_task(model, lam=TASKS, batch_axis=-2):
        assert_equal(model(x), expected)
    assert_equal(model(x, lotra_task=TASKS, batch_axis=1), expected)
    model = with_two(base, **said)
    expected = sample_by_sample(of_names(base, model, NAMES), x, 1)
    assert_equal(model(x, adapter_names=NAMES, batch_axis=1), expected)
    with pytest.raises(ValueError, match="`batch_axis`=1 without `adapter_names` or `lotra_task`"):
        model(x, batch_axis=1)


@pytest.mark.parametrize("tokens", [5, BATCH, 12])
@KINDS
def test_the_first_axis_is_the_default(kind, tokens):
    base, said = stack(kind)
    x = torch.rand(BATCH, tokens, 3, dtype=torch.float64) * 1.6 - 0.8
    model = with_family(base, **said)
    expected = sample_by_sample(of_tasks(base, model, TASKS), x, 0)
    with at_task(model, lam=TASKS):
        assert_equal(model(x), expected)
        if tokens == BATCH:  # the same sizes, the other way round: nothing tells which axis is meant
            turned = sample_by_sample(of_tasks(base, model, TASKS), x.transpose(0, 1), 0)
            assert_equal(model(x.transpose(0, 1)), turned)
        else:
            with pytest.raises(ValueError, match=re.escape(f"axis 0 of its first tensor has {tokens}")):
                model(x.transpose(0, 1))
    model = with_two(base, **said)
    assert_equal(model(x, adapter_names=NAMES), sample_by_sample(of_names(base, model, NAMES), x, 0))
    if tokens != BATCH:
        with pytest.raises(ValueError, match=f"Length of `adapter_names` .* got {BATCH} and {tokens} respectively"):
            model(x.transpose(0, 1), adapter_names=NAMES)


@pytest.mark.parametrize("axis", [2, -1])
def test_the_axis_of_features_has_no_samples(axis):
    """Even if it is as long as there are samples."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(BATCH, BATCH)).double()
    x = torch.rand(4, 5, BATCH, dtype=torch.float64)
    model = with_family(base, target_modules="all-linear")
    with at_task(model, lam=TASKS, batch_axis=axis), pytest.raises(ValueError, match="`batch_axis`=.* last axis"):
        model(x)
    with at_task(model, lam=TASKS, batch_axis=1), pytest.raises(ValueError, match="`batch_axis`=1 .* last axis"):
        model(x.flatten(0, 1))
    model = with_two(base, target_modules="all-linear")
    with pytest.raises(ValueError, match="`batch_axis`=.* last axis"):
        model(x, adapter_names=NAMES, batch_axis=axis)


@pytest.mark.parametrize("axis", ["first", 1.0, True, None])
def test_an_axis_that_is_none(axis):
    base, said = stack("matrix")
    model = with_family(base, **said)
    with pytest.raises(
        TypeError, match=re.escape(f"`batch_axis` should be an integer but the value passed is {axis!r}")
    ):
        with at_task(model, lam=TASKS, batch_axis=axis):
            pass
    x = torch.rand(BATCH, 3, dtype=torch.float64)
    if axis is not None:
        with pytest.raises(TypeError, match="`batch_axis` should be an integer"):
            model(x, lotra_task=TASKS, batch_axis=axis)
    for far in (3, -4):
        with at_task(model, lam=TASKS, batch_axis=far), pytest.raises(ValueError, match=f"`batch_axis`={far}"):
            model(x)


def test_names_and_tasks_have_one_axis():
    base, said = stack("matrix")
    model = with_family(base, **said)
    x = torch.rand(5, BATCH, 3, dtype=torch.float64)
    names = ["default", "__base__"] * 3
    expected = sample_by_sample(of_tasks(base, model, TASKS), x, 1)
    with at_task(model, lam=TASKS, batch_axis=1):
        y = model(x, adapter_names=names, batch_axis=1)
        with pytest.raises(ValueError, match="`batch_axis`"):
            model(torch.rand(BATCH, BATCH, 3, dtype=torch.float64), adapter_names=names)
    assert_equal(y[:, ::2], expected[:, ::2])
    assert_equal(y[:, 1::2], base(x)[:, 1::2])
    assert_equal(model(x, adapter_names=names, lotra_task=TASKS, batch_axis=1), y)


def test_a_layer_that_flattens_leading_axes():
    """ChebyKAN makes rows of (batch, tokens), in this order. With tokens first, rows of a sample are not together."""
    torch.manual_seed(1)
    base = nn.Sequential(ChebyKANLayer(3, 4, 3)).double()
    model = with_family(base)
    x = torch.rand(BATCH, 4, 3, dtype=torch.float64) - 0.5
    with at_task(model, lam=TASKS):
        assert_equal(model(x), sample_by_sample(of_tasks(base, model, TASKS), x, 0))
    for tokens in (4, BATCH):
        x = torch.rand(tokens, BATCH, 3, dtype=torch.float64) - 0.5
        with (
            at_task(model, lam=TASKS, batch_axis=1),
            pytest.raises(ValueError, match="do not belong to single samples"),
        ):
            model(x)


def test_trained_copies_want_samples_first():
    net = nn.Sequential()
    net.add_module("kan", ChebyKANLayer(3, 4, 3))
    net.add_module("head", nn.Linear(4, 2))
    model = get_peft_model(net.double(), LoTRAConfig(r=2, modules_to_save=["head"])).eval()
    x = torch.rand(5, BATCH, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="`batch_axis`=1 .*`modules_to_save`"):
        model(x, adapter_names=["default"] * BATCH, batch_axis=1)


@pytest.mark.skipif(not FULLGRAPH, reason="before torch 2.13, adapted layers run between graphs")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.slow
def test_compiled(axis):
    base, said = stack("matrix")
    model = with_family(base, **said)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.rand(*((BATCH, 5) if axis == 0 else (5, BATCH)), 3, dtype=torch.float64)
    for tasks in (TASKS, TASKS.flip(0)):
        expected = sample_by_sample(of_tasks(base, model, tasks), x, axis)
        with at_task(model, lam=tasks, batch_axis=axis):
            assert_equal(compiled(x), expected)
        assert_equal(compiled(x, lotra_task=tasks, batch_axis=axis), expected)


# Derivatives by the task ---------------------------------------------------------------------------------------------


def convolution():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Conv1d(4, 2, 3)).double()
    return base, with_family(base, target_modules="all-linear"), torch.rand(BATCH, 3, 7, dtype=torch.float64)


def matrix():
    base, said = stack("matrix")
    return base, with_family(base, **said), torch.rand(BATCH, 3, dtype=torch.float64)


def ambiguous():
    base, said = stack("matrix")
    return base, with_family(base, **said), torch.rand(BATCH, BATCH, 3, dtype=torch.float64)


class Dense(nn.Module):
    """The model with Δ formed densely at the task of one sample after the other; c by a power series of numpy."""

    def __init__(self, base, model):
        super().__init__()
        self.base, self.model = base, model

    def forward(self, x, lam):
        rows = []
        for k in range(len(x)):
            z = 2 * (lam[k] - 1.0) / 0.6 - 1
            one, two = z, 2 * z**2 - 1
            c = torch.stack([torch.ones_like(z), one, two, 4 * z**3 - 3 * z, 8 * z**4 - 8 * z**2 + 1])
            weights = {}
            for name, module in self.base.named_modules():
                if hasattr(module, "weight"):
                    layer = self.model.base_model.model.get_submodule(name)
                    core, *sides = parts(layer.tucker("default").map(torch.Tensor.detach))
                    G = core @ c
                    sides = [
                        torch.eye(n).double() if U is None else U for n, U in zip(G.shape, sides[:3], strict=False)
                    ]
                    dense = torch.einsum("abd...,ia,ob,jd->oij...", G, *sides)
                    dense = dense.reshape(module.weight.shape)  # o (i d), or o i and the kernel with d = 1
                    weights[f"{name}.weight"] = module.weight + dense
            rows.append(torch.func.functional_call(self.base, weights, x[k : k + 1]))
        return torch.cat(rows)


MODELS = pytest.mark.parametrize("make", [convolution, matrix, ambiguous])


def both(make):
    base, model, x = make()
    dense = Dense(base.requires_grad_(False), model.requires_grad_(False))

    def adapted(lam):
        with at_task(model, lam=lam):
            return model(x)

    assert len(TASKS.unique()) < len(TASKS)
    assert_equal(adapted(TASKS), dense(x, TASKS))
    return adapted, lambda lam: dense(x, lam)


@MODELS
def test_reverse_mode(make):
    adapted, dense = both(make)
    lam = TASKS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dense(lam).square().sum(), lam)
    assert (expected != 0).all()
    assert_equal(torch.autograd.grad(adapted(lam).square().sum(), lam)[0], expected)
    assert_equal(torch.func.grad(lambda lam: adapted(lam).square().sum())(TASKS), expected)
    assert_equal(torch.func.jacrev(adapted)(TASKS), torch.func.jacrev(dense)(TASKS))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@MODELS
def test_forward_mode(make):
    """Along a direction that differs between samples of the same task."""
    adapted, dense = both(make)
    v = torch.linspace(-1, 2, BATCH, dtype=torch.float64)
    expected = torch.func.jvp(dense, (TASKS,), (v,))[1]
    assert_equal(torch.func.jvp(adapted, (TASKS,), (v,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        y = adapted(torch.autograd.forward_ad.make_dual(TASKS, v))
        assert_equal(torch.autograd.forward_ad.unpack_dual(y).tangent, expected)
    assert_equal(torch.func.jacfwd(adapted)(TASKS), torch.func.jacrev(dense)(TASKS))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@MODELS
def test_second_order(make):
    adapted, dense = both(make)
    loss = [lambda lam, f=f: f(lam).square().sum() for f in (adapted, dense)]
    expected = torch.func.hessian(loss[1])(TASKS)
    assert (expected.diagonal() != 0).all()
    assert_equal(torch.func.hessian(loss[0])(TASKS), expected)
    lam = TASKS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss[0](lam), lam, create_graph=True)
    assert_equal(torch.autograd.grad(slope.sum(), lam)[0], expected.sum(0))


@MODELS
def test_without_derivatives_by_the_task_there_is_a_pass_for_each_distinct_one(make):
    _, model, x = make()
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "base_layer")).base_layer
    layer.register_forward_hook(lambda *_: seen.append(1))
    with at_task(model, lam=TASKS):
        model(x)
    assert len(seen) == (1 if make is matrix else len(TASKS.unique()))
    seen.clear()
    with at_task(model, lam=TASKS.clone().requires_grad_()):
        model(x)
    assert len(seen) == (1 if make is matrix else BATCH)
