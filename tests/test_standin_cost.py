"""What an adapted layer costs: FLOPs, memory, and which way round is taken."""

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
from adapted_layers import adapt, adapted
from conftest import assert_different, assert_equal
from kan_layers import ChebyKANLayer, FastKANLayer, KANLinear
from layer_table import LAYERS, REGISTERED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import peft_lotra
from peft_lotra.standin import Adapted, placing, plan
from peft_lotra.standin.cost import DENSE, Core, Work, cheapest_order
from peft_lotra.standin.tensor import EagerStandIn

all_layers = pytest.mark.parametrize("name", LAYERS)
registered = pytest.mark.parametrize("name", REGISTERED)
PACKAGE = Path(peft_lotra.__file__).parent
WIDTH, BATCH, BASIS = 512, 256, 8
WIDE = {
    "efficient-kan": lambda: KANLinear(WIDTH, WIDTH),
    "fast-kan": lambda: FastKANLayer(WIDTH, WIDTH),
    "ChebyKAN": lambda: ChebyKANLayer(WIDTH, WIDTH, BASIS - 1),
}
wide = pytest.mark.parametrize("name", WIDE)


def wide_layer(name, adapters=1, dtype=torch.float32):
    return adapt(WIDE[name](), None, (BATCH, WIDTH), dtype, adapters=adapters)


def flops(model, x, device="meta"):
    """Of a forward pass and the gradients of the input and of what is trainable; meta tensors do for counting."""
    model = copy.deepcopy(model).to("meta") if device == "meta" else model
    with FlopCounterMode(display=False) as counter:
        model(x.detach().to(device).requires_grad_()).sum().backward()
    return counter.get_total_flops()


def saved(model, x):
    """The storages that a forward pass saves for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, sizes = [], {}

    def pack(tensor):
        kept.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return list(sizes.values())


@wide
def test_a_step_costs_what_the_frozen_layer_costs(name):
    base, model, x = wide_layer(name)
    assert flops(model, x) <= 1.05 * flops(base, x)
    full = copy.deepcopy(base).requires_grad_(True)
    assert flops(full, x) >= 1.4 * flops(base, x)


@wide
def test_nothing_of_the_size_of_the_coefficients_is_saved(name):
    base, model, x = wide_layer(name)
    floor, ours = sum(saved(base, x)), sum(saved(model, x))
    basis = 4 * BATCH * WIDTH * BASIS  # ∂L/∂U3 needs it
    assert ours <= 1.02 * (floor + basis)
    big = [size for size in saved(model, x) if size >= 4 * WIDTH * WIDTH * BASIS]
    assert len(big) == len([size for size in saved(base, x) if size >= 4 * WIDTH * WIDTH * BASIS])


@wide
def test_eight_adapters_cost_little_more_than_one(name):
    one, eight = (flops(*wide_layer(name, adapters)[1:]) for adapters in (1, 8))
    assert eight <= 1.35 * one


@wide
def test_the_cost_of_the_adapter_is_linear_in_the_batch(name):
    base, model, x = wide_layer(name)
    extra = [flops(model, x[:b]) - flops(base, x[:b]) for b in (BATCH // 2, BATCH)]
    assert 1.5 * extra[0] < extra[1] <= 2 * extra[0]


def test_the_cost_of_the_adapter_is_linear_in_the_inputs():
    extra = []
    for n in (256, 512):
        base, model, x = adapt(FastKANLayer(n, WIDTH), None, (BATCH, n))
        extra.append(flops(model, x) - flops(base, x))
    assert 1.5 * extra[0] < extra[1] <= 2 * extra[0]


def test_large_ranks_are_computed_densely_and_small_ones_thinly():
    n = m = 512
    work = Work(256, n * 8, n * 8, (n, m, 8), 1, "id", "cpu")

    def order(ranks, **others):
        return cheapest_order(work._replace(**others), tuple([Core(own, "") for own in ranks]))

    assert order(((8, 8, 4),)) == ""
    assert order(((8, 8, 4),) * 8) == ""
    assert "d" in order(((150, 150, 2),))
    assert order(((512, 512, 8),), positions=8192) == DENSE
    assert order(((512, 512, 8),), positions=8192, per_sample=True) != DENSE


def test_gradients_of_single_samples_are_never_taken_of_the_dense_update(monkeypatch):
    """They would be a tensor of A's size for each. A single gradient of so small a layer is cheapest that way."""
    base, model, x = adapt(ChebyKANLayer(32, 32, BASIS - 1), None, (64, 32))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    orders = []

    def recorded(*sizes):
        orders.append(cheapest_order(*sizes))
        return orders[-1]

    monkeypatch.setattr(plan, "cheapest_order", recorded)
    plan._plan.cache_clear()

    def of_sample(p, sample):
        slope = torch.func.grad(
            lambda x: torch.func.functional_call(model, p, x[None]).sum()
        )  # as in a PDE's residual
        return slope(sample).square().sum()

    torch.func.grad(lambda p: of_sample(p, x[0]))(parameters)
    assert orders == [DENSE]
    torch.func.vmap(torch.func.grad(lambda sample: of_sample(parameters, sample)))(x)  # by the inputs, not the factors
    assert set(orders) == {DENSE}
    torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 0))(parameters, x)
    assert orders[-1] != DENSE
    plan._plan.cache_clear()


