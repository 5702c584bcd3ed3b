import re

import pytest
import torch
from conftest import assert_equal
from kan_layers import ChebyKANLayer, FastKANLayer, KANLinear
from torch import nn

from peft_lotra import register_kan_layer
from peft_lotra.coefficients import CoefficientSpec, Layout, known_coefficients, registered_kan_layers, registry
from peft_lotra.standin.axes import parameter_axes

N, M, ND = 3, 4, 5
A = torch.arange(float(N * M * ND)).reshape(N, M, ND)


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.parametrize(
    ("pattern", "sizes", "stored"),
    [
        ("i o d", {}, A),
        ("o i d", {}, A.transpose(0, 1)),
        ("d o i", {}, A.permute(2, 1, 0)),
        ("o (i d)", {"d": ND}, A.transpose(0, 1).flatten(1)),
        ("o (d i)", {"i": N}, A.permute(1, 2, 0).flatten(1)),
        ("(i d) o", {"d": ND}, A.permute(0, 2, 1).flatten(0, 1)),
        ("(o i d)", {"d": ND, "i": N}, A.transpose(0, 1).flatten()),
        ("d2 o i d1", {"d1": ND}, A.permute(1, 0, 2)[None]),
    ],
)
def test_layout_to_canonical_and_back(pattern, sizes, stored):
    layout = Layout.fit(pattern, stored.shape, sizes)
    assert layout.canonical_shape == (N, M, ND)
    assert_equal(layout.to_canonical(stored), A, 0)
    assert layout.from_canonical(A).is_contiguous()
    assert_equal(layout.from_canonical(A), stored, 0)


def test_layout_with_kernel_and_groups():
    stored = torch.randn(2, 4, 3 * 5, 3, 2)
    layout = Layout.fit("g o (d i) h w", stored.shape, {"d": 5})
    assert layout.canonical_shape == (3, 4, 5, 2, 3, 2)
    for g, o, d, i in [(0, 1, 2, 0), (1, 3, 4, 2)]:
        assert_equal(layout.to_canonical(stored)[i, o, d, g], stored[g, o, d * 3 + i], 0)


def test_parts_of_a_mode_are_joined_in_the_order_of_their_numbers():
    stored = torch.randn(2, M, N, ND)
    joined = Layout.fit("d1 o i d2", stored.shape).to_canonical(stored)
    assert_equal(joined[1, 2], torch.cat([stored[0, 2, 1], stored[1, 2, 1]]), 0)
    joined = Layout.fit("d2 o i d10", stored.shape).to_canonical(stored)
    assert_equal(joined[1, 2], torch.cat([stored[0, 2, 1], stored[1, 2, 1]]), 0)


def test_scale_is_spread_over_the_other_axes():
    layout = Layout.fit("o (i d)", (M, N * ND), {"d": ND})
    scale = torch.randn(M, N)
    assert_equal(layout.expansion("o i")(scale), scale.repeat_interleave(ND, dim=1), 0)


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "message"),
    [
        ("i o d", (3, 4), {}, "layout 'i o d' has 3 axes, the tensor has shape (3, 4)"),
        ("o (i d)", (4, 15), {}, "leaves the sizes of ['i', 'd'] open for shape (4, 15); give all but one"),
        ("o (i d)", (4, 15), {"d": 4}, "layout 'o (i d)' with sizes {'d': 4} does not fit the shape (4, 15)"),
        ("i o d", (3, 4, 5), {"i": 4}, "layout 'i o d' with sizes {'i': 4} does not fit the shape (3, 4, 5)"),
        ("i o d", (3, 4, 5), {"g": 4}, "`sizes` names the axes ['g'], which layout 'i o d' does not have"),
        ("i o", (3, 4), {}, "layout 'i o' lacks the axes ['d']"),
        ("i o o", (3, 4, 5), {}, "names an axis twice"),
        ("i o x", (3, 4, 5), {}, "has unknown axes ['x']"),
        ("i o (d", (3, 4, 5), {}, "unbalanced or nested parentheses"),
        ("o ((i d))", (3, 4), {}, "unbalanced or nested parentheses"),
        ("", (), {}, "unknown axes"),
    ],
)
def test_layout_errors(pattern, shape, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout.fit(pattern, shape, sizes)


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        (3, TypeError, "coefficients are described by a layout or a mapping with 'layout', got 3"),
        ({"sizes": {}}, TypeError, "a mapping with 'layout'"),
        ({"layout": 3}, TypeError, "a layout is a string such as 'i o d'"),
        ({"layout": "i o d", "order": 1}, ValueError, "got also ['order']"),
        ({"layout": "i o d", "scale": "s"}, ValueError, "`scale` and `scale_layout` come together"),
        ({"layout": "i o d", "sizes": {"i": 0}}, ValueError, "`sizes` maps axes to positive integers"),
        ({"layout": "i o d", "slice": "x"}, ValueError, "`slice` is written like ':, :48', a range for each stored"),
        ({"layout": "i o d", "slice": ":,:,:,:"}, ValueError, "`slice` ':,:,:,:' has more axes than `cheby_coeffs`"),
        (
            {"layout": "i o d", "slice": ":", "scale": "s", "scale_layout": "i o"},
            ValueError,
            "has one of `slice`, `scale`",
        ),
        ({"layout": "i o d", "scale": "nope", "scale_layout": "i o"}, ValueError, "`nope` is no tensor of this Cheby"),
        ({"layout": "i o d", "scale": "cheby_coeffs", "scale_layout": "i o"}, ValueError, "has 2 axes, the tensor"),
        (
            {"layout": "i o d", "scale": "cheby_coeffs", "scale_layout": "i h"},
            ValueError,
            "has the axes ['h'], which",
        ),
    ],
)
def test_description_errors(description, error, message):
    with pytest.raises(error, match=re.escape(message)):
        CoefficientSpec.resolve(ChebyKANLayer(3, 4, 2), "cheby_coeffs", description)


