"""What the stand-in works under: compilation, export, autocast, checkpointing, transforms, threads, odd layers."""

import itertools
import threading
from contextlib import nullcontext

import einops
import pytest
import torch
from adapted_layers import adapt, adapted, dense, factors_of
from conftest import FULLGRAPH, assert_different, assert_equal, forced_order, tucker
from kan_layers import ChebyKANLayer, chebyshev
from launching import LIMIT
from layer_table import LAYERS, REGISTERED
from rounding import rounding_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRALayer
from peft_lotra.calls.context import Samples
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.standin import Adapted, PerformanceWarning, Update
from peft_lotra.standin.cost import DENSE
from peft_lotra.standin.tensor import StandIn
from peft_lotra.testing import forget_warnings

FLAT = (9, 6)
all_layers = pytest.mark.parametrize("name", LAYERS)
registered = pytest.mark.parametrize("name", REGISTERED)


def quick(rows, *cases):
    """All rows of a table; those that are not among the cases, which each differ, are for the second tier."""
    others = [row if isinstance(row, tuple) else (row,) for row in rows if row not in cases]
    return [*cases, *(pytest.param(*row, marks=pytest.mark.slow) for row in others)]


@pytest.mark.parametrize("name", quick(LAYERS, "efficient-kan", "convolution, groups"))
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
        y, plain, rounding = model(x), base(x), rounding_of(base, model, x, dtype=dtype)
    assert_different(y.float(), base(x))
    assert y.dtype == plain.dtype
    rounding.check(y)
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
    rounding_of(base, model, x).check(y)


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

    def of_sample(p, sample):
        return torch.func.functional_call(model, p, sample[None]).square().sum()

    rows = torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 0))(parameters, x)
    for k in range(len(x)):
        expected = torch.autograd.grad(oracle(x[k : k + 1]).square().sum(), list(parameters.values()))
        for row, e in zip(rows.values(), expected, strict=True):
            assert_equal(row[k], e, 1e-9)


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
        forget_warnings()  # two layers of one name
        layer = type("Layer", (Scripted,), {"function": staticmethod(function)})()
        base, model, x = adapt(layer, {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, FLAT, torch.float64, r=2)
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
    message = r"calls `abs`" if without_gradients else r"TorchScript, torch\.autograd\.Function or torch\.vmap"
    with pytest.warns(PerformanceWarning, match=message):
        y = model(x.detach())
    assert_different(y, base(x))
    assert_equal(y, dense(base, model)(x.detach()))
    gradients = torch.autograd.grad(y.square().sum(), factors_of(model))
    expected = torch.autograd.grad(dense(base, model)(x.detach()).square().sum(), factors_of(model))
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REGISTERED)
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


# Export --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FULLGRAPH, reason="adapted layers are traced from torch 2.13 on")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "dynamic", "strict"),
    quick(
        itertools.product(
            [*REGISTERED, "o (d i)", "FourierKAN", "convolution", "convolution, unfolded"],
            [False, True],
            [False, True],
        ),
        ("ChebyKAN", True, True),
        ("efficient-kan", False, False),
        ("convolution", True, False),
    ),
)
def test_export(name, dynamic, strict):
    base, model, x = adapted(name)
    x, shapes = x.detach(), {0: torch.export.Dim("batch", min=2, max=4096)}
    net = model.get_base_model().eval()
    try:
        torch.export.export(base, (x,), dynamic_shapes=(shapes,) if dynamic else None, strict=strict)
    except Exception as error:
        pytest.skip(f"the layer itself cannot be exported so: {type(error).__name__}")
    program = torch.export.export(net, (x,), dynamic_shapes=(shapes,) if dynamic else None, strict=strict)
    inputs = [x, torch.cat([x, x, x[:1]])] if dynamic else [x]
    for batch in inputs:
        assert_different(program.module()(batch), base(batch))
        assert_equal(program.module()(batch), dense(base, model)(batch))


@pytest.mark.skipif(not FULLGRAPH, reason="adapted layers are traced from torch 2.13 on")
def test_the_batch_stays_open_in_an_exported_program():
    _, model, x = adapted("ChebyKAN")
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 20)},)
    program = torch.export.export(model.get_base_model().eval(), (x.detach(),), dynamic_shapes=shapes)
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, 1 << 20)


