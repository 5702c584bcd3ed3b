"""Layouts found and verified by running layers: every layout, hard cases, refusals, wrong declarations, bad input."""

import copy
import gc
import itertools
import json
import random
import re
import warnings
import weakref

import kan_layers as kans
import pytest
import torch
from conftest import assert_different, assert_equal
from kan.KANLayer import KANLayer as PyKANLayer
from odd_layers import BernsteinConvLayer, SoftplusEdgeLayer
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, infer_coefficients, register_kan_layer, verify_coefficients
from peft_lotra.coefficients import registry
from peft_lotra.coefficients.layout import Layout
from peft_lotra.inference.layouts import agree
from peft_lotra.inference.recording import Passes
from peft_lotra.inference.response import infer_layer
from peft_lotra.preserved import first_tensor
from peft_lotra.testing import dense_model

ROWS = torch.rand(12, 8, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
IMAGES = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {})


def inferred(layer, x):
    """{parameter: (layout, shape of A, scale, slice)} as found in the layer alone."""
    findings = infer_layer(layer, ((x,), {}), [name for name, _ in layer.named_parameters()], Passes())
    specs = {path: finding.spec for path, finding in findings.items() if finding.spec}
    return {
        path: (
            spec.layout.pattern,
            spec.layout.canonical_shape,
            spec.scale and (spec.scale, spec.scale_layout),
            spec.slice,
        )
        for path, spec in specs.items()
    }


# parameter -> layout, n_d, scale, end of the slice in units of n
SCALER = ("spline_scaler", "o i")
LAYERS = {
    "efficient-kan": (kans.KANLinear, {}, {"spline_weight": ("o i d", 8, SCALER)}),
    "efficient-kan, no scaler": (
        kans.KANLinear,
        {"enable_standalone_scale_spline": False},
        {"spline_weight": ("o i d", 8, None)},
    ),
    "fast-kan": (kans.FastKANLayer, {}, {"spline_linear.weight": ("o (i d)", 8, None)}),
    "fast-kan, n_d = n": (kans.FastKANLayer, {"num_grids": 4}, {"spline_linear.weight": ("o (i d)", 4, None)}),
    "ChebyKAN": (kans.ChebyKANLayer, {"degree": 3}, {"cheby_coeffs": ("i o d", 4, None)}),
    "pykan": (PyKANLayer, {}, {"coef": ("i o d", 8, None)}),
    "matrix (i d)": (kans.MatrixKANLayer, {"order": "i d"}, {"weight": ("o (i d)", 4, None)}),
    "matrix (d i)": (kans.MatrixKANLayer, {"order": "d i"}, {"weight": ("o (d i)", 4, None)}),
    "Fourier o i": (kans.NaiveFourierKANLayer, {}, {"fouriercoeffs": ("d1 o i d2", 6, None)}),
    "Fourier i o": (kans.NaiveFourierKANLayer, {"order": "i o"}, {"fouriercoeffs": ("d1 i o d2", 6, None)}),
    "two tensors": (
        kans.TwoTensorKANLayer,
        {},
        {"rbf_weight": ("(i d) o", 5, None), "cheby_weight": ("i o d", 3, None)},
    ),
    "tuple": (kans.TupleKANLayer, {"degree": 3}, {"cheby_coeffs": ("i o d", 4, None)}),
    "scale in another order": (kans.PreActivatedKANLayer, {}, {"coeffs": ("i o d", 4, ("gain", "o i"))}),
    "norm after": (kans.BatchNormKANLayer, {"degree": 3}, {"cheby_coeffs": ("i o d", 4, None)}),
    "dropout": (kans.DropoutKANLayer, {}, {"weight": ("o (i d)", 4, None)}),
}


@pytest.mark.parametrize("sizes", [(3, 5), (4, 4), (8, 8), (8, 2), (2, 8)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layouts(name, sizes):
    make, kwargs, expected = LAYERS[name]
    n, m = sizes
    layer = make(n, m, **kwargs)
    assert inferred(layer, ROWS[:, :n]) == {
        path: (layout, (n, m, n_d), scale, None) for path, (layout, n_d, scale) in expected.items()
    }


@pytest.mark.parametrize("order", list(itertools.permutations("iod")), ids="".join)
@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 5, 4), (5, 2, 2)], ids=str)
def test_every_order_of_the_axes(order, sizes):
    n, m, n_d = sizes
    layer = kans.EinsumKANLayer(n, m, n_d, " ".join(order))
    assert inferred(layer, ROWS[:, :n]) == {"coeffs": (" ".join(order), sizes, None, None)}


