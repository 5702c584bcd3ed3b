"""A pass that a backward pass repeats has the context of the pass that it repeats, or is refused."""

import copy
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FULLGRAPH, assert_different, assert_equal
from family_models import LAM, X, fill, kan, polynomials
from kan_layers import ChebyKANLayer, chebyshev
from layer_table import lotra_layers
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig, at_task
from peft_lotra.testing import dense_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

TOLD = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="before torch 2.8, a checkpoint cannot be told its context",
)
VALUES = torch.linspace(1, 1.6, 8, dtype=torch.float64)
NAMES = ["default", "two", "__base__", "default", "two", "two", "__base__", "default"]
UNKNOWN = r"repeats a pass.*`use_reentrant=False`"
once = partial(checkpoint, use_reentrant=False)
again = partial(checkpoint, use_reentrant=True)


def cores(model):
    return [p for n, p in model.named_parameters() if "lotra_core" in n]


def gradients(model, y):
    return torch.autograd.grad(y.square().sum(), cores(model), allow_unused=True)


def accumulated(model, backward):
    """Gradients of all cores after `backward()`, which may be reentrant."""
    for core in cores(model):
        core.grad = None
    backward()
    return [core.grad for core in cores(model)]


def assert_all_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert e.any()
        assert_equal(a, e)


def oracle(base, model, value):
    """Gradients by the cores, of the dense oracle: those by Δ's core at the task, times c(task)."""
    one = copy.deepcopy(model)
    found = []
    for layer in lotra_layers(one).values():
        core = layer.lotra_core["default"].detach()
        layer._modules["lotra_core"]._parameters["default"] = (core @ polynomials(value)).requires_grad_()
        layer.terms["default"] = 0
        found.append(layer.lotra_core["default"])
    by_core = torch.autograd.grad(dense_model(base, one)(X).square().sum(), found)
    return [g[..., None] * polynomials(value) for g in by_core]


class Blocks(nn.Module):
    """Two KAN layers, of which the caller's function runs each."""

    def __init__(self, run):
        super().__init__()
        self.first, self.second, self.run = ChebyKANLayer(3, 6, 3), ChebyKANLayer(6, 4, 3), run

    def forward(self, x):
        return self.run(self.second, self.run(self.first, x))


def blocks(run, **kwargs):
    torch.manual_seed(1)
    model = get_peft_model(Blocks(run).double(), LoTRAConfig(r=2, **kwargs))
    fill(model)
    return model


# Families ------------------------------------------------------------------------------------------------------------


@TOLD
def test_a_backward_pass_inside_of_another_task():
    base, model = kan()
    expected = oracle(base, model, 1.5)
    with at_task(model, lam=1.5):
        y = once(model, X)
        assert_all_equal(gradients(model, model(X)), expected)
    with at_task(model, lam=1.1):
        assert_all_equal(gradients(model, y), expected)
    assert_different(expected[0], oracle(base, model, 1.1)[0])
    with at_task(model, lam=1.5):
        y = once(model, X)
    assert_all_equal(gradients(model, y), expected)  # and outside of every task


@TOLD
def test_two_passes_before_their_backward_passes():
    base, model = kan()
    outputs = []
    for value in (1.5, 1.1, 1.3):
        with at_task(model, lam=value):
            outputs.append(once(model, X))
    for y, value in zip(outputs, (1.5, 1.1, 1.3), strict=True):
        assert_all_equal(gradients(model, y), oracle(base, model, value))
    with at_task(model, lam=1.6):
        outputs = [once(model, X)]
    with at_task(model, lam=1.0):
        outputs.append(once(model, X))
        total = gradients(model, torch.cat(outputs))
    parts = zip(oracle(base, model, 1.6), oracle(base, model, 1.0), strict=True)
    assert_all_equal(total, [a + b for a, b in parts])


