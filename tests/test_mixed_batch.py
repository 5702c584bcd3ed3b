"""`model(x, adapter_names=[...])`: one forward pass in which every sample has its own adapter."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import (
    ChebyKAN,
    ChebyKANLayer,
    ConvKANLayer,
    FastKAN,
    MatrixKANLayer,
    NaiveFourierKANLayer,
    TupleKANLayer,
    TwoTensorKANLayer,
    UnfoldConvKANLayer,
)
from layer_table import MODELS, config, lotra_layers, make, randomize
from peft import get_peft_model
from rounding import rounding_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lotra import LoTRAConfig
from peft_lotra.testing.oracle import dense_model

NAMES = ["one", "__base__", "two", "one", "three", "two", "one", "__base__"]


def adapted(base, make_config=LoTRAConfig, adapters=("one", "two", "three"), **kwargs):
    """`base` with adapters of different ranks, scalings and, for "three", layers."""
    model = None
    for rank, name in enumerate(adapters, start=1):
        new = make_config(r=(1, 1, rank), alpha=rank / 2, **kwargs)
        if model is None:
            model = get_peft_model(base, new, adapter_name=name)
        else:
            model.add_adapter(name, new)
        randomize(model, name)
    return model.eval()


def one_by_one(model, x, names):
    """The same by calling the model for each sample, twice in a batch (pykan takes the deviation over a batch)."""
    rows = []
    for sample, name in zip(x, names, strict=True):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            y = model(torch.stack([sample, sample]))
        rows.append(y[: len(y) // 2])
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_one_by_one(name):
    base, x = make(name, torch.float64)
    model = adapted(copy.deepcopy(base), lambda **kwargs: config(name, **kwargs))
    y = model(x, adapter_names=NAMES)
    expected = one_by_one(model, x, NAMES)
    assert_equal(y, expected, 1e-6)
    assert_different(y, base(x))
    assert_equal(y[1], base(x)[1], 1e-10)
    for adapter in ("one", "two", "three"):
        model.set_adapter(adapter)
        assert_different(model(x), y)
        assert_equal(model(x, adapter_names=[adapter] * len(x)), model(x), 0)
    assert_equal(model(x, adapter_names=["__base__"] * len(x)), base(x), 0)
    assert model.active_adapters == ["three"]


def watched(layer):
    """The layer, and how many rows each of its forward passes has seen."""
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return layer, seen


@pytest.mark.parametrize(
    ("make_layer", "coefficients", "shape", "passes"),
    [
        (lambda: MatrixKANLayer(3, 2), {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, (3,), [8]),
        (lambda: MatrixKANLayer(3, 2), {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, (5, 3), [8]),
        # an axis of as many entries as there are samples: which one is it?
        (lambda: MatrixKANLayer(3, 2), {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, (8, 3), [8, 3, 2, 2, 1]),
        (lambda: ChebyKANLayer(3, 2, 3), {}, (3,), [8]),
        # flattened into rows by the layer
        (lambda: ChebyKANLayer(3, 2, 3), {}, (5, 3), [8, 3, 2, 2, 1]),
        (lambda: NaiveFourierKANLayer(3, 2), {"fouriercoeffs": "d1 o i d2"}, (5, 3), [8, 3, 2, 2, 1]),
        (
            lambda: ConvKANLayer(3, 2),
            {"spline_conv.weight": {"layout": "o (i d) h w", "sizes": {"d": 4}}},
            (3, 4, 4),
            [8, 3, 2, 2, 1],
        ),
        (
            lambda: UnfoldConvKANLayer(4, 2, groups=2),
            {
                "spline_weight": {
                    "layout": "g o (i h w) d",
                    "sizes": {"h": 3, "w": 3},
                    "scale": "spline_scaler",
                    "scale_layout": "g o (i h w)",
                }
            },
            (4, 4, 4),
            [8, 3, 2, 2, 1],
        ),
    ],
)
def test_one_pass_where_samples_can_be_told_apart(make_layer, coefficients, shape, passes):
    layer, seen = watched(make_layer().double())
    model = adapted(nn.Sequential(layer), coefficients=coefficients)
    x = torch.rand(8, *shape, dtype=torch.float64) - 0.5
    y = model(x, adapter_names=NAMES)
    assert seen == passes
    expected = one_by_one(model, x, NAMES)
    assert_different(expected, model(x))
    assert_equal(y, expected, 1e-10)


def test_adapters_of_other_layers_and_several_tensors_on_one_module():
    layouts = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    net = nn.Sequential(TwoTensorKANLayer(3, 4), TwoTensorKANLayer(4, 2)).double()
    model = adapted(net, coefficients=layouts, adapters=("one", "two"))
    model.add_adapter("three", LoTRAConfig(r=1, coefficients={"0.cheby_weight": "i o d"}))
    randomize(model, "three")
    x = torch.rand(8, 3, dtype=torch.float64)
    y = model(x, adapter_names=NAMES)
    assert_equal(y, one_by_one(model, x, NAMES), 1e-10)
    assert_different(y[4], model(x, adapter_names=["__base__"] * 8)[4])


def test_results_that_are_not_one_tensor():
    layer = TupleKANLayer(3, 2, 3).double()
    model = adapted(nn.Sequential(layer), coefficients={"cheby_coeffs": "i o d"})
    x = torch.rand(8, 3, dtype=torch.float64)
    y, same, nothing = model(x, adapter_names=NAMES)
    assert nothing is None
    assert_equal(same, x, 0)
    for k, name in enumerate(NAMES):
        expected, *_ = model(x[k : k + 1], adapter_names=[name])
        assert_equal(y[k : k + 1], expected, 1e-10)


class FourierTuple(NaiveFourierKANLayer):
    def forward(self, x, shift=None, *, what="rows", gain=1.0):
        y = super().forward(x) * gain
        y = y if shift is None else y + shift
        return {"rows": (y, {"x": x}, None, 3), "mean": y.mean(), "length": (y, len(y)), "list": [y] * len(y)}[what]


class FourierModel(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def test_results_and_arguments_of_a_pass_for_each_adapter():
    coefficients = {"fouriercoeffs": "d1 o i d2"}
    model = adapted(FourierModel(FourierTuple(3, 2).double()), coefficients=coefficients)
    x, shift = torch.rand(8, 3, dtype=torch.float64), torch.rand(8, 2, dtype=torch.float64)
    y, same, nothing, number = model(x, shift, gain=torch.tensor(2.0), adapter_names=NAMES)
    assert (nothing, number) == (None, 3)
    assert_equal(same["x"], x, 0)
    for k, name in enumerate(NAMES):
        alone, *_ = model(x[k : k + 1], gain=2.0, adapter_names=[name])
        assert_equal(y[k : k + 1], alone + shift[k : k + 1], 1e-10)
    for what in ("mean", "length"):
        with pytest.raises(ValueError, match="returns values that do not belong to single samples"):
            model(x, what=what, adapter_names=NAMES)
    with pytest.raises(ValueError, match="returns other structures for other samples"):
        model(x, what="list", adapter_names=NAMES)
    assert_different(model(x)[0], y)


def test_modules_to_save_and_gradients():
    net = nn.Sequential()
    net.add_module("kan", FastKAN([3, 5]))
    net.add_module("head", nn.Linear(5, 2))
    model = adapted(net.double(), adapters=("one", "two"), modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["two"].weight += 1
    x = torch.rand(4, 3, dtype=torch.float64)
    y = model(x, adapter_names=["one", "two", "__base__", "two"])
    assert_equal(y, one_by_one(model, x, ["one", "two", "__base__", "two"]), 1e-10)
    model.set_adapter("one")
    model(x, adapter_names=["one", "two", "__base__", "two"]).sum().backward()
    core = lotra_layers(model)["kan.layers.0"].lotra_core["one"]
    mixed, core.grad = core.grad, None
    model(x[:1]).sum().backward()
    assert_equal(mixed, core.grad, 1e-10)


@pytest.mark.filterwarnings("ignore:std")  # of pykan, which takes deviations over the batch
@pytest.mark.filterwarnings("ignore:the layout that is declared:UserWarning")  # "packed" is that of the first layer
@pytest.mark.parametrize("name", ["pykan", "ChebyKAN", "o (d i)", "FourierKAN", "packed", "two tensors"])
def test_a_batch_of_no_samples(name):
    base, x = make(name, torch.float64)
    model = adapted(copy.deepcopy(base), lambda **kwargs: config(name, **kwargs))
    assert model(x, adapter_names=NAMES).shape == (8, 2)
    for names in ([], ()):
        y = model(x[:0], adapter_names=names)
        assert (y.shape, y.dtype) == (base(x[:0]).shape, x.dtype) == ((0, 2), torch.float64)
    with pytest.raises(ValueError, match="Length of `adapter_names` .* but got 0 and 8 respectively"):
        model(x, adapter_names=[])


def test_a_batch_of_no_samples_and_a_trained_copy_of_a_module():
    net = nn.Sequential()
    net.add_module("kan", ChebyKAN([3, 5]))
    net.add_module("head", nn.Linear(5, 2))
    model = adapted(net, adapters=("one", "two"), modules_to_save=["head"])
    assert model(torch.rand(2, 3), adapter_names=["one", "two"]).shape == (2, 2)
    assert model(torch.rand(0, 3), adapter_names=[]).shape == (0, 2)


def test_16_bit():
    base = ChebyKAN([3, 5, 2]).bfloat16()
    model, x = adapted(copy.deepcopy(base)), torch.rand(8, 3).bfloat16()
    y = model(x, adapter_names=NAMES)
    for name in set(NAMES):
        weights = dict.fromkeys(model.peft_config, 0.0) | ({} if name == "__base__" else {name: 1.0})
        expected = rounding_of(base, model, x, weights=weights)
        rows = [k for k, own in enumerate(NAMES) if own == name]
        expected.exact = [exact[rows] for exact in expected.exact]
        expected.check(y[rows])


def test_a_layer_that_takes_tensors_only():
    class ScriptedKANLayer(MatrixKANLayer):
        def forward(self, x):
            basis = torch.stack([x**k for k in range(4)], dim=-1).flatten(-2)
            return scripted(basis, self.weight)

    @torch.jit.script
    def scripted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T

    coefficients = {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}
    model = adapted(nn.Sequential(ScriptedKANLayer(3, 2).double()), coefficients=coefficients)
    x = torch.rand(8, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="TorchScript"):
        y = model(x, adapter_names=NAMES)
    assert_equal(y, one_by_one(model, x, NAMES), 1e-10)
    assert_equal(model(x, adapter_names=NAMES), y, 0)


# Errors, as of LoRA --------------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_errors_are_those_of_lora_and_leave_nothing_behind():
    model, x = adapted(ChebyKAN([3, 5, 2])), torch.rand(8, 3)
    y = model(x)
    for names in (NAMES[:7], NAMES * 2, ["one"]):
        with pytest.raises(ValueError, match=f"Length of `adapter_names` .* but got {len(names)} and 8 respectively"):
            model(x, adapter_names=names)
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): four, six"):
        model(x, adapter_names=["six", "four"] * 4)
    for names in ("one", 3, [None] * 8, {"one": 8}):
        with pytest.raises(TypeError, match="`adapter_names` should be a list with a name for each sample, but "):
            model(x, adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model(x, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(x, adapter_names=NAMES)
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.rand(8, 4), adapter_names=NAMES)
    assert hooks(model) == 0
    assert_equal(model(x), y, 0)


def test_disabled_adapters_stay_disabled():
    base, x = ChebyKAN([3, 5, 2]), torch.rand(8, 3)
    model = adapted(copy.deepcopy(base))
    with model.disable_adapter():
        assert_equal(model(x, adapter_names=NAMES), base(x), 0)


def test_beam_search_repeats_names_except_in_an_encoder():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = ChebyKANLayer(3, 5, 3), ChebyKANLayer(5, 2, 3)

        def get_encoder(self):
            return self.encoder

        def forward(self, x, num_beams=1):
            return self.decoder(self.encoder(x).repeat_interleave(num_beams, 0))

    model, x = adapted(Model().double()), torch.rand(8, 3, dtype=torch.float64)
    y = model(x, adapter_names=NAMES, num_beams=3)
    assert_equal(y, one_by_one(model, x, NAMES).repeat_interleave(3, 0), 1e-10)


def test_eight_adapters_over_64_samples():
    torch.manual_seed(0)
    model = adapted(ChebyKAN([64, 64, 64]), adapters=[f"adapter {k}" for k in range(4)])
    names = [f"adapter {k * k % 4}" for k in range(64)]
    x = torch.rand(64, 64)
    assert_equal(model(x, adapter_names=names), one_by_one(model, x, names))


def of_equal_ranks(base, ranks, count=3, **kwargs):
    """`base` with adapters of these ranks and different scalings, and one of other ranks."""
    model = get_peft_model(base, LoTRAConfig(r=ranks, alpha=0.5, **kwargs), adapter_name="a0")
    for k in range(1, count):
        model.add_adapter(f"a{k}", LoTRAConfig(r=ranks, alpha=1.0 + k % 2, **kwargs))
    model.add_adapter("other", LoTRAConfig(r=(1, 2, 1), **kwargs))
    for name in model.peft_config:
        randomize(model, name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def dense_rows(base, model, x, names):
    """The same by the dense formula."""
    weights = {name: dict.fromkeys(model.peft_config, 0.0) | {name: 1.0} for name in names}
    weights = {name: {key: w for key, w in own.items() if key != "__base__"} for name, own in weights.items()}
    models = {name: dense_model(base, model, weights[name]) for name in names}
    return torch.cat([models[name](x[k : k + 1]) for k, name in enumerate(names)])


class Reordered(nn.Module):
    """Takes its inputs, functions and outputs in another order."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        c = self.c.index_select(0, torch.tensor([2, 0, 1]))[:, :, torch.tensor([4, 0, 3, 1])][
            :, torch.tensor([1, 3, 0])
        ]
        return torch.einsum("bid,iod->bo", x[..., None] ** torch.arange(4), c)


