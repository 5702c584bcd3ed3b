"""The stand-in in whole layers: gradients, cost, memory, compilation, autocast, checkpointing, transforms, threads."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import FULLGRAPH, TOLERANCE, assert_different, assert_equal
from kan_layers import ChebyKANLayer, FastKANLayer, KANLinear, PreActivatedKANLayer
from layer_table import LAYERS, REGISTERED
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peft_lotra import LoTRAConfig, LoTRALayer, PerformanceWarning, slim_kan
from peft_lotra.layer import adapted_tensors
from peft_lotra.standin import placing
from peft_lotra.standin.cost import DENSE, ORDERS, cheapest_order
from peft_lotra.standin.tensor import StandIn
from peft_lotra.testing import dense_model, forced_order, forget_warnings

FLAT = (9, 6)
all_layers = pytest.mark.parametrize("name", LAYERS)
registered = pytest.mark.parametrize("name", REGISTERED)


@pytest.fixture
def order(request):
    """Contractions go this way round; the one that is counted as the cheapest for "counted"."""
    with nullcontext() if request.param == "counted" else forced_order(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _forget_warnings():
    forget_warnings()


class First(nn.Module):
    """The first output of a layer that may have more."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def adapted(name, dtype=torch.float64, adapters=1, r=(2, 3, 2)):
    """The base, an adapted copy, an input."""
    row = LAYERS[name]
    r = (r[0], min(r[1], row.sizes[1]), r[2])
    return adapt(row.make(), row.declared, row.sample(dtype).shape, dtype, adapters, r)


def adapt(layer, coefficients, shape, dtype=torch.float32, adapters=1, r=(8, 8, 4)):
    base = First(layer)
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data = tensor.data.to(dtype)
    config = LoTRAConfig(r=r, init_weights=False, alpha=0.7, coefficients=coefficients or {})
    model = get_peft_model(copy.deepcopy(base), config)
    for k in range(1, adapters):
        model.add_adapter(f"adapter {k}", config)
    model.base_model.set_adapter(["default", *(f"adapter {k}" for k in range(1, adapters))])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return base.requires_grad_(False), model, (torch.rand(shape, dtype=dtype) * 1.6 - 0.8).requires_grad_()


def dense(base, model):
    """x -> the output of the dense oracle, made anew: each result may be differentiated once."""
    return lambda x: dense_model(base, model)(x)


def factors_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


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
    y, expected = model(x), dense(base, model)(x)
    assert_different(y, base(x))
    assert_equal(y, expected, 3e-5)


def test_an_undeclared_scale_is_warned_of_and_exact():
    base, model, x = adapt(PreActivatedKANLayer(6, 5), {"coeffs": "i o d"}, FLAT, torch.float64, r=2)
    with pytest.warns(PerformanceWarning, match="PreActivatedKANLayer calls `einsum`"):
        y = model(x)
    assert_different(y, base(x))
    assert_equal(y, dense(base, model)(x))


# Cost and memory -----------------------------------------------------------------------------------------------------

WIDTH, BATCH, BASIS = 512, 256, 8
WIDE = {
    "efficient-kan": lambda: KANLinear(WIDTH, WIDTH),
    "fast-kan": lambda: FastKANLayer(WIDTH, WIDTH),
    "ChebyKAN": lambda: ChebyKANLayer(WIDTH, WIDTH, BASIS - 1),
}
wide = pytest.mark.parametrize("name", WIDE)


def wide_layer(name, adapters=1, r=(8, 8, 4)):
    return adapt(WIDE[name](), None, (BATCH, WIDTH), adapters=adapters, r=r)


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
    sizes = {"positions": 256, "depth": n * 8, "terms": n * 8, "modes": (n, m, 8), "kernel": 1, "on_x": "id"}
    sizes |= {"device": "cpu"}
    assert cheapest_order(**sizes, ranks=((8, 8, 4),)) == ""
    assert cheapest_order(**sizes, ranks=((8, 8, 4),) * 8) == ""
    assert "d" in cheapest_order(**sizes, ranks=((150, 150, 2),))
    assert cheapest_order(**sizes | {"positions": 8192}, ranks=((512, 512, 8),)) == DENSE