def test_packed_weights_are_declared():
    """What lies beside the coefficients in one parameter is not told apart; a declared slice is verified."""
    assert inferred(kans.PackedKANLayer(4, 4), ROWS[:, :4]) == {}


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("name", ["efficient-kan", "ChebyKAN", "matrix (i d)", "Fourier o i"])
def test_one_input_or_one_output(name, sizes):
    make, kwargs, expected = LAYERS[name]
    found = inferred(make(*sizes, **kwargs), ROWS[:, : sizes[0]])
    assert {path: found[path][1] for path in found} == {path: (*sizes, n_d) for path, (_, n_d, _) in expected.items()}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: kans.ConvKANLayer(4, 6), {"spline_conv.weight": ("o (i d) h w", (4, 6, 4, 3, 3))}),
        (lambda: kans.ConvKANLayer(4, 4, num_grids=3), {"spline_conv.weight": ("o (i d) h w", (4, 4, 3, 3, 3))}),
        (lambda: kans.GroupedPolyConvKANLayer(4, 4), {"poly_weights": ("g o (d i) h w", (4, 4, 4, 1, 3, 3))}),
        (
            lambda: kans.GroupedPolyConvKANLayer(4, 4, groups=2),
            {"poly_weights": ("g o (d i) h w", (2, 2, 4, 2, 3, 3))},
        ),
        (
            lambda: kans.GroupedPolyConvKANLayer(4, 6, groups=2, per_group=True),
            {f"poly_weights.{g}": ("o (d i) h w", (2, 3, 4, 3, 3)) for g in range(2)},
        ),
        (lambda: kans.UnfoldConvKANLayer(4, 4), {"spline_weight": ("g o (i h w) d", (4, 4, 4, 1, 3, 3))}),
        (lambda: kans.UnfoldConvKANLayer(4, 4, groups=2), {"spline_weight": ("g o (i h w) d", (2, 2, 4, 2, 3, 3))}),
    ],
)
def test_convolutions(layer, expected):
    found = inferred(layer(), IMAGES)
    assert {path: entry[:2] for path, entry in found.items()} == expected
    if "spline_weight" in found:
        assert found["spline_weight"][2] == ("spline_scaler", "g o (i h w)")


def test_leading_axes_and_other_inputs():
    tokens = torch.randn(2, 5, 3)
    assert inferred(kans.FastKANLayer(3, 4), tokens)["spline_linear.weight"][:2] == ("o (i d)", (3, 4, 8))

    class Gated(kans.MatrixKANLayer):
        def forward(self, mask, x, *, gain=None):
            return gain["value"] * super().forward(x) * mask

    layer, x = Gated(3, 3), ROWS[:, :3]
    model = nn.Sequential()
    model.layer = layer
    model.forward = lambda x: layer.forward(torch.ones(len(x), 1), x, gain={"value": torch.tensor(2.0)})
    assert infer_coefficients(model, x)["layer.weight"]["layout"] == "o (i d)"  # called without `__call__`, too


def test_many_leading_axes():
    x = torch.rand(2, 2, 3, 2, 2, 4, generator=torch.Generator().manual_seed(6)) * 1.8 - 0.9
    assert inferred(kans.MatrixKANLayer(4, 3), x) == {"weight": ("o (i d)", (4, 3, 4), None, None)}


def test_empty_outputs_beside_others():
    class Layer(kans.MatrixKANLayer):
        def forward(self, x):
            return self.weight[:0] * 2, super().forward(x)

    assert inferred(Layer(4, 3), ROWS[:, :4]) == {"weight": ("o (i d)", (4, 3, 4), None, None)}


class Float32KANLayer(kans.ChebyKANLayer):
    """Computes in float32, whatever it gets."""

    def forward(self, x):
        basis = kans.chebyshev(torch.tanh(x.float()), self.degree)
        return torch.einsum("bid,iod->bo", basis, self.cheby_coeffs.float())


class InPlaceKANLayer(kans.ChebyKANLayer):
    """Fills its basis in place, so that nothing can be differentiated by x."""

    def forward(self, x):
        basis = torch.ones(*x.shape, self.degree + 1)
        x = torch.tanh(x)
        basis[..., 1] = x
        for k in range(2, self.degree + 1):
            basis[..., k] = 2 * x * basis[..., k - 1] - basis[..., k - 2]
        return torch.einsum("bid,iod->bo", basis, self.cheby_coeffs)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + 0

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no backward")