@pytest.mark.parametrize("ranks", [(2, 2, 2), (None, 2, 2), (2, None, 2), (2, 2, None), (None, None, None)])
@pytest.mark.parametrize(
    ("make_layer", "coefficients", "shape"),
    [
        (lambda: ChebyKANLayer(3, 4, 3), {"cheby_coeffs": "i o d"}, (3,)),
        (lambda: MatrixKANLayer(3, 2), {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}, (5, 3)),
        (lambda: TupleKANLayer(3, 2, 3), {"cheby_coeffs": "i o d"}, (3,)),
        (Reordered, {"c": "i o d"}, (3,)),
    ],
)
def test_adapters_of_equal_ranks_and_the_dense_formula(make_layer, coefficients, shape, ranks):
    class First(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y[0] if isinstance(y, tuple) else y

    base = First(make_layer().double())
    model = of_equal_ranks(copy.deepcopy(base), ranks, coefficients=coefficients)
    names = ["a1", "__base__", "a0", "a2", "other", "a1", "a0", "a1"]
    x = (torch.rand(8, *shape, dtype=torch.float64) - 0.5).requires_grad_(True)
    weight = torch.randn_like(base(x))
    trained = [x, *[p for n, p in model.named_parameters() if "lotra_" in n and "codes" not in n]]
    found = []
    for y in (model(x, adapter_names=names), dense_rows(base, model, x, names)):
        first = torch.autograd.grad((y.sin() * weight).sum(), trained, create_graph=True)
        found.append((y, *first, *torch.autograd.grad(first[0].square().sum(), trained)))
    assert_different(found[0][0], base(x))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected, 1e-10)