# Odd layers ----------------------------------------------------------------------------------------------------------


class PickyKANLayer(nn.Module):
    """Asks whether its coefficients are a tensor, and calls einops and vmap on them."""

    def __init__(self, what):
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.randn(6, 5, 4))

    def forward(self, x):
        assert isinstance(self.weight, torch.Tensor)
        basis = chebyshev(torch.tanh(x), 3)
        if self.what == "einops":
            twice = einops.rearrange(self.weight, "i o d -> (i d) o")
            return einops.einsum(basis, self.weight, "b i d, i o d -> b o") + basis.flatten(1) @ twice
        if self.what == "vmap":
            return torch.vmap(lambda w, b: b @ w.T, in_dims=(0, 1))(self.weight, basis).sum(0)
        if self.what == "graph break":
            torch._dynamo.graph_break()
        y = torch.einsum("bid,iod->bo", basis, self.weight)
        return y + (self.weight.detach() * 0.1).sum() if self.what == "detach" else y


@pytest.mark.parametrize("what", ["einops", "vmap", "detach", "graph break"])
def test_layers_that_want_real_tensors(what):
    base, model, x = adapt(PickyKANLayer(what), {"weight": "i o d"}, FLAT, torch.float64, r=2)
    warned = {"vmap": "TorchScript, torch.autograd.Function or torch.vmap", "detach": "sum"}
    with pytest.warns(PerformanceWarning, match=warned[what]) if what in warned else nullcontext():
        y = model(x)
    assert_different(y, base(x))
    assert_equal(y, dense(base, model)(x))
    inputs = [x, *factors_of(model)]
    gradients = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, dense(base, model)(x)))
    for a, e in zip(*gradients, strict=True):
        assert e.any()
        assert_equal(a, e, 1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not FULLGRAPH, reason="adapted layers are traced from torch 2.13 on")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("what", ["einops", "detach", "graph break", "vmap"])
def test_compiled_layers_that_want_real_tensors(what):
    base, model, x = adapt(PickyKANLayer(what), {"weight": "i o d"}, FLAT, torch.float64, r=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=what == "einops", backend="eager")
    if what == "vmap":  # loud where it cannot be told beforehand, and right once it is known
        with pytest.raises(Exception, match="device"):
            compiled(x)
        with pytest.warns(PerformanceWarning):
            model(x)
        torch._dynamo.reset()
    y = compiled(x)
    assert_different(y, base(x))
    assert_equal(y, dense(base, model)(x))
    for a, e in zip(
        *(torch.autograd.grad(z.sum(), factors_of(model)) for z in (y, dense(base, model)(x))), strict=True
    ):
        assert_equal(a, e, 1e-9)


