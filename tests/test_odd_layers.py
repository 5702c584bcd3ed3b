"""Layers with rarer uses of their coefficients: found without a declaration, verified, and through the harness."""

import copy
import re

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import ConvKANLayer, GroupedPolyConvKANLayer, MatrixKANLayer
from odd_layers import (
    BatchedProductKANLayer,
    ComplexBasisKANLayer,
    ComplexInputKANLayer,
    CumulativeKANLayer,
    DegreesKANLayer,
    EvenKANLayer,
    ExpertsKANLayer,
    FactorisedKANLayer,
    FlatKANLayer,
    FrequenciesKANLayer,
    GatedKANLayer,
    GramConvLayer,
    GroupedFastConvLayer,
    GroupNormalizedConvLayer,
    InterpolatingKANLayer,
    NormalizedKANLayer,
    OneCurveKANLayer,
    PowersKANLayer,
    RecurrentKANLayer,
    ReLUKANLayer,
    ReorderedKANLayer,
    RootsKANLayer,
    SharingKANLayer,
    StackedKANLayer,
    TokensKANLayer,
    TransposedConvKANLayer,
    TwoBasesKANLayer,
    VmapKANLayer,
    WindowedKANLayer,
)
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, infer_coefficients, verify_coefficients
from peft_lotra.coefficients import Layout
from peft_lotra.standin import PerformanceWarning
from peft_lotra.testing import KANLayerTests, forget_warnings

pytestmark = pytest.mark.usefixtures("fp32")  # the harness has its samples in fp32

ROWS, IMAGE = (9, 4), (3, 4, 6, 6)
KERNEL = {"h": 3, "w": 3}