def test_a_broken_adapter_spoils_no_other_sample():
    model = of_equal_ranks(ChebyKAN([3, 5, 2]).double(), (2, 2, 2))
    for layer in lotra_layers(model).values():
        layer.lotra_core["a1"].data.fill_(torch.nan)
    x = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    y = model(x, adapter_names=["a0", "a1", "a0", "a2", "a0", "__base__"])
    y.nansum().backward()
    assert y.isfinite().all(1).tolist() == x.grad.isfinite().all(1).tolist() == [True, False, True, True, True, True]


def test_more_adapters_of_equal_ranks_take_no_more_operations():
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    model = of_equal_ranks(ChebyKAN([3, 5, 2]), (2, 2, 2), count=12)
    counts = []
    for adapters in (2, 12):
        with torch.no_grad(), Counting() as mode:
            model(torch.rand(24, 3), adapter_names=[f"a{k % adapters}" for k in range(24)])
        counts.append(mode.count)
    assert counts[0] == counts[1] < 150


def test_the_first_passes_of_a_thread_may_be_compiled():
    """What belongs to a thread's calls is not there before the first of them."""
    models = [
        get_peft_model(nn.Sequential(ChebyKANLayer(n, 3, 2)), LoTRAConfig(r=2, init_weights=False)) for n in (4, 5)
    ]
    outputs = []
    torch._dynamo.reset()

    def run():
        for n, model in zip((4, 5), models, strict=True):
            model.compile(backend="eager")
            outputs.append(model(torch.ones(6, n)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(outputs) == 2