class NoBackwardKANLayer(kans.ChebyKANLayer):
    """Its basis cannot be differentiated by x."""

    def forward(self, x):
        basis = Failing.apply(kans.chebyshev(torch.tanh(x), self.degree))
        return torch.einsum("bid,iod->bo", basis, self.cheby_coeffs)


@pytest.mark.parametrize("make", [Float32KANLayer, InPlaceKANLayer, NoBackwardKANLayer])
def test_layers_that_cannot_be_differentiated_well(make):
    for n, m in [(4, 4), (3, 5)]:
        assert inferred(make(n, m, 3), ROWS[:, :n]) == {"cheby_coeffs": ("i o d", (n, m, 4), None, None)}


class BottleneckKANLayer(nn.Module):
    """y = outer(KAN(inner(x))): the contraction lies between two linear layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 3), nn.Linear(4, 8)
        self.coeffs = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        basis = kans.chebyshev(torch.tanh(self.inner(x)), 4)
        return self.outer(torch.einsum("bid,iod->bo", basis, self.coeffs))


def test_contraction_between_linear_layers():
    assert inferred(BottleneckKANLayer(), ROWS) == {"coeffs": ("i o d", (3, 4, 5), None, None)}


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.attention = nn.MultiheadAttention(n, 2, batch_first=True)
        self.norm = nn.LayerNorm(n)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x)[0])


WAVELET = "wavelet_weights: left out, every input and output has one function, shaped by ['scale', 'translation']: "


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        (lambda: kans.WaveletKANLayer(4, 4), ROWS[:, :4], WAVELET),
        (lambda: kans.WaveletKANLayer(4, 4, initial=True), ROWS[:, :4], WAVELET),
        (
            lambda: SoftplusEdgeLayer(4, 4),
            ROWS[:, :4],
            "mixes nothing: what follows is not linear, so that no sum over",
        ),
        (
            lambda: BernsteinConvLayer(4, 4),
            IMAGES,
            "does not change with the input: it is added, as a bias is, or its fu",
        ),
        (lambda: kans.RationalActivationLayer(4, 4), ROWS[:, :4], "cannot be told apart by input feature"),
        (lambda: kans.AliasedKANLayer(4, 4), ROWS[:, :4], "reads it through an alias, so that an adapter would be ig"),
        (lambda: kans.ReassigningKANLayer(4, 4), ROWS[:, :4], "assigns it anew, so that an adapter would be lost"),
        (lambda: kans.SquaredKANLayer(4, 4, 3), ROWS[:, :4], "the layer is not affine in it"),
        (lambda: kans.ComplexKANLayer(4, 4), ROWS[:, :4].float(), "it is complex (torch.complex64)"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
            ROWS[:, :4],
            "cannot be told apart by in",
        ),
        (lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4)), ROWS[:, :1], "the layer of a network"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGES, "a linear weight, no basis"),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), torch.arange(5), "no floating-point tensor"),
        (lambda: Attention(8), ROWS.view(2, 6, 8), "it is a vector no longer than an axis"),
        (lambda: nn.LSTM(4, 4), ROWS[:, :4], "weight_ih_l0"),
    ],
)
def test_refused_with_a_reason(layer, x, reason):
    with pytest.raises(ValueError, match="no KAN coefficient tensor found in this") as error:
        infer_coefficients(nn.Sequential(layer()), x)
    assert reason in str(error.value)


class NoisyKANLayer(kans.MatrixKANLayer):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class RandomKANLayer(kans.MatrixKANLayer):
    def forward(self, x):
        return super().forward(x + random.random())


def test_random_numbers_of_torch_are_the_same_in_every_run():
    assert inferred(NoisyKANLayer(4, 4), ROWS[:, :4]) == {"weight": ("o (i d)", (4, 4, 4), None, None)}


class FailingKANLayer(kans.MatrixKANLayer):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise KeyError("only without gradients")
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (RandomKANLayer, "its layer is random: two runs on the same input differ, although in eval mode"),
        (FailingKANLayer, "its layer fails on this sample: KeyError: 'only without gradients'"),
    ],
)
def test_layers_that_cannot_be_run(make, reason):
    model = nn.Sequential(make(4, 4), kans.MatrixKANLayer(4, 4))
    coefficients = infer_coefficients(model, ROWS[:, :4])
    assert list(coefficients) == ["1.weight"]
    assert f"0 ({make.__name__})\n    weight: left out, {reason}" in str(coefficients)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.randn(5, 3), "RuntimeError: "),
        (torch.ones(5, 4, dtype=torch.long), "RuntimeError: "),
        (None, "the model fails on this sample"),
    ],
)
def test_samples_that_the_model_does_not_take(x, text):
    with pytest.raises(ValueError, match="the model fails on this sample, which should be what its forward") as error:
        infer_coefficients(nn.Sequential(nn.Linear(4, 4), kans.MatrixKANLayer(4, 4)), x)
    assert text in str(error.value)
    with pytest.raises(ValueError, match="TypeError: .*missing 1 required positional argument"):
        infer_coefficients(kans.MatrixKANLayer(4, 4))


def test_compiled_and_scripted_parts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(4, 4), ROWS[:, :4])
    model = nn.Sequential(torch.compile(kans.MatrixKANLayer(4, 4)), scripted, kans.MatrixKANLayer(4, 4, order="d i"))
    found = infer_coefficients(model, ROWS[:, :4])
    assert {name: entry["layout"] for name, entry in found.items()} == {
        "0._orig_mod.weight": "o (i d)",
        "2.weight": "o (d i)",
    }
    assert "1.weight, 1.bias: left out, a part of its layer is a TorchScript module" in str(found)


class Mixed(nn.Module):
    """Layers of several kinds; one is used twice, one not at all."""

    def __init__(self):
        super().__init__()
        self.first = kans.FastKANLayer(3, 4)
        self.twice = kans.MatrixKANLayer(4, 4, order="d i")
        self.last = nn.ModuleList([kans.TwoTensorKANLayer(4, 2)])
        self.plain = nn.Linear(4, 4)
        self.unused = kans.MatrixKANLayer(4, 4)

    def forward(self, x):
        return self.last[0](self.plain(self.twice(self.twice(self.first(x)))))


def test_a_model_and_its_report(tmp_path):
    register_kan_layer(kans.FastKANLayer, {"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": 8}}})
    base, x = Mixed().double(), ROWS[:, :3].double()
    coefficients = infer_coefficients(base, x)
    assert {key: entry["layout"] for key, entry in coefficients.items()} == {
        "first.spline_linear.weight": "o (i d)",
        "twice.weight": "o (d i)",
        "last.0.rbf_weight": "(i d) o",
        "last.0.cheby_weight": "i o d",
    }
    report = str(coefficients)
    for line in (
        "first (FastKANLayer)\n    spline_linear.weight: 'o (i d)' (n, m, n_d) = (3, 4, 8); registered",
        "twice (MatrixKANLayer)\n    weight: 'o (d i)' (n, m, n_d) = (4, 4, 4); inferred, 4 forward and 8 backward",
        "    unused.weight: left out, no output responds to it",
        f"one pass of the model; {coefficients.forwards} forward and {coefficients.backwards} backward passes of",
    ):
        assert line in report
    assert json.loads(json.dumps(coefficients)) == coefficients
    assert copy.deepcopy(coefficients) == coefficients
    verify_coefficients(base, x, coefficients={k: v for k, v in coefficients.items() if "first" not in k})

    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=coefficients, init_weights=False))
    y = model(x)
    assert_different(y, base(x))
    assert_equal(y, dense_model(base, model)(x))
    assert str(verify_coefficients(model, x)).count("; verified") == 4
    with pytest.raises(ValueError, match="`coefficients` describes a base model, and this one is adapted"):
        verify_coefficients(model, x, coefficients=coefficients)
    with pytest.raises(ValueError, match="the model has adapters already, on .* infer from the base model"):
        infer_coefficients(model, x)
    model.save_pretrained(tmp_path)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), y, 0)


class ResidualKANLayer(nn.Module):
    """y_o = Σ_i Σ_d A[i, o, d] φ_d(x_i) + inner(x): a KAN layer around another one."""

    def __init__(self):
        super().__init__()
        self.inner = kans.ChebyKANLayer(4, 4, 3)
        self.coeffs = nn.Parameter(torch.randn(4, 4, 5))

    def forward(self, x):
        return torch.einsum("bid,iod->bo", kans.chebyshev(torch.tanh(x), 4), self.coeffs) + self.inner(x)


@pytest.mark.parametrize("registered", [False, True])
def test_a_kan_layer_around_another(registered):
    """Only the inner layer is found."""
    if registered:
        register_kan_layer(kans.ChebyKANLayer, {"cheby_coeffs": "i o d"})
    base, x = nn.Sequential(ResidualKANLayer()).double(), ROWS[:, :4]
    found = infer_coefficients(base, x)
    assert list(found) == ["0.inner.cheby_coeffs"]
    assert "coeffs: left out, it is used around the KAN layers ['0.inner'], and both cannot be adapted" in str(found)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=found, init_weights=False))
    assert_equal(model(x), dense_model(base, model)(x))


def test_registered_layers_are_not_tested_again_in_the_modules_around_them():
    register_kan_layer(kans.KANLinear, {"spline_weight": "o i d"})
    found = infer_coefficients(nn.Sequential(nn.Sequential(kans.KANLinear(4, 4))), ROWS[:, :4])
    assert (found.forwards, found.backwards) == (1, 0)
    assert str(found).count("\n") == 2  # the layer, its tensor, the number of passes


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: kans.KANLinear(4, 4), ROWS[:, :4]),
        (lambda: kans.NaiveFourierKANLayer(4, 4), ROWS[:, :4]),
        (lambda: kans.TupleKANLayer(4, 4, 3), ROWS[:, :4]),
        (lambda: PyKANLayer(4, 4), ROWS[:, :4]),
        (lambda: kans.GroupedPolyConvKANLayer(4, 4, groups=2, per_group=True), IMAGES),
        (lambda: kans.UnfoldConvKANLayer(4, 4, groups=2), IMAGES),
    ],
)
def test_what_is_inferred_can_be_adapted(layer, x):
    base, x = nn.Sequential(layer()).eval().double(), x.double()
    model = get_peft_model(
        copy.deepcopy(base), LoTRAConfig(r=2, coefficients=infer_coefficients(base, x), init_weights=False)
    )
    y = first_tensor(model(x))
    assert_different(y, first_tensor(base(x)))
    assert_equal(y, first_tensor(dense_model(base, model)(x)))


# Wrong declarations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "wrong", "message"),
    [
        (
            lambda: kans.ChebyKANLayer(4, 4, 2),
            {"cheby_coeffs": "o i d"},
            "declared is 'o i d' (n, m, n_d) = (4, 4, 3), found 'i o d' (n, m, n_d) = (4, 4, 3): axis 0 of the "
            "parameter holds i=4, not o=4; axis 1 of the parameter holds o=4, not i=4 (i input, o output, d basis)",
        ),
        (lambda: kans.ChebyKANLayer(4, 3, 3), {"cheby_coeffs": "d o i"}, "found 'i o d' (n, m, n_d) = (4, 3, 4)"),
        (
            lambda: kans.MatrixKANLayer(4, 3),
            {"weight": {"layout": "o (d i)", "sizes": {"d": 4}}},
            "found 'o (i d)' (n, m, n_d) = (4, 3, 4): axis 1 of the parameter holds i=4 d=4, not d=4 i=4 (i ",
        ),
        (lambda: kans.MatrixKANLayer(4, 3), {"weight": {"layout": "o (i d)", "sizes": {"d": 2}}}, "axis 1 of the"),
        (
            lambda: kans.KANLinear(4, 4),
            {"spline_weight": {"layout": "o i d", "scale": "spline_scaler", "scale_layout": "i o"}},
            "scale spline_scaler 'i o', found the scale spline_scaler o i",
        ),
        (
            lambda: kans.KANLinear(4, 4),
            {"spline_weight": {"layout": "o i d", "scale": "base_weight", "scale_layout": "o i"}},
            "found the scale spline_scaler o i",
        ),
        (
            lambda: kans.PackedKANLayer(4, 3),
            {"weight": {"layout": "o (i d)", "sizes": {"d": 7}}},
            "declared is 'o (i d)' (n, m, n_d) = (4, 3, 7), but the layer's response does not",
        ),
        (
            lambda: kans.PackedKANLayer(4, 3),
            {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, 4:"}},
            "the layer's response does not confirm it",
        ),
        (lambda: kans.SquaredKANLayer(4, 4, 3), {"cheby_coeffs": "i o d"}, "confirm it: the layer is not affine in"),
        (lambda: kans.AliasedKANLayer(4, 4), {"coeffs": "i o d"}, "through an alias, so that an adapter would be"),
    ],
)
def test_wrong_declarations_are_named(layer, wrong, message):
    model = nn.Sequential(nn.Tanh(), layer())
    with pytest.raises(ValueError, match=f"^KAN layer '1', parameter {next(iter(wrong))}: declared is ") as error:
        verify_coefficients(model, ROWS[:, :4], coefficients=wrong)
    assert message in str(error.value)


def test_right_declarations_pass():
    model = nn.Sequential(kans.KANLinear(4, 4), kans.PackedKANLayer(4, 4), kans.NaiveFourierKANLayer(4, 4))
    coefficients = {
        "spline_weight": {"layout": "o i d", "scale": "spline_scaler", "scale_layout": "o i"},
        "1.weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, 0:-4"},
        "fouriercoeffs": "d2 o i d1",  # the order of basis functions is anyone's choice
    }
    report = verify_coefficients(model, ROWS[:, :4], coefficients=coefficients)
    assert str(report).count("; verified") == 3
    assert "scale spline_scaler 'o i'" in str(report)


def test_registered_layouts_are_verified():
    model = nn.Sequential(kans.ChebyKANLayer(4, 4, 3))
    with pytest.raises(ValueError, match="no KAN layer found"):
        verify_coefficients(model, ROWS[:, :4])
    register_kan_layer(kans.ChebyKANLayer, {"cheby_coeffs": "i d o"})
    with pytest.raises(
        ValueError, match="KAN layer '0', parameter cheby_coeffs: declared is 'i d o' .* found 'i o d'"
    ):
        verify_coefficients(model, ROWS[:, :4])
    register_kan_layer(kans.ChebyKANLayer, {"cheby_coeffs": "i o d"})
    assert list(verify_coefficients(model, ROWS[:, :4])) == ["0.cheby_coeffs"]
    assert str(infer_coefficients(model, ROWS[:, :4])).count("registered") == 1


def test_a_layer_that_does_not_run_cannot_be_verified():
    with pytest.raises(ValueError, match="KAN layer 'unused' did not run on this sample: give one on which"):
        verify_coefficients(
            Mixed(), ROWS[:, :3], coefficients={"unused.weight": {"layout": "o (i d)", "sizes": {"d": 4}}}
        )


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("i o d", "i o d", True),
        ("i o d", "o i d", False),
        ("d1 o i", "d o i", True),
        ("(d1 i) o d2", "(d2 i) o d1", True),
        ("(d1 i) o d2", "(i d1) o d2", False),
        ("i o d h w", "i o d w h", True),  # kernel positions are not factored
        ("i o d h w", "i o h d w", False),
    ],
)
def test_agreement_of_layouts(one, two, same):
    shape = (4,) * len(re.findall(r"\([^()]*\)|\S+", one))
    sizes = {
        axis: 2 for axis in ("d1", "d2", "i") if "(" in one and axis in one.partition(")")[0] + two.partition(")")[0]
    }
    layouts = [Layout.fit(p, shape, {a: s for a, s in sizes.items() if a in p.partition(")")[0]}) for p in (one, two)]
    assert agree(*layouts) == same


# Nothing is changed, and it does not take long -----------------------------------------------------------------------


class Counter(kans.BatchNormKANLayer):
    """Counts its calls in an attribute and a buffer, and registers a hook."""

    def __init__(self, n, m):
        super().__init__(n, m, 3)
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))
        self.register_forward_hook(lambda module, args, output: output + 0)

    def forward(self, x):
        self.calls += 1
        self.total += 1
        if x.isnan().any():
            raise ValueError("NaN in the input")
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("check", [infer_coefficients, verify_coefficients])
def test_the_model_is_left_as_it_was(fails, check):
    model = nn.Sequential(Counter(4, 4), nn.Dropout(0.5), kans.KANLinear(4, 4))
    model(ROWS[:, :4]).sum().backward()
    model[0].norm.eval()
    model[2].spline_scaler.requires_grad_(False)
    x = ROWS[:, :4].clone().requires_grad_()
    if fails:
        x.data[0, 0] = torch.nan

    def state():
        modules = [(name, module.training, dict(module.__dict__)) for name, module in model.named_modules()]
        tensors = [*model.parameters(), *model.buffers()]
        values = [(id(t), t.requires_grad, t.clone(), None if t.grad is None else t.grad.clone()) for t in tensors]
        return modules, values, torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()

    before = state()
    kwargs = {"coefficients": {"cheby_coeffs": "i o d"}} if check is verify_coefficients else {}
    if fails:
        with pytest.raises(ValueError, match="the model fails on this sample.*NaN in the input"):
            check(model, x, **kwargs)
    else:
        check(model, x, **kwargs)
    for (name, training, attributes), (_, was_training, old) in zip(state()[0], before[0], strict=True):
        assert training == was_training, name
        assert list(attributes) == list(old), name
        assert all(attributes[key] is old[key] for key in old), name
    torch.testing.assert_close(state()[1], before[1], rtol=0, atol=0)
    assert torch.equal(state()[2], before[2])
    assert state()[3:] == before[3:]
    assert x.grad is None


@pytest.mark.parametrize("name", ["efficient-kan", "fast-kan", "ChebyKAN", "pykan", "matrix (d i)", "Fourier o i"])
def test_cost_does_not_depend_on_the_size(name):
    make, kwargs, _ = LAYERS[name]
    spent = []
    for size in (4, 64):
        passes = Passes()
        layer = make(size, size, **kwargs)
        infer_layer(layer, ((torch.rand(16, size),), {}), [path for path, _ in layer.named_parameters()], passes)
        spent.append(passes)
    assert spent[0] == spent[1]
    assert spent[0].forward <= 10
    assert spent[0].backward <= 14


# Layers alike --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: kans.MatrixKANLayer(4, 4),
        lambda: kans.KANLinear(4, 4),
        lambda: kans.FastKANLayer(4, 4),
        lambda: kans.NaiveFourierKANLayer(4, 4),
        lambda: PyKANLayer(4, 4),
        lambda: kans.TwoTensorKANLayer(4, 4),
        lambda: InPlaceKANLayer(4, 4, 3),
    ],
)
def test_layers_alike_confirm_in_one_pass(make):
    class Pair(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = nn.ModuleList([make() for _ in range(count)])

        def forward(self, x):
            for layer in self.layers:
                x = first_tensor(layer(x))
            return x

    few, many = (infer_coefficients(Pair(count), ROWS[:, :4]) for count in (1, 5))
    tensors = len(few)
    assert len(many) == 5 * tensors
    for key, entry in many.items():
        expected = few[re.sub(r"layers.\d", "layers.0", key)]
        assert {**entry, "layer": ""} == {**expected, "layer": ""}
    assert str(many).count("like layers.0, confirmed, ") == 4 * tensors
    # What is left over, such as a residual weight, is tested once more in the layer around.
    assert many.forwards <= few.forwards + 4 + 1
    assert many.backwards <= few.backwards + 1


class TurningKANLayer(kans.MatrixKANLayer):
    """The order of the flattened axis is in a buffer."""

    def __init__(self, turned, same_steps):
        super().__init__(4, 4)
        self.same_steps = same_steps
        self.register_buffer("turned", torch.tensor(turned))
        order = torch.arange(16)
        self.register_buffer("places", order.view(4, 4).T.flatten() if turned else order)

    def forward(self, x):
        basis = kans.chebyshev(torch.tanh(x), self.degree)
        if self.same_steps:
            return nn.functional.linear(basis.flatten(-2)[:, self.places], self.weight)
        return nn.functional.linear((basis.transpose(-1, -2) if self.turned else basis).flatten(-2), self.weight)


@pytest.mark.parametrize("same_steps", [False, True])
def test_layers_that_only_look_alike(same_steps):
    model = nn.Sequential(*[TurningKANLayer(turned, same_steps) for turned in (False, False, True, True)])
    found = infer_coefficients(model, ROWS[:, :4])
    assert [entry["layout"] for entry in found.values()] == ["o (i d)", "o (i d)", "o (d i)", "o (d i)"]
    assert "like 0, confirmed" in str(found)
    assert "like 2, confirmed" in str(found)


def test_a_dead_layer_is_no_example_for_others():
    """A refusal that is owed to the values of a layer is not taken over."""
    model = nn.Sequential(*[kans.MatrixKANLayer(4, 4) for _ in range(2)], nn.Linear(4, 4))
    infinite = model[0]
    infinite.weight.data[0, 0] = torch.inf
    model.forward = lambda x: (model[0](x), model[1](x))[1]
    assert list(infer_coefficients(model, ROWS[:, :4])) == ["1.weight"]


def test_alike_layers_are_verified_in_one_pass():
    model = nn.Sequential(*[kans.MatrixKANLayer(4, 4) for _ in range(4)])
    declared = {"weight": {"layout": "o (i d)", "sizes": {"d": 4}}}
    one = verify_coefficients(model[:1], ROWS[:, :4], coefficients=declared)
    report = verify_coefficients(model, ROWS[:, :4], coefficients=declared)
    assert (report.forwards, report.backwards) == (one.forwards + 3, one.backwards)
    with pytest.raises(ValueError, match="KAN layer '3', parameter weight: declared is 'o \\(d i\\)'"):
        verify_coefficients(
            model, ROWS[:, :4], coefficients=declared | {"3.weight": {"layout": "o (d i)", "sizes": {"d": 4}}}
        )


def test_only_running_layers_are_in_memory():
    """What a layer has received is freed when it has been tested."""
    alive = []

    class Watching(kans.MatrixKANLayer):
        def forward(self, x):
            alive.append(weakref.ref(x))
            return super().forward(x)

    model = nn.Sequential(*[Watching(4, 4) for _ in range(12)])
    most = 0

    class Last(nn.Module):
        def forward(self, x):
            nonlocal most
            gc.collect()
            most = sum(x() is not None for x in alive)
            return x

    model.append(Last())
    infer_coefficients(model, ROWS[:, :4])
    assert len(alive) > 24
    assert most <= 2


def test_layers_of_an_adapted_model_are_verified_without_their_adapters():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Conv2d(4, 4, 3, padding=1)
            self.kan = kans.ConvKANLayer(4, 6)

        def forward(self, x):
            return self.kan(self.plain(x))

    base = nn.Sequential(Convolution())
    declared = {"kan.spline_conv.weight": {"layout": "o (i d) h w", "sizes": {"d": 4}}}
    declared_by_path = {"0." + key: value for key, value in declared.items()}
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=declared_by_path, init_weights=False))
    y = model(IMAGES)
    assert str(verify_coefficients(model, IMAGES)).count("; verified") == 1
    assert_equal(model(IMAGES), y, 0)
    model.merge_adapter()
    merged = model(IMAGES)
    assert str(verify_coefficients(model, IMAGES)).count("; verified") == 1
    assert_equal(model(IMAGES), merged, 0)
    assert_different(merged, base(IMAGES))


@pytest.mark.parametrize(
    "activation",
    [nn.Identity, nn.ReLU, nn.Tanh, lambda: nn.LayerNorm(4), lambda: nn.BatchNorm1d(4)],
    ids=["nothing", "ReLU", "tanh", "LayerNorm", "BatchNorm"],
)
@pytest.mark.parametrize(
    "outer", [nn.Identity, lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 3))], ids=["alone", "mlp"]
)
def test_rows_of_an_image_are_no_functions_of_its_columns(activation, outer):
    images = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(5))
    model = nn.Sequential(nn.Sequential(activation(), nn.Flatten(), nn.Linear(16, 5)), outer())
    with pytest.raises(ValueError, match="no KAN coefficient tensor found"):
        infer_coefficients(model, images)


def test_a_kernel_as_large_as_the_image_is_a_linear_weight():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 5, (6, 4)), nn.Flatten()))
    with pytest.raises(ValueError, match="one function per input \\(n_d = 1\\)"):
        infer_coefficients(model, torch.randn(9, 1, 6, 4))


@pytest.mark.parametrize("order", ["i d", "d i"])
def test_a_layer_that_flattens_its_input(order):
    images = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(5))
    model = nn.Sequential(nn.Sequential(nn.Flatten(), kans.MatrixKANLayer(6, 4, order=order)))
    assert infer_coefficients(model, images)["0.1.weight"]["sizes"] == {"o": 4, "i": 6, "d": 4}

    class Flattening(kans.MatrixKANLayer):
        def forward(self, x):
            return super().forward(x.flatten(1))

    found = infer_coefficients(nn.Sequential(Flattening(6, 4, order=order)), images)
    assert found["0.weight"] == {"layout": f"o ({order})", "sizes": {"o": 4, "i": 6, "d": 4}}


class LookupKANLayer(nn.Module):
    """y = Σ_i lerp(values[i, ⌊x_i⌋], values[i, ⌊x_i⌋ + 1], x_i - ⌊x_i⌋): looked up by number, as in kanditioned."""

    def __init__(self, n, m, points=8):
        super().__init__()
        self.points = points
        self.values = nn.Parameter(torch.randn(n, points, m))

    def forward(self, x):
        at = (x + 1) * (self.points - 1) / 2
        low = at.floor().clamp(0, self.points - 2)
        rows = low.long() + self.points * torch.arange(len(self.values))
        table = self.values.view(-1, self.values.shape[-1])
        lower, upper = nn.functional.embedding(rows, table), nn.functional.embedding(rows + 1, table)
        return torch.lerp(lower, upper, (at - low).unsqueeze(-1)).sum(1)


def test_rows_looked_up_by_number():
    assert inferred(LookupKANLayer(4, 5), ROWS[:, :4]) == {"values": ("i d o", (4, 5, 8), None, None)}
