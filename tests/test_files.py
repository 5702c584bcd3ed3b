"""Adapter files are what they say: what is saved, what is loaded, what changed in between, and what is refused."""

import copy
import json
import random
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import assert_different, assert_equal
from kan import KAN as PyKAN
from kan_layers import ChebyKAN, ChebyKANLayer
from launching import limited
from layer_table import lotra_layers, make, randomize
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from test_transformers import needs_loader, needs_mixin
from torch import nn
from transformers import PretrainedConfig

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.adapters.hotswap import hotswap_adapter_from_state_dict
from peft_lotra.coefficients.spec import parse_slice

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 12).reshape(4, 3)
TOKENS = torch.arange(10).reshape(2, 5)
unsigned = pytest.mark.filterwarnings("ignore:.*has no `digest`:UserWarning")


class Model(nn.Sequential):
    """A KAN with a head that is no KAN layer."""

    def __init__(self):
        super().__init__(OrderedDict(layers=nn.Sequential(ChebyKANLayer(3, 4, 3)), head=nn.Linear(4, 2)))


def adapted(base, **kwargs):
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(**({"r": 2} | kwargs)))
    randomize(model)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    return model


@pytest.fixture(params=[{}, {"modules_to_save": ["head"]}], ids=["factors", "with a head"])
def saved(request, tmp_path):
    """A base, the output of an adapter at X, and the directory that it is saved in."""
    torch.manual_seed(1)
    base = Model()
    model = adapted(base, **request.param)
    model.save_pretrained(tmp_path / "adapter")
    return base, model(X).detach(), tmp_path / "adapter"


def edit_config(path, **fields):
    file = path / CONFIG
    kept = {key: value for key, value in (json.loads(file.read_text()) | fields).items() if value is not ...}
    file.write_text(json.dumps(kept))


def edit_weights(path, edit, signed=False):
    """Change the tensors on purpose, as the README says, by a function that is given them."""
    weights = load_file(path / WEIGHTS)
    edit(weights)
    save_file(weights, path / WEIGHTS)
    if not signed:
        edit_config(path, digest=...)


