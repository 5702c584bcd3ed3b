"""Which layers a config selects, and every error that a selection can give, with the model unharmed."""

import copy
import re

import pytest
import torch
from conftest import assert_equal
from kan_layers import ChebyKAN, ChebyKANLayer, FastKANLayer, MatrixKANLayer, TwoTensorKANLayer
from layer_table import full_factors, lotra_layers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig


class Block(nn.Module):
    """A KAN layer beside other things."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = ChebyKANLayer(4, 4, 3)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """KAN layers of several kinds at several depths: head, layers.0.mlp … layers.2.mlp, tail."""

    def __init__(self):
        super().__init__()
        self.head = FastKANLayer(3, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.linear = nn.Linear(4, 4)
        self.tail = MatrixKANLayer(4, 2)  # of a class that nobody registered

    def forward(self, x):
        x = self.head(x)
        for layer in self.layers:
            x = layer(x)
        return self.tail(self.linear(x))


KNOWN = ["head", "layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
TAIL = {"tail.weight": {"layout": "o (i d)", "sizes": {"d": 4}}}


def selected(**kwargs):
    return list(lotra_layers(get_peft_model(Model(), LoTRAConfig(**{"r": 2} | kwargs))))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, KNOWN),
        ({"coefficients": TAIL}, [*KNOWN, "tail"]),
        ({"target_modules": ["mlp"]}, KNOWN[1:]),
        ({"target_modules": ["head", "layers.1.mlp"]}, ["head", "layers.1.mlp"]),
        ({"target_modules": r"layers\.[01]\..*"}, KNOWN[1:3]),
        ({"exclude_modules": ["mlp"]}, ["head"]),
        ({"exclude_modules": r"layers\.[01]\..*"}, ["head", "layers.2.mlp"]),
        ({"modules_to_save": ["head"]}, KNOWN[1:]),
        ({"layers_to_transform": 1}, ["layers.1.mlp"]),
        ({"layers_to_transform": [0, 2]}, ["layers.0.mlp", "layers.2.mlp"]),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, ["layers.0.mlp", "layers.2.mlp"]),
        ({"layers_to_transform": 0, "layers_pattern": "(blocks|layers)"}, ["layers.0.mlp"]),
        ({"layers_to_transform": 0, "target_modules": ["mlp"]}, ["layers.0.mlp"]),
    ],
)
def test_selection(kwargs, expected):
    assert selected(**kwargs) == expected


def test_a_parameter_may_be_reached_through_the_module_that_owns_it():
    """The user's word goes before the registry's: here the inner Linear is wrapped, not the layer around it."""
    coefficients = {"head.spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": 8}}}
    assert selected(coefficients=coefficients, target_modules=["spline_linear"]) == ["head.spline_linear"]
    coefficients["head.spline_linear.weight"]["layer"] = "head"
    assert selected(coefficients=coefficients, target_modules=["head"]) == ["head"]
    # an ending that reaches into a layer means the layer before it
    assert selected(coefficients={"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": 8}}}) == KNOWN


def test_several_coefficient_tensors_on_one_module_are_nested():
    layer = TwoTensorKANLayer(3, 2)
    base = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(5, 3)
    config = LoTRAConfig(
        coefficients={"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"},
        rank_pattern={"0": {"rbf_weight": 1, "cheby_weight": (2, 1, 2)}},
        init_weights=False,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    outer = model.base_model.model[0]
    assert [outer.spec.parameter, outer.base_layer.spec.parameter] == ["rbf_weight", "cheby_weight"]
    assert [outer.r["default"], outer.base_layer.r["default"]] == [(1, 1, 1), (2, 1, 2)]
    y = model(x)
    assert (y - base(x)).abs().max() > 1e-3
    oracle = copy.deepcopy(base)
    oracle[0].rbf_weight.data += torch.einsum("abc,ia,ob,dc->ido", *full_factors(outer)).flatten(0, 1)
    oracle[0].cheby_weight.data += torch.einsum("abc,ia,ob,dc->iod", *full_factors(outer.base_layer))
    assert_equal(y, oracle(x))
    assert_equal(model.merge_and_unload()(x), y)


def test_the_users_config_is_not_changed_and_serves_again():
    config = LoTRAConfig(compression_ratio=0.5)
    before = copy.deepcopy(config)
    first, second = get_peft_model(ChebyKAN([3, 8, 2]), config), get_peft_model(ChebyKAN([16, 16, 4]), config)
    assert config == before
    assert first.peft_config["default"].rank_pattern != second.peft_config["default"].rank_pattern
    first.add_adapter("again", config)
    assert first.peft_config["again"].rank_pattern == first.peft_config["default"].rank_pattern
    assert config == before


def test_the_models_config_is_complete():
    config = get_peft_model(Model(), LoTRAConfig(r=2, coefficients=TAIL)).peft_config["default"]
    assert config.target_modules == {*KNOWN, "tail"}
    assert config.rank_pattern["layers.0.mlp"] == (2, 2, 2)
    assert config.coefficients["head.spline_linear.weight"] == {
        "layout": "o (i d)",
        "sizes": {"o": 4, "i": 3, "d": 8},
        "layer": "head",
    }
    assert config.coefficients["tail.weight"] == {"layout": "o (i d)", "sizes": {"o": 2, "i": 4, "d": 4}}


def test_patterns_by_layer():
    model = get_peft_model(
        Model(),
        LoTRAConfig(
            r=2,
            rank_pattern={"mlp": 1, "layers.1.mlp": (3, 2, 1)},
            alpha_pattern={r"layers\.[02]\.mlp": 0.5},
        ),
    )
    layers = lotra_layers(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        "head": (2, 2, 2),
        "layers.0.mlp": (1, 1, 1),
        "layers.1.mlp": (3, 2, 1),
        "layers.2.mlp": (1, 1, 1),
    }
    assert [layer.scaling["default"] for layer in layers.values()] == [1.0, 0.5, 1.0, 0.5]


def given(layer, field):
    return {"rank_pattern": layer.r, "alpha_pattern": layer.scaling}[field]["default"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_by_full_parameter_name(field):
    """They go before an expression, whatever the order, and are none themselves."""
    key = "layers.1.mlp.cheby_coeffs"
    model = get_peft_model(Model(), LoTRAConfig(r=2, **{field: {"mlp": 3, key: 1}}))
    expected = {"head": 2, "layers.0.mlp": 3, "layers.1.mlp": 1, "layers.2.mlp": 3}
    if field == "rank_pattern":
        expected = {name: (r, r, r) for name, r in expected.items()}
    else:
        expected["head"] = 1.0
    assert {name: given(layer, field) for name, layer in lotra_layers(model).items()} == expected
    config = model.peft_config["default"]
    assert getattr(config, field) == expected
    again = get_peft_model(Model(), config)
    assert {name: given(layer, field) for name, layer in lotra_layers(again).items()} == expected


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_by_parameter_of_one_module(field, tmp_path):
    coefficients = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    keys = ("0.rbf_weight", "0.cheby_weight"), (None, "0.cheby_weight"), (None, None)
    for rbf_key, cheby_key in keys:
        pattern = {key: value for key, value in ((rbf_key, 1), (cheby_key, 2)) if key}
        pattern = pattern or {"0": {"rbf_weight": 1, "cheby_weight": 2}}
        base = nn.Sequential(TwoTensorKANLayer(3, 2))
        model = get_peft_model(
            base, LoTRAConfig(r=1, coefficients=coefficients, init_weights=False, **{field: pattern})
        )
        layer = model.base_model.model[0]
        values = given(layer, field), given(layer.base_layer, field)
        assert values == (((1, 1, 1), (2, None, 2)) if field == "rank_pattern" else (1, 2))
        saved = {"rbf_weight": values[0], "cheby_weight": values[1]}
        assert getattr(model.peft_config["default"], field) == {"0": saved}
        model.save_pretrained(tmp_path)
        x = torch.randn(5, 3)
        y = model(x)
        loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
        assert (loaded(x) - loaded.get_base_model()(0 * x)).abs().max() > 1e-3
        assert_equal(loaded(x), y)


def test_a_pattern_for_a_parameter_that_is_not_there_is_warned_about():
    with pytest.warns(UserWarning, match=r"`alpha_pattern` names \['typo'\], of which no adapted layer has coeff"):
        get_peft_model(Model(), LoTRAConfig(r=2, alpha_pattern={"mlp": {"cheby_coeffs": 2.0, "typo": 1.0}}))


def test_a_full_parameter_name_need_be_no_regular_expression():
    for field in ("rank_pattern", "alpha_pattern", "coefficients"):
        base = nn.Sequential()
        base.add_module("a(*", MatrixKANLayer(4, 3))
        base.add_module("b", MatrixKANLayer(3, 2))
        layout = {"layout": "o (i d)", "sizes": {"d": 4}}
        coefficients = {"a(*.weight": layout, "b.weight": layout} if field == "coefficients" else {"weight": layout}
        pattern = {} if field == "coefficients" else {field: {"a(*.weight": 2}}
        model = get_peft_model(base, LoTRAConfig(r=1, coefficients=coefficients, **pattern))
        assert list(lotra_layers(model)) == ["a(*", "b"]
        if pattern:
            assert given(lotra_layers(model)["a(*"], field) in ((2, 2, 2), 2)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_warned_about(field):
    with pytest.warns(RuntimeWarning, match=rf"{field} keys did not match any targeted module.*nowhere"):
        get_peft_model(Model(), LoTRAConfig(r=2, **{field: {"nowhere": 1}}))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_which_an_earlier_one_takes_all_is_warned_about(field):
    narrow_first = {r"1\.mlp": 2, "layers.2.mlp": 2, "mlp": 1, "head": 2}
    get_peft_model(Model(), LoTRAConfig(r=2, **{field: narrow_first}))
    wide_first = {"mlp": 1, r"1\.mlp": 2, "layers.2.mlp": 2}
    message = rf"`{field}` key '1\\\\.mlp' has no effect: the first key that fits counts.*\['layers.1.mlp'\]; put the"
    with pytest.warns(UserWarning, match=message) as warned:
        get_peft_model(Model(), LoTRAConfig(r=2, **{field: wide_first}))
    assert len(warned) == 1


@pytest.mark.parametrize("kwargs", [{"alpha": 0}, {"alpha_pattern": {"layers.1.mlp": 0.0}}])
def test_an_alpha_of_zero_is_warned_about(kwargs):
    idle = [f"{name}.cheby_coeffs" for name in KNOWN[1:] if "alpha" in kwargs or name == "layers.1.mlp"]
    message = re.escape(f"`alpha` is 0 for {idle}: the adapter changes nothing there and gets no gradient")
    with pytest.warns(UserWarning, match=message):
        get_peft_model(Model(), LoTRAConfig(r=2, target_modules=["mlp"], **kwargs))


def test_heads_that_peft_names_for_a_task_may_lack():
    """PeftModelForSequenceClassification adds "classifier" and "score" to `modules_to_save`; a model has one."""
    model = Model()
    model.add_module("score", nn.Linear(2, 2))
    model.prepare_inputs_for_generation = None
    adapted = get_peft_model(model, LoTRAConfig(r=2, task_type="SEQ_CLS"))
    assert adapted.peft_config["default"].modules_to_save == ["classifier", "score"]
    with pytest.raises(ValueError, match="`modules_to_save` entry 'nothing' matches no module"):
        get_peft_model(Model(), LoTRAConfig(r=2, task_type="SEQ_CLS", modules_to_save=["nothing"]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"target_modules": ["nowhere"]},
            "`target_modules` entry 'nowhere' matches no module. The model's KAN layers are",
        ),
        ({"target_modules": ["linear"]}, "matches only modules without known coefficients: ['linear (Linear)']"),
        ({"target_modules": "nowhere.*"}, "`target_modules` entry 'nowhere.*' matches no module"),
        (
            {"target_modules": ["head", "tail"]},
            "['tail (MatrixKANLayer)']. The model's KAN layers are ['head', 'layers.",
        ),
        (
            {"target_modules": ["linear"]},
            '`target_modules="all-linear"` adapts every linear layer and convolution, and `coefficients='
            "{'linear.weight': {'layout': 'o (i d)', 'sizes': {'d': 1}}}` makes this one known. The model's KAN",
        ),
        (
            {"target_modules": ["all-linear"]},
            "'all-linear' is no name of a module; write `target_modules=\"all-linear\"`, as a str, for all linear",
        ),
        (
            {"modules_to_save": ["linear", "nothing"]},
            "`modules_to_save` entry 'nothing' matches no module; the model has ['head', ",
        ),
        ({"modules_to_save": ["score"]}, "`modules_to_save` entry 'score' matches no module"),
        ({"exclude_modules": r".*"}, "no KAN layer is left by {'exclude_modules': '.*'}; the model's KAN layers are"),
        ({"layers_to_transform": 7}, "no KAN layer is left by {'layers_to_transform': 7}"),
        (
            {"layers_to_transform": [0, 99, 7]},
            "`layers_to_transform` names [7, 99], but no KAN layer that the other fields leave has such an index; "
            "there are [0, 1, 2], of ['head', 'layers.0.mlp', ",
        ),
        ({"layers_to_transform": [0, 1], "exclude_modules": ["layers.1.mlp"]}, "names [1], but no KAN layer that"),
        (
            {"layers_to_transform": 0, "layers_pattern": "blocks"},
            "no KAN layer is left by {'layers_to_transform': 0, ",
        ),
        ({"coefficients": {"nowhere": "i o d"}}, "`coefficients` names ['nowhere'], which match no parameter of this"),
        (
            {"coefficients": {"cheby_coeffs": "i o d", r"layers\.1\.mlp\.cheby_coeffs": "o i d"}},
            r"key 'layers\\.1\\.mlp\\.cheby_coeffs' means only parameters that other keys take, "
            "{'layers.1.mlp.cheby_coeffs': 'cheby_coeffs'}: a full name takes precedence over a pattern, and a",
        ),
        (
            {"coefficients": {"tail.w.*": TAIL["tail.weight"]} | TAIL},
            "key 'tail.w.*' means only parameters that other keys take, {'tail.weight': 'tail.weight'}",
        ),
        (
            {"coefficients": {"tail.weight": "i o d"}},
            "KAN layer 'tail': layout 'i o d' has 3 axes, the tensor has shape",
        ),
        ({"coefficients": {"weight": TAIL["tail.weight"]}}, "KAN layer 'head.layernorm': layout 'o (i d)' has 2 axes"),
        ({"coefficients": {"tail.weight": "o (i d)"}}, "KAN layer 'tail': layout 'o (i d)' leaves the sizes of"),
        (
            {"coefficients": {"tail.weight": TAIL["tail.weight"] | {"layer": "head"}}},
            "`coefficients['tail.weight']` gives the layer 'head', which is not a module around tail.weight",
        ),
        (
            {"coefficients": {"linear.weight": {"layout": "o (i d)", "sizes": {"d": 3}}}},
            "KAN layer 'linear': layout 'o (i d)' with sizes {'d': 3} does not fit the shape (4, 4)",
        ),
        (
            {"coefficients": {"head.base_linear.weight": {"layout": "o (i d)", "sizes": {"d": 1}}}},
            "the KAN layer head.base_linear lies inside the KAN layer head, and both cannot be wrapped",
        ),
        ({"rank_pattern": {"mlp(": 1}}, "`rank_pattern`: 'mlp(' is not a regular expression (missing ), unterminated"),
        ({"alpha_pattern": {"mlp": 1, "*": 2}}, "`alpha_pattern`: '*' is not a regular expression (nothing to repeat"),
        (
            {"coefficients": {"[.weight": "i o d"}},
            r"`coefficients`: '[.weight' is not a regular expression (unterminated character set at position 8); "
            r"if it is meant as a name, give '\\[\\.weight'",
        ),
        ({"r": 100}, "`r`=100 is above the modes (input, output, basis) of every layer; the largest are (4, 4, 8)"),
        ({"r": (5, 1, 1)}, "`r`=(5, 1, 1) is above the modes"),
        (
            {"rank_pattern": {"layers.0.mlp": (5, 1, 1)}},
            "`rank_pattern` gives layers.0.mlp.cheby_coeffs the ranks (5,",
        ),
        ({"r": None, "compression_ratio": 0.001}, "`compression_ratio`=0.001 allows 0 parameters for the 288 coef"),
    ],
)
def test_errors_leave_the_model_as_it_was(kwargs, message):
    model = Model()
    modules, x = dict(model.named_modules()), torch.randn(2, 3)
    y = model(x)
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(model, LoTRAConfig(**{"r": 2} | kwargs))
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad == (name != "head.rbf.grid") for name, parameter in model.named_parameters())
    assert_equal(model(x), y, 0)
    # and it is still there to be adapted, or to be given a second adapter, after the same mistake
    peft_model = get_peft_model(model, LoTRAConfig(r=2, coefficients=TAIL))
    inside = "'head." in message or "head.base" in message  # what is inside an adapted layer is no layer of its own
    with pytest.raises(ValueError, match="not a module around" if inside else re.escape(message)):
        peft_model.add_adapter("second", LoTRAConfig(**{"r": 2} | kwargs))
    assert list(peft_model.peft_config) == ["default"]
    assert_equal(peft_model(x), y, 0)


def test_no_kan_layer_lists_what_was_looked_for():
    with pytest.raises(ValueError, match="no KAN layer found") as error:
        get_peft_model(nn.Sequential(nn.Linear(2, 3)), LoTRAConfig())
    for part in ("torch.nn.modules.linear.Linear", "all-linear"):
        assert part in str(error.value)
    calls = ("infer_coefficients(model, *sample)", "verify_coefficients(model, *sample, ")
    for way_out in ("register_kan_layer(", "LoTRAConfig(coefficients=", "'o (i d)'", *calls):
        assert way_out in str(error.value)


def test_the_model_itself_is_a_kan_layer():
    with pytest.raises(ValueError, match=re.escape("wrap it, as in nn.Sequential(layer)")):
        get_peft_model(ChebyKANLayer(2, 3, 3), LoTRAConfig())
    assert get_peft_model(nn.Sequential(ChebyKANLayer(2, 3, 3)), LoTRAConfig(r=1))


def test_shared_layers_and_tensors_are_refused():
    layer = ChebyKANLayer(3, 3, 3)
    with pytest.raises(ValueError, match=re.escape("the same object under the names ['0', '1']; untie them")):
        get_peft_model(nn.Sequential(layer, layer), LoTRAConfig(r=1))
    tied = nn.Sequential(ChebyKANLayer(3, 3, 3), ChebyKANLayer(3, 3, 3))
    tied[1].cheby_coeffs = tied[0].cheby_coeffs
    with pytest.raises(ValueError, match=re.escape("under the names ['0.cheby_coeffs', '1.cheby_coeffs']")):
        get_peft_model(tied, LoTRAConfig(r=1))


def test_a_second_adapter_must_describe_the_tensor_alike():
    square = nn.Sequential(MatrixKANLayer(4, 4))
    layout = {"layout": "o (i d)", "sizes": {"d": 4}}
    model = get_peft_model(square, LoTRAConfig(r=1, coefficients={"weight": layout}))
    with pytest.raises(ValueError, match="0.weight is adapted already with {'layout': 'o \\(i d\\)'"):
        model.add_adapter("other", LoTRAConfig(r=1, coefficients={"weight": layout | {"layout": "o (d i)"}}))
    model.add_adapter("other", LoTRAConfig(r=1, coefficients={"weight": layout}))
    assert list(model.peft_config) == ["default", "other"]