@TOLD
def test_a_backward_pass_in_another_thread():
    base, model = kan()
    with at_task(model, lam=1.5):
        y = once(model, X)
    found = []

    def work():
        with at_task(model, lam=1.1):
            found.append(gradients(model, y))

    with at_task(model, lam=1.2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert_all_equal(found[0], oracle(base, model, 1.5))


@TOLD
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints_inside_of_a_model_and_of_each_other(early_stop):
    """A checkpoint of which the first adapted layer is in another checkpoint."""
    twice = partial(once, once)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        for run in (once, twice, lambda f, x: once(lambda x: once(f, x), x)):
            model, plain = blocks(run, family=LAM), blocks(lambda f, x: f(x), family=LAM)
            with at_task(plain, lam=1.5):
                expected = gradients(plain, plain(X))
            for call in (model, lambda x, model=model: once(model, x)):
                with at_task(model, lam=1.5):
                    y = call(X)
                with at_task(model, lam=1.1):
                    assert_all_equal(gradients(model, y), expected)
                y = once(lambda x, model=model: model(x, lotra_task=1.5), X)
                assert_all_equal(gradients(model, y), expected)
                y = model(X, lotra_task=1.5)
                with at_task(model, lam=1.1):
                    assert_all_equal(gradients(model, y), expected)


@TOLD
def test_a_task_that_the_repeated_code_enters():
    """What is around it stays that of the first time, before and after."""
    base, model = kan()

    def both(x):
        y = model(x)
        with at_task(model, lam=1.1):
            z = model(x)
        return y + z + model(x)

    with at_task(model, lam=1.5):
        expected = gradients(model, both(X))
        y = once(both, X)
    with at_task(model, lam=1.3):
        assert_all_equal(gradients(model, y), expected)
    for first in (True, False):  # with nothing of ours before it

        def inner(x, first=first):
            with at_task(model, lam=1.1):
                y = model(x)
            return y if first else y + model(x)

        with at_task(model, lam=1.5):
            expected, y = gradients(model, inner(X)), once(inner, X)
        with at_task(model, lam=1.3):
            assert_all_equal(gradients(model, y), expected)


@TOLD
def test_a_task_for_every_sample_and_its_gradient():
    base, model = kan()
    lam = VALUES.clone().requires_grad_()
    with at_task(model, lam=lam):
        expected = torch.autograd.grad(model(X).square().sum(), [lam, *cores(model)], retain_graph=True)
        y = once(model, X)
    with at_task(model, lam=VALUES.flip(0)):
        actual = torch.autograd.grad(y.square().sum(), [lam, *cores(model)])
    assert_all_equal(actual, expected)


@TOLD
def test_other_hooks_of_saved_tensors_around_and_inside():
    base, model = kan()

    def saved(x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    with at_task(model, lam=1.5):
        outputs = [once(saved, X), once(lambda x: once(saved, x), X)]
        with torch.autograd.graph.save_on_cpu():
            outputs.append(once(model, X))
    with at_task(model, lam=1.1):
        for y in outputs:
            assert_all_equal(gradients(model, y), oracle(base, model, 1.5))


@TOLD
def test_derivatives_of_derivatives():
    _, model = kan()
    x = X.clone().requires_grad_()
    with at_task(model, lam=1.5):
        outputs = [model(x), once(model, x)]
    found = []
    with at_task(model, lam=1.1):
        for y in outputs:
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append(gradients(model, slope))
    assert_all_equal(found[1], found[0])


@TOLD
@pytest.mark.skipif(not FULLGRAPH, reason="before torch 2.13, adapted layers run between graphs")
@pytest.mark.parametrize("around", [True, False], ids=["of compiled code", "in compiled code"])
@pytest.mark.slow
def test_checkpoints_and_compiled_code(around):
    base, model = kan()
    if around:
        net = partial(once, torch.compile(model, backend="aot_eager"))
    else:
        net = torch.compile(lambda x: once(model, x), backend="aot_eager")
    for value in (1.5, 1.3):
        with at_task(model, lam=value):
            y = net(X)
        with at_task(model, lam=1.1):
            assert_all_equal(gradients(model, y), oracle(base, model, value))
    if around:
        with at_task(model, lam=1.5):
            y = again(net.args[0], X.clone().requires_grad_())
        with at_task(model, lam=1.1), pytest.raises(RuntimeError, match=UNKNOWN):
            y.square().sum().backward()


def test_reentrant_checkpoints_of_families_are_refused():
    """The context of the repeated pass is not known, whatever is around; unless the repeated code enters it."""
    base, model = kan()
    x = X.clone().requires_grad_()
    for around in (1.5, 1.1):
        with at_task(model, lam=1.5):
            y = again(model, x)
        with at_task(model, lam=around), pytest.raises(RuntimeError, match=UNKNOWN):
            y.square().sum().backward()

    def at_one(x):
        with at_task(model, lam=1.5):
            return model(x)

    with at_task(model, lam=1.1):
        y = again(at_one, x)
        assert_all_equal(accumulated(model, y.square().sum().backward), oracle(base, model, 1.5))
        y = again(lambda x: model(x, lotra_task=1.5), x)
    assert_all_equal(accumulated(model, y.square().sum().backward), oracle(base, model, 1.5))


# Names ---------------------------------------------------------------------------------------------------------------


def mixed(run=None):
    """A model with two adapters, as a whole or in checkpointed blocks, and its gradients without checkpoints."""
    model = kan(family=None)[1] if run is None else blocks(run)
    model.add_adapter("two", LoTRAConfig(r=2))
    fill(model)
    for name in cores(model):
        name.requires_grad_()
    model.eval()
    plain = copy.deepcopy(model)
    if run is not None:
        plain.base_model.model.run = lambda f, x: f(x)
    expected = gradients(plain, plain(X, adapter_names=NAMES))
    assert_different(expected[0], gradients(plain, plain(X))[0])
    return model, expected


@TOLD
@pytest.mark.parametrize("run", [None, once, partial(once, once)], ids=["around", "inside", "nested"])
def test_adapters_by_sample(run):
    model, expected = mixed(run)
    call = model if run is not None else partial(once, model)
    y = call(X, adapter_names=NAMES)
    other = call(X, adapter_names=NAMES[::-1])
    plain = call(X)
    model.set_adapter("default")
    for core in cores(model):
        core.requires_grad_()
    assert_all_equal(gradients(model, y), expected)
    assert_different(gradients(model, other)[0], expected[0])
    found = gradients(model, plain)
    assert found[0].any()
    assert found[1] is None  # of the adapter that was not active


def test_reentrant_checkpoints_of_adapters_by_sample_are_refused():
    model, expected = mixed(again)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=UNKNOWN):
        model(x, adapter_names=NAMES).square().sum().backward()
    whole, expected = mixed()
    y = again(lambda x: whole(x, adapter_names=NAMES), x)
    assert_all_equal(accumulated(whole, y.square().sum().backward), expected)


def test_reentrant_checkpoints_without_names_stay_as_they_are():
    model, plain = blocks(again), blocks(lambda f, x: f(x))
    x = X.clone().requires_grad_()
    expected = gradients(plain, plain(x))
    for call in (model, partial(again, plain)):
        y = call(x)
        own = model if call is model else plain
        assert_all_equal(accumulated(own, y.square().sum().backward), expected)


@TOLD
def test_trained_copies_by_sample():
    net = nn.Sequential()
    net.add_module("kan", ChebyKANLayer(3, 5, 3))
    net.add_module("head", nn.Linear(5, 2))
    model = get_peft_model(net.double(), LoTRAConfig(r=2, modules_to_save=["head"]))
    model.add_adapter("two", LoTRAConfig(r=2, modules_to_save=["head"]))
    fill(model)
    copies = model.base_model.model.head.modules_to_save
    nn.init.normal_(copies["two"].weight)
    model.eval()
    for p in (*cores(model), *copies.parameters()):
        p.requires_grad_()
    wanted = [*cores(model), *copies.parameters()]
    expected = torch.autograd.grad(model(X, adapter_names=NAMES).square().sum(), wanted)
    kan_, head, inside = model.base_model.model.kan, model.base_model.model.head, nn.Sequential.forward
    try:
        nn.Sequential.forward = lambda self, x: once(head, once(kan_, x))
        y = model(X, adapter_names=NAMES)
    finally:
        nn.Sequential.forward = inside
    assert_all_equal(torch.autograd.grad(y.square().sum(), wanted), expected)


# transformers --------------------------------------------------------------------------------------------------------


def transformer(checkpointed, **kwargs):
    torch.manual_seed(1)
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 32, "kan_hidden_size": 12, "kan_degree": 3, "pad_token_id": 0}
    base = TransformerKANForCausalLM(TransformerKANConfig(**sizes)).double()
    model = get_peft_model(base, LoTRAConfig(r=2, alpha=2.0, **kwargs))
    fill(model)
    if checkpointed is not None:
        base.gradient_checkpointing_enable({"use_reentrant": checkpointed})
        base.enable_input_require_grads()
    for module in model.modules():  # transformers checkpoints in training mode only, and this has no dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [pytest.param(False, marks=TOLD), True])