@wide
def test_a_slim_layer_costs_what_its_factors_cost(name):
    """A = 0, held as one zero: the base contraction is skipped, also for coefficients that a number multiplies."""
    base, x = First(WIDE[name]()), torch.rand(BATCH, WIDTH) * 1.6 - 0.8
    full = flops(base, x)
    model = slim_kan(copy.deepcopy(base), r=(round(0.29 * WIDTH), round(0.29 * WIDTH), 2))
    for path in adapted_tensors(model):
        nn.init.zeros_(base.get_parameter(path))
    assert_different(model(x), base(x))
    assert_equal(model(x), dense(base, model)(x), 1e-4)
    # the residual of efficient-kan and fast-kan, which no adapter changes
    residual = 0 if name == "ChebyKAN" else 4 * BATCH * WIDTH**2
    assert flops(model, x) - residual <= 0.25 * (full - 1.5 * residual)


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


# What it works under -------------------------------------------------------------------------------------------------


@all_layers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile(name):
    """In one graph, before any eager call."""
    base, model, x = adapted(name)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=FULLGRAPH, backend="aot_eager" if name in REGISTERED else "eager")(x)
    assert_different(y, base(x))
    expected = dense(base, model)(x)
    assert_equal(y, expected)
    inputs = [x, *factors_of(model)]
    for a, e in zip(*(torch.autograd.grad(z.square().sum(), inputs) for z in (y, expected)), strict=True):
        assert_equal(a, e, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@registered
def test_autocast(name, dtype):
    base, model, x = adapted(name, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y, plain = model(x), base(x)
    assert_different(y.float(), base(x))
    assert y.dtype == plain.dtype
    assert_equal(y.float(), model(x), 2 * TOLERANCE[torch.bfloat16])
    y.float().square().sum().backward()
    assert all(factor.grad.dtype == torch.float32 and factor.grad.any() for factor in factors_of(model))


@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REGISTERED[1:])
def test_16_bit_bases(name, dtype, factor_dtype):
    base, model, x = adapted(name, dtype)
    for factor in factors_of(model):
        factor.data = factor.data.to(factor_dtype or dtype)
    y = model(x)
    assert y.dtype == dtype
    assert_different(y, base(x))
    expected = dense(base.double(), copy.deepcopy(model).double())(x.double())
    assert_equal(y.double(), expected, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("use_reentrant", [False, True])
@registered
def test_checkpointing(name, use_reentrant):
    _, model, x = adapted(name)
    inputs = [x, *factors_of(model)]
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    for tensor in inputs:
        tensor.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip(inputs, expected, strict=True):
        assert_equal(tensor.grad, gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("order", ["", "di", DENSE], indirect=True)
@pytest.mark.parametrize("name", [*REGISTERED[1:], "FourierKAN", "convolution"])
def test_transforms(name, order):
    """jacrev, hessian and vmap, over samples and over adapters, with the values of the dense layer."""
    base, model, x = adapted(name)
    oracle, x = dense(base, model), x.detach()
    sample = x[:1]
    assert_equal(torch.func.jacrev(model)(sample), torch.func.jacrev(oracle)(sample))
    assert_equal(torch.func.jacfwd(model)(sample), torch.func.jacfwd(oracle)(sample))

    def loss(net):
        return lambda x: net(x[None]).square().sum()

    hessians = [torch.func.hessian(loss(net))(x[0]) for net in (model, oracle)]
    assert_equal(*hessians, 1e-9)
    slopes = [torch.func.vmap(torch.func.grad(loss(net)))(x) for net in (model, oracle)]
    assert_equal(*slopes, 1e-9)

    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    doubled = {key: torch.stack([p, 2 * p]).detach() for key, p in parameters.items()}
    pair = torch.func.vmap(lambda p: torch.func.functional_call(model, p, x))(doubled)
    assert_equal(pair[0], oracle(x))
    assert_different(pair[1], pair[0])
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).square().sum())(parameters)
    expected = torch.autograd.grad(oracle(x).square().sum(), list(parameters.values()))
    for gradient, e in zip(gradients.values(), expected, strict=True):
        assert_equal(gradient, e, 1e-9)


@registered
def test_threads(name):
    """One thread leaves the layer while another one is inside it."""
    base, model, x = adapted(name, torch.float32)
    x = x.detach()
    with torch.no_grad():
        expected = model(x)
        assert_different(expected, base(x))
    wrong, start = [], threading.Barrier(8)

    def work():
        start.wait()
        with torch.no_grad():
            for _ in range(60):
                if not torch.equal(model(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    layer = next(layer for layer in model.modules() if isinstance(layer, LoTRALayer))
    assert not any(isinstance(v, StandIn) for m in layer.modules() for v in vars(m).values())


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 24, dtype=torch.float64))

    def forward(self, x):
        return self.function(x.repeat(1, 4), self.weight)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.t() @ x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_that_takes_tensors_only_gets_one():
    """TorchScript and autograd functions do not ask the stand-in."""
    scripted = torch.jit.trace(nn.functional.linear, (torch.randn(2, 24).double(), torch.randn(5, 24).double()))
    for function in (LinearFunction.apply, scripted):
        layer = type("Layer", (Scripted,), {"function": staticmethod(function)})()
        base, model, x = adapt(layer, {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, FLAT, torch.float64, r=2)
        forget_warnings()
        with pytest.warns(PerformanceWarning, match=r"TorchScript, torch\.autograd\.Function or torch\.vmap"):
            y = model(x)
        assert_different(y, base(x))
        assert_equal(model(x), dense(base, model)(x))
        assert torch.autograd.grad(model(x).sum(), factors_of(model))[0].any()


@pytest.mark.parametrize("without_gradients", [False, True])
def test_autograd_functions_of_inputs_without_gradient(without_gradients):
    """Autograd then asks for no backward, and would drop the factors in silence. A model's first layer is so."""

    def function(x, weight):
        if not without_gradients:
            return LinearFunction.apply(x, weight)
        with torch.no_grad():
            largest = weight.view(5, 24).abs().max()
        return nn.functional.linear(x, weight) / largest

    layer = type("Layer", (Scripted,), {"function": staticmethod(function)})()
    base, model, x = adapt(layer, {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, FLAT, torch.float64, r=2)
    forget_warnings()
    with pytest.warns(PerformanceWarning, match=r"TorchScript, torch\.autograd\.Function or torch\.vmap"):
        y = model(x.detach())
    assert_different(y, base(x))
    assert_equal(y, dense_model(base, model)(x.detach()))
    gradients = torch.autograd.grad(y.square().sum(), factors_of(model))
    expected = torch.autograd.grad(dense_model(base, model)(x.detach()).square().sum(), factors_of(model))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.any()
        assert_equal(gradient, wanted)


class TwoScripted(nn.Module):
    """Two coefficient tensors, nested adapters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 24, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(5, 24, dtype=torch.float64))

    def forward(self, x):
        return LinearFunction.apply(x.repeat(1, 4), self.first) + LinearFunction.apply(x.repeat(1, 4), self.second)


def test_tensors_for_nested_adapters():
    layout = {"layout": "o (i d)", "sizes": {"d": 4}}
    base, model, x = adapt(TwoScripted(), {"first": layout, "second": layout}, FLAT, torch.float64, r=2)
    with pytest.warns(PerformanceWarning):
        y = model(x)
    assert_different(y, base(x))
    assert_equal(y, dense(base, model)(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@registered
def test_compile_with_dynamic_shapes(name):
    _, model, x = adapted(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=FULLGRAPH, dynamic=True, backend="eager")
    for batch in (x.detach(), x.detach()[:4]):
        assert_equal(compiled(batch), model(batch))


@all_layers
def test_inference_mode_and_empty_batches(name):
    base, model, x = adapted(name)
    with torch.inference_mode():
        assert_equal(model(x), dense(base, model)(x))
        if x.dim() == 2 and name not in ("pykan", "efficient-kan"):  # which fail on none themselves
            assert model(x[:0]).shape == base(x[:0]).shape


def test_a_layer_that_assigns_its_coefficients_is_refused():
    layer = ChebyKANLayer(6, 5, 3)
    layer.register_forward_pre_hook(
        lambda module, _: setattr(module, "cheby_coeffs", nn.Parameter(torch.ones(6, 5, 4)))
    )
    _, model, x = adapt(layer, None, FLAT, r=2)
    with pytest.raises(RuntimeError, match="ChebyKANLayer assigned its coefficients `cheby_coeffs` in forward"):
        model(x)