class CheckpointingKANLayer(ChebyKANLayer):
    def __init__(self, use_reentrant):
        super().__init__(6, 5, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


def test_reentrant_checkpoints_inside_of_a_layer_are_loud():
    """The backward pass reads the layer's parameter when the stand-in is gone."""
    _, model, x = adapt(CheckpointingKANLayer(True), {"cheby_coeffs": "i o d"}, FLAT, torch.float64, r=2)
    message = r"`checkpoint\(use_reentrant=True\)` in its own forward.*the adapted layer"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            model(x)


def test_every_parameter_may_be_differentiated():
    """A too, as when a user trains it beside the adapter."""
    base, model, x = adapted("ChebyKAN")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).square().sum())(parameters)
    expected = torch.autograd.grad(dense(base, model)(x).square().sum(), factors_of(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, e in zip(trained, expected, strict=True):
        assert_equal(gradients[name], e, 1e-9)
    assert gradients["base_model.model.layer.base_layer.cheby_coeffs"].any()


# Threads -------------------------------------------------------------------------------------------------------------


class WaitingKANLayer(ChebyKANLayer):
    """Tells when it has begun, and waits before it reads its coefficients."""

    def __init__(self):
        super().__init__(6, 5, 3)
        object.__setattr__(self, "events", {})

    def forward(self, x):
        begun, go = self.events.get(threading.get_ident(), (None, None))
        if begun is not None:
            begun.set()
            assert go.wait(LIMIT)
        return super().forward(x)


def test_what_a_thread_reads_is_its_own_passes():
    """One thread is amid a pass without gradients, or with adapters off, while another one trains."""
    base, model, x = adapt(WaitingKANLayer(), {"cheby_coeffs": "i o d"}, FLAT, torch.float64, r=2)
    layer = next(iter(adapted_tensors(model).values()))
    inner, results = layer.get_base_layer(), {}
    for what in ("no_grad", "disabled"):
        begun, go = threading.Event(), threading.Event()

        def other(what=what, begun=begun, go=go):
            inner.events[threading.get_ident()] = begun, go
            with torch.no_grad():
                results[what] = model(x)

        if what == "disabled":
            layer._disable_adapters = True
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(LIMIT)
        layer._disable_adapters = False
        y = model(x)
        assert torch.autograd.grad(y.sum(), factors_of(model))[0].any()
        go.set()
        thread.join()
        assert_equal(results[what], base(x) if what == "disabled" else y, 0)
    assert not any(isinstance(value, StandIn) for value in vars(inner).values())


def test_a_thread_without_a_pass_is_told():
    _, model, x = adapt(WaitingKANLayer(), {"cheby_coeffs": "i o d"}, FLAT, torch.float64, r=2)
    inner = next(iter(adapted_tensors(model).values())).get_base_layer()
    begun, go = threading.Event(), threading.Event()

    def run():
        inner.events[threading.get_ident()] = begun, go
        model(x)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(LIMIT)
    try:
        with pytest.raises(RuntimeError, match="read in a thread that runs no forward pass of its adapted layer"):
            inner.cheby_coeffs.sum()
    finally:
        go.set()
        thread.join()
    assert isinstance(inner.cheby_coeffs, nn.Parameter)


def test_a_layer_that_takes_tensors_has_them_in_every_thread():
    layout = {"layout": "o (i d)", "sizes": {"d": 4}}
    base, model, x = adapt(TwoScripted(), {"first": layout, "second": layout}, FLAT, torch.float64, r=2)
    with pytest.warns(PerformanceWarning):
        expected = model(x).detach()
    wrong = []

    def work(trains):
        for _ in range(20):
            with torch.set_grad_enabled(trains):
                y = model(x)
            if not torch.equal(y, expected) or y.requires_grad is not trains:
                wrong.append(1)

    threads = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Weights per sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ChebyKAN", "efficient-kan, no scaler", "fast-kan", "o (d i)", "i o d"])
def test_weights_per_sample(name):
    """Σ_p w[b, p] · G[..., p] ×₁ U1 ×₂ U2 ×₃ U3 for every sample b, in one pass, beside an update of all samples."""
    base, model, x = adapted(name)
    layer = next(iter(adapted_tensors(model).values()))
    spec, plain = layer.spec, layer.get_base_layer()
    n, m, n_d = spec.layout.canonical_shape
    batch, P, r = 4, 3, (2, 3, 2)
    lead = [] if "efficient" in name else [7] * (x.dim() - 2)  # that one flattens leading axes into rows
    x = (torch.rand(batch, *lead, n, dtype=x.dtype) - 0.5).requires_grad_()
    shapes = [(*r, P), (n, r[0]), (m, r[1]), (n_d, r[2]), (batch, P)]
    core, U1, U2, U3, w = (torch.randn(shape, dtype=x.dtype, requires_grad=True) for shape in shapes)
    update = Update(tucker(core, U1, U2, U3), 0.7, w, Samples(0, tuple(x.shape[:-1]), len(x)))
    with Adapted(plain, spec, (update, *layer._active_updates())):
        y = plain(x)
    rows = []
    for sample in range(batch):
        single = Update(tucker(torch.einsum("abcp,p->abc", core, w[sample]), U1, U2, U3), 0.7)
        with Adapted(plain, spec, (single, *layer._active_updates())), forced_order(DENSE):
            rows.append(plain(x[sample : sample + 1]))
    expected = torch.cat(rows)
    assert_different(y, base(x))
    assert_equal(y, expected)
    leaves = [x, core, U1, U2, U3, w]
    for a, e in zip(*(torch.autograd.grad(z.square().sum(), leaves) for z in (y, expected)), strict=True):
        assert e.any()
        assert_equal(a, e, 1e-9)