@all_layers
def test_a_disabled_or_merged_adapter_has_no_stand_in(name, monkeypatch):
    _, model, x = adapted(name)
    y = model(x)

    def refuse(*args):
        raise AssertionError("a stand-in was made")

    monkeypatch.setattr(placing, "handle_of", refuse)
    with pytest.raises(AssertionError, match="stand-in"):
        model(x)
    with model.disable_adapter():
        assert_different(model(x), y)
    model.merge_adapter()
    assert_equal(model(x), y)


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation has made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                storage = tensor.untyped_storage().data_ptr()
                known = any(isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == storage for a in args)
                self.entries = max(self.entries, 0 if known else tensor.numel())
        return result


@pytest.mark.parametrize("safe_merge", [False, True])
@wide
def test_merging_needs_no_second_copy_of_the_coefficients(name, safe_merge):
    base, model, x = wide_layer(name, dtype=torch.float64)
    y = model(x)
    with Largest() as made:
        merged = model.merge_and_unload(safe_merge=safe_merge)
    assert made.entries <= WIDTH * WIDTH * BASIS / 12
    assert_different(y, base(x))
    assert_equal(merged(x), y)


@registered
def test_nothing_of_a_pass_is_left_when_it_ends(name):
    """Not even until Python looks for cycles: a stand-in may hold A times its scale."""

    def left():
        return [type(thing) for thing in gc.get_objects() if type(thing) in (EagerStandIn, Adapted)]

    _, model, x = adapted(name)
    gc.freeze()  # other tests' failures may hold some
    gc.disable()
    try:
        assert model(x).requires_grad
        assert not left()
        with torch.no_grad():
            model(x)
        assert not left()
    finally:
        gc.enable()
        gc.unfreeze()


def calls(function):
    """How many Python functions of the package are called."""
    count = 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE))

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("name", "most"), [("ChebyKAN", 60), ("fast-kan", 60), ("efficient-kan", 85)])
@pytest.mark.parametrize("width", [8, 64])
def test_a_planned_pass_makes_few_calls(name, width, most):
    layers = {"ChebyKAN": lambda n: ChebyKANLayer(n, n, 7), "fast-kan": lambda n: FastKANLayer(n, n)}
    layers["efficient-kan"] = lambda n: KANLinear(n, n)
    _, model, x = adapt(layers[name](width), None, (16, width), r=(4, 4, 4))
    first = calls(lambda: model(x))
    assert calls(lambda: model(x)) <= min(most, first)