# layer, shape of a sample, dtype of it, expected {parameter: (layout, sizes)}
LAYERS = {
    "a norm and a tensor for each group": (
        lambda: GroupedFastConvLayer(4, 6),
        IMAGE,
        {f"spline_conv.{g}.weight": ("o (i d) h w", {"o": 3, "i": 2, "d": 4} | KERNEL) for g in range(2)},
    ),
    "a norm and a tensor for each channel": (
        lambda: GroupedFastConvLayer(4, 8, groups=4),
        IMAGE,
        {f"spline_conv.{g}.weight": ("o (i d) h w", {"o": 2, "i": 1, "d": 4} | KERNEL) for g in range(4)},
    ),
    "a scaling for each group": (
        lambda: GroupNormalizedConvLayer(4, 6),
        IMAGE,
        {"weights": ("g o (d i) h w", {"g": 2, "o": 3, "d": 4, "i": 2} | KERNEL)},
    ),
    "a scaling for each channel": (
        lambda: GroupNormalizedConvLayer(4, 4, groups=4),
        IMAGE,
        {"weights": ("g o (i d) h w", {"g": 4, "o": 1, "i": 1, "d": 4} | KERNEL)},
    ),
    "depthwise": (
        lambda: GroupedPolyConvKANLayer(4, 8, groups=4),
        IMAGE,
        {"poly_weights": ("g o (i d) h w", {"g": 4, "o": 2, "i": 1, "d": 4} | KERNEL)},
    ),
    "depthwise, one output each": (
        lambda: GroupedPolyConvKANLayer(4, 4, groups=4),
        IMAGE,
        {"poly_weights": ("g o (i d) h w", {"g": 4, "o": 1, "i": 1, "d": 4} | KERNEL)},
    ),
    "depthwise, a tensor for each channel": (
        lambda: GroupedPolyConvKANLayer(4, 8, groups=4, per_group=True),
        IMAGE,
        {f"poly_weights.{g}": ("o (i d) h w", {"o": 2, "i": 1, "d": 4} | KERNEL) for g in range(4)},
    ),
    "a bottleneck for each group": (
        lambda: GramConvLayer(8, 6, groups=2, inner=3),
        (3, 8, 6, 6),
        {"poly_weights": ("g o (d i) h w", {"g": 2, "o": 3, "d": 4, "i": 3} | KERNEL)},
    ),
    "images of one channel": (
        lambda: ConvKANLayer(1, 5),
        (3, 1, 6, 6),
        {"spline_conv.weight": ("o (i d) h w", {"o": 5, "i": 1, "d": 4} | KERNEL)},
    ),
    "two bases side by side": (
        lambda: TwoBasesKANLayer(4, 5),
        ROWS,
        {"weight": ("o (i d)", {"o": 5, "i": 4, "d": 7})},
    ),
    "one weight on two bases": (
        lambda: StackedKANLayer(4, 5),
        (2, 9, 4),
        {"weight": ("o (i d)", {"o": 5, "i": 4, "d": 4})},
    ),
    "complex inputs": (
        lambda: ComplexInputKANLayer(4, 5),
        ROWS,
        {name: ("i o d1 d2", {"i": 4, "o": 5, "d1": 3, "d2": 3}) for name in ("real", "imaginary")},
    ),
    "complex functions": (
        lambda: ComplexBasisKANLayer(4, 5),
        ROWS,
        {"coeffs": ("i o d", {"i": 4, "o": 5, "d": 4})},
    ),
    "flattened axes": (
        lambda: ReLUKANLayer(4, 5),
        ROWS,
        {"equal_size_conv.weight": ("o (i d)*", {"o": 5, "i": 4, "d": 6})},
    ),
    "vmap": (lambda: VmapKANLayer(4, 5), ROWS, {"values": ("i o d", {"i": 4, "o": 5, "d": 5})}),
    "cumsum": (lambda: CumulativeKANLayer(4, 5), ROWS, {"steps": ("i d o", {"i": 4, "d": 5, "o": 5})}),
    "picked rows": (lambda: SharingKANLayer(4, 5), ROWS, {"coef": ("(o i) d", {"o": 5, "i": 4, "d": 5})}),
    "a list of degrees": (lambda: DegreesKANLayer(4, 5), ROWS, {"c.*": ("d | o i", {"d": 4, "o": 5, "i": 4})}),
    "a linear layer for each frequency": (
        lambda: FrequenciesKANLayer(4, 5),
        ROWS,
        {"waves.*.weight": ("d | o i", {"d": 3, "o": 5, "i": 4})},
    ),
    "a parameter for each power": (lambda: PowersKANLayer(4, 5), ROWS, {"p*": ("d | i o", {"d": 3, "i": 4, "o": 5})}),
    "products of batches": (
        lambda: BatchedProductKANLayer(4, 6),
        ROWS,
        {"weight": ("g (i d) o", {"g": 2, "i": 2, "d": 4, "o": 3})},
    ),
    "inputs in another order": (lambda: ReorderedKANLayer(4, 5), ROWS, {"coef": ("i o d", {"i": 4, "o": 5, "d": 5})}),
    "a window": (lambda: WindowedKANLayer(4, 5), ROWS, {"coef": ("i o d", {"i": 4, "o": 5, "d": 5})}),
    "a gate": (lambda: GatedKANLayer(4, 5), ROWS, {"weight": ("o (i d)", {"o": 10, "i": 4, "d": 4})}),
    "even functions": (lambda: EvenKANLayer(4, 5), ROWS, {"weight": ("o (i d)", {"o": 5, "i": 4, "d": 5})}),
    "tokens": (lambda: TokensKANLayer(4, 5), (3, 4, 6), {"coef": ("i o d", {"i": 4, "o": 5, "d": 4})}),
    "a vector": (lambda: FlatKANLayer(4, 5), ROWS, {"vector": ("(i o d)", {"i": 4, "o": 5, "d": 4})}),
    "a transposed convolution": (
        lambda: TransposedConvKANLayer(4, 5),
        IMAGE,
        {"weight": ("(i d) o h w", {"i": 4, "d": 4, "o": 5} | KERNEL)},
    ),
    "tables of values": (lambda: InterpolatingKANLayer(4, 5), ROWS, {"values": ("i d o", {"i": 4, "d": 6, "o": 5})}),
}
LINEAR = "it has one function per input (n_d = 1): a linear weight, no basis axis"
REFUSED = {  # layers with no coefficient tensor, or none that an adapter could take the place of, and the reasons
    "coefficients over their norm": (NormalizedKANLayer, {"coef": "the layer is not affine in it"}),
    "the same coefficients three times": (RecurrentKANLayer, {"coef": "the layer is not affine in it"}),
    "one curve for all": (OneCurveKANLayer, {"curve": "it is a vector", "mix": LINEAR}),
    "a product of factors": (
        FactorisedKANLayer,
        {
            "a, c": "its entries cannot be told apart by output",
            "b": "its entries cannot be told apart by input feature",
        },
    ),
    "experts": (
        ExpertsKANLayer,
        {"coef": "its entries cannot be told apart by input feature", "route.weight": LINEAR},
    ),
    "roots": (RootsKANLayer, {"roots": "its response does not change with the input: it is added"}),
}
DENSE = {  # operations on the coefficients without a factorised form, which the warning names
    "complex functions": "`to`",
    "flattened axes": "keeps its coefficients as 'o (i d)*', across axes",
    "vmap": "torch.vmap",
    "cumsum": "`cumsum`",
    "picked rows": "`__getitem__`",
    "a transposed convolution": "`conv_transpose2d`",
    "tables of values": "`__getitem__`",
}


def sample(name):
    shape = LAYERS[name][1]
    x = torch.rand(shape) * 1.8 - 0.9
    return torch.complex(x, torch.rand(shape) * 1.8 - 0.9) if name == "complex inputs" else x


def declared(name):
    return {
        f"0.{path}": {"layout": layout, "sizes": sizes, "layer": "0"}
        for path, (layout, sizes) in LAYERS[name][2].items()
    }