def remains(model):
    """What a refusal must leave as it is."""
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tensors = {
        name: (id(t), t.requires_grad, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    return modules, tensors, hasattr(model, "peft_config")


def assert_untouched(model, before):
    after = remains(model)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert after[1].keys() == before[1].keys()
    for name, (identity, requires_grad, values) in after[1].items():
        assert (identity, requires_grad) == before[1][name][:2]
        assert torch.equal(values, before[1][name][2])


def refused_everywhere(base, path, message, error=ValueError):
    """No way to load the adapter takes it, and each leaves the model as it was."""
    before = remains(base)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, path)
    assert_untouched(base, before)
    kwargs = {key: value for key, value in {"modules_to_save": ["head"]}.items() if "head" in str(load_config(path))}
    model = adapted(base, **kwargs)
    before = remains(model)
    with pytest.raises(error, match=message):
        model.load_adapter(path, "second")
    assert list(model.peft_config) == ["default"]
    assert_untouched(model, before)
    with pytest.raises(error, match=message):
        hotswap_adapter(model, path)
    assert_untouched(model, before)


def load_config(path):
    return json.loads((path / CONFIG).read_text())


# Saving --------------------------------------------------------------------------------------------------------------


def refuses_to_save(model, path, layers, **kwargs):
    with pytest.raises(ValueError, match=rf"tensors of {re.escape(str(layers))} are not those that its config names"):
        model.save_pretrained(path, **kwargs)
    assert not (path / WEIGHTS).exists()
    assert not (path / CONFIG).exists()


def test_a_layer_that_was_replaced_is_not_left_out_of_the_file(tmp_path):
    model = adapted(ChebyKAN([3, 6, 2]))
    model.get_base_model().layers[1] = ChebyKANLayer(6, 2, 3)
    refuses_to_save(model, tmp_path, ["layers.1"])
    with pytest.raises(ValueError, match="by a new `get_peft_model`"):
        get_peft_model_state_dict(model)


def test_a_trained_copy_that_was_replaced_is_not_left_out_of_the_file(tmp_path):
    model = adapted(Model(), modules_to_save=["head"])
    model.get_base_model().head = nn.Linear(4, 2)
    refuses_to_save(model, tmp_path, ["head"])


def test_factors_of_another_shape_are_not_saved(tmp_path):
    model = adapted(ChebyKAN([3, 6, 2]))
    layer = lotra_layers(model)["layers.0"]
    layer.lotra_U1["default"] = nn.Parameter(layer.lotra_U1["default"][:, :1].clone())
    refuses_to_save(model, tmp_path, ["layers.0"])


def test_an_empty_state_dict_is_not_saved(tmp_path):
    model = adapted(ChebyKAN([3, 6, 2]))
    refuses_to_save(model, tmp_path, ["layers.0", "layers.1"], state_dict={})
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert len(load_file(tmp_path / WEIGHTS)) == 7  # one mode is whole


def test_a_pykan_that_was_expanded_is_not_saved(tmp_path):
    model = adapted(make("pykan", torch.float32)[0])
    model.get_base_model().expand_width(1, 1)
    refuses_to_save(model, tmp_path, ["act_fun.0", "act_fun.1"])


def test_pykans_own_checkpoints_are_for_merged_adapters(tmp_path):
    torch.manual_seed(1)
    model = adapted(PyKAN([3, 4, 2], seed=1, auto_save=True, ckpt_path=str(tmp_path)))
    base, y = model.get_base_model(), model(X).detach()
    base.saveckpt(str(tmp_path / "adapted"))
    with pytest.raises(RuntimeError, match="Missing key"):  # pykan loads into a plain network
        PyKAN.loadckpt(str(tmp_path / "adapted"))
    merged = model.merge_and_unload()
    merged.saveckpt(str(tmp_path / "own"))
    assert_equal(PyKAN.loadckpt(str(tmp_path / "own"))(X), y)


# Loading what belongs to the adapter, and nothing else ---------------------------------------------------------------


@unsigned
def test_tensors_of_the_base_are_not_loaded(saved):
    base, _, path = saved
    edit_weights(path, lambda weights: weights.update({"base_model.model.layers.0.cheby_coeffs": torch.ones(3, 4, 4)}))
    refused_everywhere(base, path, r"has \['base_model.model.layers.0.cheby_coeffs'\] in addition")


@unsigned
@pytest.mark.parametrize("key", ["head.weight", "layers.0.base_layer.cheby_coeffs", "nowhere"])
def test_no_state_dict_writes_into_the_base(key):
    model = adapted(Model())
    weights = get_peft_model_state_dict(model)
    before = remains(model)
    for prefix in ("base_model.model.", ""):
        with pytest.raises(ValueError, match=re.escape(f"has ['{prefix}{key}'] in addition")):
            set_peft_model_state_dict(model, weights | {prefix + key: torch.ones(2, 4)})
        with pytest.raises(ValueError, match=re.escape(f"has ['{prefix}{key}'] in addition")):
            hotswap_adapter_from_state_dict(
                model, weights | {prefix + key: torch.ones(2, 4)}, "default", model.peft_config["default"]
            )
    assert_untouched(model, before)


@unsigned
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda head: head.pop("base_model.model.head.bias"), r"it lacks \['base_model.model.head.bias'\]"),
        (lambda head: head.update({"base_model.model.head.bias": torch.ones(3)}), r"head.bias of shape \(3,\)"),
    ],
)
def test_a_trained_copy_that_does_not_fit(edit, message, tmp_path):
    base = Model()
    adapted(base, modules_to_save=["head"]).save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    refused_everywhere(base, tmp_path, message)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"modules_to_save": {"layers.0": 2}}, TypeError, "`modules_to_save` should be a list of names"),
        ({"modules_to_save": ["layers"]}, ValueError, "no KAN layer is left"),
        ({"task_type": "CAUSAL_LM"}, ValueError, "`task_type` 'CAUSAL_LM' is for models that generate"),
        (
            {"trainable_token_indices": [1]},
            ValueError,
            r"`trainable_token_indices` gives the rows \[1\] of 'embed_tokens'",
        ),
        ({"trainable_token_indices": {"nowhere": [1]}}, ValueError, "of 'nowhere', which has 0 rows in this"),
        ({"trainable_token_indices": {"head": [1, 2]}}, ValueError, r"\[1, 2\] of 'head', which has 2 rows"),
        ({"trainable_token_indices": "head"}, TypeError, "`trainable_token_indices` should be a list of indices"),
    ],
)
def test_a_refused_config_leaves_the_model_as_it_was(kwargs, error, message):
    base = Model()
    before = remains(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, LoTRAConfig(r=2, **kwargs))
    assert_untouched(base, before)
    model = adapted(base, modules_to_save=["head"])
    y, before = model(X).detach(), remains(model)
    with pytest.raises(error, match=message):
        model.add_adapter("second", LoTRAConfig(r=2, **kwargs))
    assert_untouched(model, before)
    assert list(model.peft_config) == ["default"]
    assert_equal(model(X), y, 0)
    model.add_adapter("second", LoTRAConfig(r=1))
    model.set_adapter("second")
    assert_different(model(X), y)