def test_gradient_checkpointing_of_transformers(reentrant):
    tokens = torch.randint(1, 23, (4, 9), generator=torch.Generator().manual_seed(5))
    names = ["a", "b", "b", "a"]
    model, plain = transformer(reentrant, family=["a", "b"]), transformer(None, family=["a", "b"])
    expected = accumulated(plain, plain(input_ids=tokens, labels=tokens, lotra_task=names).loss.backward)
    with at_task(plain, task="b"):
        other = accumulated(plain, plain(input_ids=tokens, labels=tokens).loss.backward)
    assert_different(expected[0], other[0])
    loss = model(input_ids=tokens, labels=tokens, lotra_task=names).loss
    with at_task(model, task="b"):
        if reentrant:
            with pytest.raises(RuntimeError, match=UNKNOWN):
                loss.backward()
        else:
            assert_all_equal(accumulated(model, loss.backward), expected)
            loss = model(input_ids=tokens, labels=tokens).loss
    if not reentrant:
        assert_all_equal(accumulated(model, loss.backward), other)


class Checkpointing(nn.Module):
    """Has a checkpoint in its own forward, and gives it its coefficients in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.c = how, nn.Parameter(torch.randn(3, 4, 5))

    def contract(self, x, c=None):
        return torch.einsum("bid,iod->bo", chebyshev(torch.tanh(x), 4), self.c if c is None else c)

    def forward(self, x):
        if self.how == "reads them inside":
            return once(self.contract, x)
        if self.how == "takes them as an argument":
            return once(self.contract, x, self.c)
        if self.how == "in another checkpoint":
            return once(lambda x: once(self.contract, x) + self.contract(x), x) / 2
        return self.contract(x)


@TOLD
@pytest.mark.parametrize("r", [2, None])
@pytest.mark.parametrize("family", [None, LAM])
@pytest.mark.parametrize("how", ["reads them inside", "takes them as an argument", "in another checkpoint"])
def test_layers_that_checkpoint_their_own_code(how, family, r):
    found = []
    for own in ("plain", how):
        torch.manual_seed(0)
        fields = {"r": (r, r, r), "coefficients": {"c": "i o d"}, "family": family}
        model = get_peft_model(nn.Sequential(Checkpointing(own)), LoTRAConfig(**fields, init_weights=False))
        x = torch.rand(6, 3, requires_grad=True)
        if family:
            with at_task(model, lam=torch.linspace(1, 1.6, 6)):
                y = model(x)
        else:
            y = model(x)
        y.sin().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)