@pytest.mark.parametrize("name", LAYERS)
def test_found_without_a_declaration(name):
    torch.manual_seed(3)
    base = nn.Sequential(LAYERS[name][0]())
    x = sample(name)
    found = infer_coefficients(base, x)
    assert {key: (entry["layout"], entry["sizes"]) for key, entry in found.items()} == {
        key: (entry["layout"], entry["sizes"]) for key, entry in declared(name).items()
    }
    assert str(verify_coefficients(base, x, coefficients=found)).count("; verified") == len(found)
    model = get_peft_model(base, LoTRAConfig(r=1, coefficients=found))
    assert str(verify_coefficients(model, x)).count("; verified") == len(found)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    torch.manual_seed(3)
    make, reasons = REFUSED[name]
    with pytest.raises(ValueError, match="no KAN coefficient tensor found") as error:
        infer_coefficients(nn.Sequential(make(4, 5)), torch.rand(ROWS) * 1.8 - 0.9)
    for parameters, reason in reasons.items():
        assert f"    {parameters}: left out, {reason}" in str(error.value)


def test_thirty_odd_layers():
    assert len(LAYERS) + len(REFUSED) >= 30


@pytest.mark.parametrize(
    "name", ["a norm and a tensor for each group", "a scaling for each group", "two bases side by side"]
)
def test_layers_alike_confirm(name):
    torch.manual_seed(3)
    make = LAYERS[name][0]

    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([make() for _ in range(3)])

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    found = infer_coefficients(Side(), sample(name))
    assert len(found) == 3 * len(LAYERS[name][2])
    assert str(found).count("like layers.0, confirmed, ") == 2 * len(LAYERS[name][2])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::peft_lotra.PerformanceWarning")
class TestOddLayers(KANLayerTests):
    @pytest.fixture(autouse=True)
    def _row(self, name):
        self.name, self.coefficients, self.ranks = name, declared(name), (1, 1, 2)

    def make_layer(self):
        return LAYERS[self.name][0]()

    def make_sample(self):
        return sample(self.name)


@pytest.mark.parametrize("name", DENSE)
def test_without_a_factorised_form_there_is_a_warning(name):
    forget_warnings()
    model = get_peft_model(nn.Sequential(LAYERS[name][0]()), LoTRAConfig(r=1, coefficients=declared(name)))
    with pytest.warns(PerformanceWarning, match=re.escape(DENSE[name])):
        model(sample(name))


# The star of a layout ------------------------------------------------------------------------------------------------


def test_a_star_flattens_stored_axes():
    A = torch.arange(60.0).view(3, 4, 5)  # (i, o, d)
    for pattern, stored in {
        "o (i d)*": A.transpose(0, 1).reshape(4, 1, 5, 3),
        "(i d)* o": A.permute(0, 2, 1).reshape(5, 3, 4),
        "(o i d)*": A.transpose(0, 1).reshape(6, 10),
    }.items():
        layout = Layout.fit(pattern, stored.shape, {"d": 5, "i": 3})
        assert layout.canonical_shape == (3, 4, 5)
        assert_equal(layout.to_canonical(stored), A, 0)
        assert_equal(layout.from_canonical(A), stored, 0)
        assert layout.from_canonical(A).shape == stored.shape


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("o i* d", "layout 'o i* d' should have at most one `*`, after a parenthesis, as in 'o (i d)*'"),
        ("(o i)* (d)*", "should have at most one `*`"),
        (
            {"layout": "o i (d g)*", "sizes": {"g": 1}},
            "flattens several stored axes, and of shape (4, 3, 5) leaves fewer",
        ),
        (
            {"layout": "o (i d)*", "sizes": {"d": 4}},
            "layout 'o (i d)*' with sizes {'d': 4} does not fit the shape (4, 15)",
        ),
        (
            {"layout": "o (i d)*", "sizes": {"d": 5}, "slice": ":2"},
            "a description has one of `slice`, `scale`, a star",
        ),
    ],
)
def test_wrong_stars_are_named(description, message):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 3, 5))

    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(nn.Sequential(Layer()), LoTRAConfig(r=1, coefficients={"0.w": description}))


@pytest.mark.filterwarnings("ignore::peft_lotra.PerformanceWarning")
def test_a_star_survives_saving(tmp_path):
    base = nn.Sequential(ReLUKANLayer(4, 5), MatrixKANLayer(5, 2)).double()
    x = sample("flattened axes").double()
    coefficients = infer_coefficients(base, x)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=coefficients, init_weights=False))
    y = model(x)
    assert_different(y, base(x))
    model.save_pretrained(tmp_path)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), y, 0)
    assert_equal(model.merge_and_unload()(x), y)


def test_a_wrong_star_is_not_verified():
    base = nn.Sequential(ReLUKANLayer(4, 5))
    wrong = {"0.equal_size_conv.weight": {"layout": "o (d i)*", "sizes": {"d": 6}}}  # of the convolution in it
    with pytest.raises(ValueError, match=re.escape("found 'o (i d)*' (n, m, n_d) = (4, 5, 6)")):
        verify_coefficients(base, sample("flattened axes"), coefficients=wrong)