@pytest.mark.parametrize(("task", "head"), [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")])
def test_heads_that_peft_names_by_itself_are_saved_and_loaded(task, head, tmp_path):
    base = nn.Sequential(OrderedDict(layers=nn.Sequential(ChebyKANLayer(3, 4, 3)), **{head: nn.Linear(4, 2)}))
    base.config = PretrainedConfig()
    model = adapted(base, task_type=task)
    assert_different(model.get_base_model()(X), base(X))
    model.save_pretrained(tmp_path)
    assert f"base_model.model.{head}.bias" in load_file(tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal(loaded.get_base_model()(X), model.get_base_model()(X), 0)


# The digest ----------------------------------------------------------------------------------------------------------


def data_start(data):
    return 8 + int.from_bytes(data[:8], "little")


def test_every_flipped_bit_of_the_data_is_noticed(saved):
    base, y, path = saved
    file = path / WEIGHTS
    data, draw, before = file.read_bytes(), random.Random(0), remains(base)
    for _ in range(200):
        flipped = bytearray(data)
        flipped[draw.randrange(data_start(data), len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"do not fit the `digest`|has NaN or infinity"):
            PeftModel.from_pretrained(base, path)
    assert_untouched(base, before)
    file.write_bytes(data)
    assert_equal(PeftModel.from_pretrained(base, path)(X), y, 0)


def test_a_changed_config_is_noticed(saved):
    base, _, path = saved
    edit_config(path, alpha=2.0)
    refused_everywhere(base, path, f"remove `digest` from {CONFIG}")


def test_weights_are_edited_by_hand_on_purpose(saved):
    base, y, path = saved
    edit_weights(path, lambda weights: [tensor.mul_(2) for tensor in weights.values()], signed=True)
    refused_everywhere(base, path, "do not fit the `digest`")
    edit_config(path, digest=...)
    with pytest.warns(UserWarning, match=f"{CONFIG} in .* has no `digest`"):
        model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    assert_different(model(X), y)
    model.save_pretrained(path)
    assert_equal(PeftModel.from_pretrained(base, path)(X), model(X), 0)


def test_what_is_trained_after_loading_is_saved_with_its_own_digest(saved, tmp_path):
    base, y, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path, is_trainable=True)
    get_peft_model_state_dict(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.5 if parameter.requires_grad else 1)
    assert_different(model(X), y)
    model.save_pretrained(tmp_path / "trained")
    first, second = (load_config(p)["digest"] for p in (path, tmp_path / "trained"))
    assert first != second
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained")(X), model(X), 0)
    model.peft_config["default"].save_pretrained(tmp_path / "alone")
    assert load_config(tmp_path / "alone")["digest"] is None


# Names, not patterns -------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once():
    """A regular expression that runs away is interrupted."""
    with limited("a regular expression"):
        yield


@unsigned
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "(a+)+!"}, "`target_modules` should be a list of names"),
        ({"exclude_modules": "(a+)+!"}, None),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+!"}, None),
        ({"modules_to_save": ["(a+)+!"]}, "`modules_to_save` entry .* matches no module"),
        (
            {"alpha_pattern": {"(a+)+!": 2.0}},
            r"`alpha_pattern` should name the modules of .* but names \['\(a\+\)\+!', 'a+'\]",
        ),
        ({"rank_pattern": {"(a+)+!": 2}}, "`coefficients` and `rank_pattern` should give"),
        ({"coefficients": {"(a+)+!": "i o d"}}, "`coefficients` and `rank_pattern` should give"),
    ],
)
def test_no_regular_expression_of_a_file_runs(fields, message, tmp_path, at_once):
    base = nn.ModuleDict({"a" * 60: ChebyKANLayer(3, 4, 3)})
    assert re.match("(a+)+!", "a" * 12) is None
    adapted(base).save_pretrained(tmp_path)
    edit_config(tmp_path, digest=..., **fields)
    if message is None:
        assert lotra_layers(PeftModel.from_pretrained(base, tmp_path))
    else:
        before = remains(base)
        with pytest.raises(ValueError, match=message) as caught:
            PeftModel.from_pretrained(base, tmp_path)
        assert str(tmp_path / CONFIG) in str(caught.value)
        assert_untouched(base, before)