@pytest.mark.parametrize("region", [":, :15", ":4, 0:-3", "0:4, :15"])
def test_a_slice_of_a_packed_parameter(region):
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(4, 15 + 3))
    spec = CoefficientSpec.resolve(layer, "weight", {"layout": "o (i d)", "sizes": {"d": 5}, "slice": region})
    assert spec.layout.canonical_shape == (N, M, ND)
    update = parameter_axes(spec, (4, 18)).arrangement({})(A)
    assert_equal(update[:, :15], A.transpose(0, 1).flatten(1), 0)
    assert not update[:, 15:].any()
    assert CoefficientSpec.resolve(layer, "weight", spec.describe()) == spec


def test_a_parameter_that_is_not_there():
    with pytest.raises(ValueError, match=re.escape("`a.b` is no tensor of this ChebyKANLayer, which has the param")):
        CoefficientSpec.resolve(ChebyKANLayer(3, 4, 2), "a.b", "i o d")


def test_complex_coefficients_are_refused():
    layer = nn.Module()
    layer.coef = nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="LoTRA adapts real floating-point tensors only"):
        CoefficientSpec.resolve(layer, "coef", "i o d")


def test_describe_is_what_resolve_reads():
    layer = KANLinear(3, 4)
    (spec,) = known_coefficients(layer)
    assert spec.describe() == {
        "layout": "o i d",
        "sizes": {"o": 4, "i": 3, "d": 8},
        "scale": "spline_scaler",
        "scale_layout": "o i",
    }
    assert CoefficientSpec.resolve(layer, "spline_weight", spec.describe()) == spec


def test_known_layers():
    from kan.KANLayer import KANLayer

    assert [spec.parameter for spec in known_coefficients(KANLayer(3, 4))] == ["coef"]
    assert known_coefficients(KANLinear(3, 4, enable_standalone_scale_spline=False))[0].scale is None
    assert known_coefficients(FastKANLayer(3, 4))[0].layout.canonical_shape == (3, 4, 8)
    assert known_coefficients(ChebyKANLayer(3, 4, 2))[0].layout.canonical_shape == (3, 4, 3)
    assert known_coefficients(nn.Linear(3, 4)) == []


@pytest.mark.usefixtures("scratch_registry")
def test_register_by_class_by_name_and_for_subclasses():
    class Mine(nn.Module):
        def __init__(self, basis):
            super().__init__()
            self.basis = basis
            self.w = nn.Parameter(torch.zeros(4, 3 * basis))

    class Child(Mine):
        pass

    assert known_coefficients(Child(2)) == []
    register_kan_layer(Mine, lambda layer: {"w": {"layout": "o (i d)", "sizes": {"d": layer.basis}}})
    assert known_coefficients(Child(5))[0].layout.canonical_shape == (3, 4, 5)
    name = f"{Child.__module__}.{Child.__qualname__}"
    register_kan_layer(name, {"w": {"layout": "o (d i)", "sizes": {"i": 3}}})
    assert known_coefficients(Child(5))[0].layout.pattern == "o (d i)"
    assert name in registered_kan_layers()


@pytest.mark.usefixtures("scratch_registry")
def test_register_checks_the_description():
    for layer, coefficients, error, message in (
        (nn.Linear, {"weight": "o i"}, ValueError, r"`coefficients\['weight'\]`: layout 'o i' lacks the axes"),
        (nn.Linear, {"weight": 3}, TypeError, r"`coefficients\['weight'\]`: coefficients are described by a layout"),
        (nn.Linear, ["weight"], TypeError, "`coefficients` should be a mapping from names but the value passed is"),
        (nn.Linear, {3: "i o d"}, TypeError, "`coefficients` should be a mapping from names but the value passed is"),
        (nn.Linear(2, 3), {"weight": "i o d"}, TypeError, "`layer_class` should be a class or its qualified name"),
    ):
        with pytest.raises(error, match=message):
            register_kan_layer(layer, coefficients)
    assert known_coefficients(nn.Linear(2, 3)) == []