def test_a_completed_config_means_names_in_full(tmp_path):
    """`"0"` is an ending of `"1.0"` too, which the adapter left alone."""
    base = nn.Sequential(ChebyKANLayer(3, 3, 3), nn.Sequential(ChebyKANLayer(3, 3, 3)))
    model = adapted(base, target_modules=r"0", alpha=0.5, alpha_pattern={r".?": 2.0})
    assert set(lotra_layers(model)) == {"0"}
    config = model.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern) == ({"0": (2, 2, 2)}, {"0": 2.0})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert set(lotra_layers(loaded)) == {"0"}
    assert_different(model(X), base(X))
    assert_equal(loaded(X), model(X), 0)


def test_a_slice_is_read_in_linear_time():
    """A million characters would take an hour and more in quadratic time."""
    assert parse_slice(" : , -2:48") == (slice(None), slice(-2, 48))
    with limited("parse_slice"):
        for text in (" " * 10**6, "1" * 10**6, ":" * 10**6, f"{' ' * 10**6}x:"):
            with pytest.raises(ValueError, match="`slice` is written like"):
                parse_slice(text)
        assert parse_slice(f"{' ' * 10**6}1:{' ' * 10**6}") == (slice(1, None),)


# Values in the dtype that they are used in ---------------------------------------------------------------------------


@unsigned
@pytest.mark.parametrize(
    ("value", "stored", "used"), [(1e300, torch.float64, torch.float32), (1e5, torch.float32, torch.float16)]
)
@pytest.mark.parametrize("key", ["layers.0.lotra_U2", "head.weight"])
def test_values_that_the_dtype_does_not_hold(value, stored, used, key, tmp_path):
    base = Model()
    adapted(base, modules_to_save=["head"]).save_pretrained(tmp_path)

    def edit(weights):
        weights[f"base_model.model.{key}"] = torch.full_like(weights[f"base_model.model.{key}"], value, dtype=stored)

    edit_weights(tmp_path, edit)
    assert PeftModel.from_pretrained(copy.deepcopy(base).to(stored), tmp_path)(X.to(stored)).isfinite().all()
    refused_everywhere(base.to(used), tmp_path, f"in base_model.model.{key}, too large for the {used}")


@unsigned
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_factors_are_real_floating_point_numbers(saved, dtype):
    base, _, path = saved
    key = "base_model.model.layers.0.lotra_U2"
    edit_weights(path, lambda weights: weights.update({key: torch.ones(4, 2, dtype=dtype)}))
    refused_everywhere(base, path, f"has {key} of dtype {dtype}: factors are real floating-point tensors")
    model = adapted(base)
    weights = get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="factors are real floating-point tensors"):
        set_peft_model_state_dict(model, weights | {key: torch.ones(4, 2, dtype=dtype)})


# Files that are none -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "should hold dense tensors by name, but 'it' is a list"),
        ({"base_model.model.layers.0.lotra_U2": 3.0}, "but 'base_model.model.layers.0.lotra_U2' is a float"),
        ({1: torch.ones(2)}, "but 1 is a Tensor"),
        ({"a": torch.eye(2).to_sparse()}, "but 'a' is a Tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.15
def test_a_pickle_of_other_things_is_refused(content, message, saved):
    base, _, path = saved
    (path / WEIGHTS).unlink()
    torch.save(content, path / "adapter_model.bin")
    refused_everywhere(base, path, message)


def test_a_config_without_weights_is_refused(saved):
    base, _, path = saved
    (path / WEIGHTS).unlink()
    refused_everywhere(base, path, f"has {CONFIG} but no adapter file .* beside it: copy the whole directory")


# Names of adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained:UserWarning")
@pytest.mark.parametrize(
    "name",
    ["/tmp/x", "a/b", "a\\b", "..", "../x", "C:x", "a\0b", "a\nb", "a" * 101, "", "__base__", None, 3, 1.5],
)
def test_adapter_names_stay_below_the_directory(name):
    base = Model()
    before = remains(base)
    kind = ValueError if isinstance(name, str) else TypeError
    with pytest.raises(kind, match="`adapter_name`"):
        inject_adapter_in_model(LoTRAConfig(r=1), base, name)
    with pytest.raises(kind):  # PEFT itself looks for the name in a str
        get_peft_model(base, LoTRAConfig(r=1), adapter_name=name)
    assert_untouched(base, before)
    model = adapted(base)
    before = remains(model)
    with pytest.raises(kind):
        model.add_adapter(name, LoTRAConfig(r=1))
    assert list(model.peft_config) == ["default"]
    assert_untouched(model, before)


def test_a_long_name_with_spaces_is_saved_below_the_directory(tmp_path):
    name = "ein Name, größer als üblich ".ljust(100, "x")
    model = adapted(Model())
    model.add_adapter(name, LoTRAConfig(r=1))
    model.save_pretrained(tmp_path)
    assert (tmp_path / name / WEIGHTS).exists()


# Anything at all -----------------------------------------------------------------------------------------------------


VALUES = [None, True, -1, 0, 1, 7, 10**30, 0.5, 1e400, "", "x", "i o d", "(a+)+!", [], [1], ["x"], {}, {"x": 1}, "\0"]
VALUES += [[[]], {"x": {}}, {"": None}, "é" * 300, "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS"]


def mutated(draw, value):
    """The value with an entry of it changed, lost, doubled, under another name, or of another kind."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        return draw.choice([rest, rest | {f"{key}x": value[key]}, *[rest | {key: mutated(draw, value[key])}] * 4])
    if isinstance(value, list) and value and draw.random() < 0.7:
        k = draw.randrange(len(value))
        return value[:k] + draw.choice([[], [mutated(draw, value[k])], [value[k]] * 2]) + value[k + 1 :]
    return draw.choice(VALUES)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("signed", [True, False])
def test_mutations_of_the_config(saved, signed, at_once):
    """`peft_type` stays: PEFT reads it by itself, before this package is asked."""
    base, y, path = saved
    if not signed:
        edit_config(path, digest=...)
    config, draw, before, loaded = load_config(path), random.Random(2), remains(base), 0
    for _ in range(100):
        field = draw.choice([name for name in config if name != "peft_type"])
        rest = {name: value for name, value in config.items() if name != field}
        changed = draw.choice([rest, *[rest | {field: mutated(draw, config[field])}] * 5])
        (path / CONFIG).write_text(json.dumps(changed))
        model, error = copy.deepcopy(base), None
        try:
            model = PeftModel.from_pretrained(model, path)
        except (ValueError, TypeError) as raised:
            error = str(raised)
        if error is None:
            loaded += 1
            if signed:
                assert_equal(model(X), y, 0)
        else:
            fields = [word for word in re.findall(r"`(\w+)", error) if word in config or word == "digest"]
            assert CONFIG in error, (field, changed.get(field), error)
            assert fields, (field, changed.get(field), error)
            with pytest.raises((ValueError, TypeError)):
                PeftModel.from_pretrained(base, path)
            assert_untouched(base, before)
    assert 15 < loaded < 85


@pytest.mark.parametrize("part", ["header", "data"])
def test_flipped_bits_of_the_file(saved, part):
    base, y, path = saved
    file = path / WEIGHTS
    data, draw, before = file.read_bytes(), random.Random(3), remains(base)
    places = range(data_start(data)) if part == "header" else range(data_start(data), len(data))
    for _ in range(100):
        flipped = bytearray(data)
        flipped[draw.choice(places)] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(base), path)
        except ValueError:
            with pytest.raises(ValueError, match=WEIGHTS):
                PeftModel.from_pretrained(base, path)
            assert_untouched(base, before)
        else:
            assert_equal(model(X), y, 0)


def test_files_that_are_cut_off(saved):
    base, y, path = saved
    data, before = (path / WEIGHTS).read_bytes(), remains(base)
    for k in range(50):
        (path / WEIGHTS).write_bytes(data[: k * len(data) // 50])
        with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read .* it is corrupt or truncated"):
            PeftModel.from_pretrained(base, path)
    assert_untouched(base, before)
    (path / WEIGHTS).write_bytes(data)
    assert_equal(PeftModel.from_pretrained(base, path)(X), y, 0)


# Where transformers reads --------------------------------------------------------------------------------------------


@pytest.fixture
def gpt(tmp_path):
    """A model of transformers, and the directory and logits of an adapter that it has saved by itself."""
    base = TransformerKANForCausalLM(
        TransformerKANConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, kan_hidden_size=6, kan_degree=3
        )
    ).eval()
    model = copy.deepcopy(base)
    model.add_adapter(LoTRAConfig(r=2, init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return base, model(TOKENS).logits.detach(), tmp_path / "adapter"


@needs_mixin
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # PEFT calls what was renamed
def test_what_transformers_saves_has_a_digest(gpt):
    base, logits, path = gpt
    assert_different(base(TOKENS).logits, logits)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), path)(TOKENS).logits, logits, 0)
    edit_weights(path, lambda weights: [tensor.mul_(2) for tensor in weights.values()], signed=True)
    before = remains(base)
    with pytest.raises(ValueError, match="do not fit the `digest`"):
        PeftModel.from_pretrained(base, path)
    assert_untouched(base, before)


@needs_mixin
@needs_loader
def test_transformers_refuses_what_the_config_shows(gpt, at_once):
    base, _, path = gpt
    before = remains(base)
    for fields in ({"rank_pattern": 3}, {"modules_to_save": {"lm_head": 2}}, {"trainable_token_indices": [99]}):
        good = load_config(path)
        edit_config(path, **fields)
        with pytest.raises((ValueError, TypeError), match=f"`{next(iter(fields))}`"):
            base.load_adapter(path)
        (path / CONFIG).write_text(json.dumps(good))
    with pytest.raises(ValueError, match="cannot be the name of a directory"):
        base.load_adapter(path, adapter_name="a/b")
    assert_untouched(base, before)
