"""PEFT's habits on an adapted KAN: save, load, switch, disable, delete, and every damaged file."""

import copy
import json
import math
import re
import shutil
from collections import OrderedDict

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import ChebyKAN, ChebyKANLayer, FastKAN
from layer_table import LAYERS, MODELS, config, lotra_layers, make, randomize
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.layers.lotra import LoTRALayer

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A base, and the directory and output of an adapter saved for it."""
    torch.manual_seed(1)
    base, x = ChebyKAN([3, 6, 2]), torch.linspace(-1, 1, 12).reshape(4, 3)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, x, model(x).detach(), tmp_path / "adapter"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip_is_exact(name, dtype, low_cpu_mem_usage, tmp_path):
    if dtype not in LAYERS[name].dtypes:
        pytest.skip("the library itself does not run in this dtype")
    torch.manual_seed(1)
    base, x = make(name, dtype)
    model = get_peft_model(copy.deepcopy(base), config(name))
    randomize(model)
    y = model(x).detach()
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    fresh = get_peft_model(copy.deepcopy(base), config(name, init_weights=False))
    assert_different(fresh(x), y)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal(loaded(x), y, 0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {key for key, p in trainable.named_parameters() if p.requires_grad} == {
        key for key, _ in trainable.named_parameters() if ".lotra_" in key
    }


@pytest.mark.parametrize("name", MODELS)
def test_adapter_file_size(name, tmp_path):
    base, _ = make(name, torch.float32)
    model = get_peft_model(base, config(name))
    model.save_pretrained(tmp_path)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable > 0
    assert (tmp_path / WEIGHTS).stat().st_size <= 4 * trainable + 8192
    assert sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values()) == trainable


def test_a_saved_adapter_needs_no_registration(tmp_path, monkeypatch):
    from peft_lotra.coefficients import registry

    base, x = make("fast-kan", torch.float32)
    model = get_peft_model(copy.deepcopy(base), config("fast-kan"))
    randomize(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", {})
    with pytest.raises(ValueError, match="no KAN layer found"):
        get_peft_model(copy.deepcopy(base), LoTRAConfig())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_different(loaded(x), base(x))
    assert_equal(loaded(x), model(x), 0)


def test_several_tensors_on_one_module_are_saved_and_loaded(tmp_path):
    from kan_layers import TwoTensorKANLayer

    base, x = nn.Sequential(TwoTensorKANLayer(3, 2)), torch.randn(4, 3)
    layouts = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=layouts, init_weights=False))
    assert_different(model(x), base(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal(loaded(x), model(x), 0)
    loaded.add_adapter("other", LoTRAConfig(r=1, coefficients=layouts))
    assert list(loaded.base_model.model[0].base_layer.r) == ["default", "other"]
    loaded.delete_adapter("other")
    assert_equal(loaded(x), model(x), 0)


def test_load_adapter_beside_another(saved):
    base, x, y, path = saved
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1))
    model.load_adapter(path, "loaded")
    assert_equal(model(x), base(x), 0)
    model.set_adapter("loaded")
    assert_different(model(x), base(x))
    assert_equal(model(x), y, 0)
    with model.disable_adapter():
        assert_equal(model(x), base(x), 0)
    assert_equal(model(x), y, 0)
    model.set_adapter("default")
    assert_equal(model(x), base(x), 0)
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["loaded"]
    assert_equal(model(x), y, 0)
    assert all(list(layer.lotra_core) == ["loaded"] for layer in lotra_layers(model).values())
    assert all(set(layer.r) == set(layer.scaling) == {"loaded"} for layer in lotra_layers(model).values())


def test_adapters_on_different_layers(saved):
    base, x, y, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    model.add_adapter("last", LoTRAConfig(r=1, target_modules=["layers.1"], init_weights=False))
    assert_equal(model(x), y, 0)
    model.set_adapter("last")
    assert_different(model(x), y)
    expected = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1, target_modules=["layers.1"]), adapter_name="last")
    lotra_layers(expected)["layers.1"].load_state_dict(lotra_layers(model)["layers.1"].state_dict(), strict=False)
    assert_equal(model(x), expected(x), 0)


@pytest.mark.parametrize("only", ["layers.0", "layers.1"])
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_after_a_deletion_all_layers_have_the_same_active_adapter(saved, only):
    """Also those that do not have it. PEFT's layers choose among their own adapters."""
    base, x, _, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    model.add_adapter("other", LoTRAConfig(r=1, target_modules=[only], init_weights=False))
    with torch.no_grad():
        model.set_adapter("other")
        expected = model(x)
        assert_different(expected, base(x))
        model.set_adapter("default")
        model.delete_adapter("default")
        assert model.active_adapters == ["other"]
        assert {tuple(layer.active_adapters) for layer in lotra_layers(model).values()} == {("other",)}
        assert_equal(model(x), expected, 0)


def test_layers_that_are_first_adapted_while_adapters_are_disabled(saved):
    base, x, *_ = saved
    first, second = (LoTRAConfig(r=1, target_modules=[f"layers.{k}"], init_weights=False) for k in (0, 1))
    model = get_peft_model(copy.deepcopy(base), first)
    model.base_model.disable_adapter_layers()
    model.add_adapter("second", second)
    model.set_adapter("second")
    assert_equal(model(x), base(x), 0)
    model.base_model.enable_adapter_layers()
    assert_different(model(x), base(x))


def test_switching_and_adding_while_merged(saved):
    base, x, y, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    model.add_adapter("other", LoTRAConfig(r=1))
    model.merge_adapter()
    assert_equal(model(x), y)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert_equal(model(x), base(x), 0)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert_equal(model(x), y, 0)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    base = nn.Sequential(OrderedDict(kan=ChebyKANLayer(3, 4, 3), head=nn.Linear(4, 2)))
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1, modules_to_save=["head"]))
    x = torch.randn(5, 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(x).square().sum().backward()
    optimizer.step()
    assert_different(model(x), base(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal(loaded(x), model(x), 0)
    assert_equal(loaded.merge_and_unload()(x), model(x))


@pytest.mark.parametrize("name", ["half", "v1.0", "keys"])
def test_adapter_names_that_torch_does_not_take(saved, name):
    base, x, y, path = saved
    with pytest.raises(ValueError, match=f"`adapter_name` {name!r} is a name that torch's containers"):
        get_peft_model(base, LoTRAConfig(r=1), adapter_name=name)
    model = PeftModel.from_pretrained(base, path)
    with pytest.raises(ValueError, match="choose another"):
        model.add_adapter(name, LoTRAConfig(r=1))
    assert list(model.peft_config) == ["default"]
    assert_equal(model(x), y, 0)


@pytest.mark.parametrize("entry", ["1", "U2", "core"])
def test_modules_to_save_that_peft_would_confuse_with_the_adapter(entry):
    base = nn.Sequential(ChebyKANLayer(3, 4, 3), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="the adapter's own lotra_.* has this one too; give a longer part"):
        get_peft_model(base, LoTRAConfig(r=1, modules_to_save=[entry]))
    assert type(base[0]) is ChebyKANLayer


def test_modules_to_save_inside_a_kan_layer():
    base = FastKAN([3, 4, 2])
    with pytest.raises(ValueError, match="'base_linear' means layers.0.base_linear, inside an adapted layer"):
        get_peft_model(base, LoTRAConfig(r=1, modules_to_save=["base_linear"]))
    assert not lotra_layers(base)


def test_state_dict_functions(saved):
    base, x, y, path = saved
    weights = load_file(path / WEIGHTS)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    assert get_peft_model_state_dict(model).keys() == weights.keys()
    set_peft_model_state_dict(model, weights)
    assert_equal(model(x), y, 0)
    injected = inject_adapter_in_model(LoTRAConfig(r=2), copy.deepcopy(base))
    set_peft_model_state_dict(injected, weights)
    assert_equal(injected(x), y, 0)


def test_names_of_no_adapter_are_refused_and_those_there_are_listed(saved):
    base, x, y, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    model.add_adapter("other", LoTRAConfig(r=1))
    message = re.escape("`adapter_name` 'typo' does not exist: the model has the adapters ['default', 'other']")
    for call in (
        lambda: model.merge_adapter(["default", "typo"]),
        lambda: model.merge_and_unload(adapter_names=["typo"]),
        lambda: get_peft_model_state_dict(model, adapter_name="typo"),
        lambda: set_peft_model_state_dict(model, load_file(path / WEIGHTS), adapter_name="typo"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert not any(layer.merged for layer in lotra_layers(model).values())
        assert_equal(model(x), y, 0)
    for names in ("default", 3):
        with pytest.raises(TypeError, match=f"adapter_names should be a list of strings, got {names!r}"):
            model.merge_adapter(names)
    injected = inject_adapter_in_model(LoTRAConfig(r=2), copy.deepcopy(base))
    with pytest.raises(ValueError, match=re.escape("the model has the adapters ['default']")):
        get_peft_model_state_dict(injected, adapter_name="typo")
    model.merge_adapter(["other", "default"])
    assert_different(model(x), base(x))
    assert_equal(model(x), y)


def test_auto_classes_and_status(saved):
    base, x, y, path = saved
    assert type(PeftConfig.from_pretrained(path)) is LoTRAConfig
    assert AutoPeftModel is not None
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    status = model.get_model_status()
    assert status.adapter_model_type == "LoTRAModel"
    assert status.peft_types == {"default": "LOTRA"}
    assert status.num_adapter_layers == 2
    assert {layer.module_type for layer in model.get_layer_status()} == {"lotra.LoTRALayer"}
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 0
    assert total > sum(parameter.numel() for parameter in base.parameters())


# Broken adapters -----------------------------------------------------------------------------------------------------


def damage(path, kind):
    file = path / WEIGHTS
    data, weights = file.read_bytes(), load_file(file)
    key = next(key for key in weights if "lotra_U2" in key)
    if kind == "truncated":
        file.write_bytes(data[:-40])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "not safetensors":
        file.write_bytes(b"{}" * 100)
    elif kind == "NaN":
        weights[key][0, 0] = math.nan
        save_file(weights, file)
    elif kind == "other ranks":
        weights[key] = weights[key][:, :1].contiguous()
        save_file(weights, file)
    elif kind == "a tensor lacks":
        del weights[key]
        save_file(weights, file)
    elif kind == "a tensor too much":
        weights[key.replace("layers.0", "layers.7")] = weights[key].clone()
        save_file(weights, file)


DAMAGES = {
    "truncated": "cannot be read .* it is corrupt or truncated",
    "empty": "it is corrupt or truncated",
    "not safetensors": "it is corrupt or truncated",
    "NaN": "has NaN or infinity in base_model.model.layers.0.lotra_U2: the adapter is broken",
    "other ranks": r"lotra_U2 of shape \(6, 1\), expected \(6, 2\): an adapter of other ranks",
    "a tensor lacks": r"it lacks \['base_model.model.layers.0.lotra_U2'\]",
    "a tensor too much": r"and has \['base_model.model.layers.7.lotra_U2'\] in addition",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_before_the_base_is_touched(saved, kind):
    base, x, y, path = saved
    good = shutil.copytree(path, path.parent / "good")
    damage(path, kind)
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match=DAMAGES[kind]):
        PeftModel.from_pretrained(base, path)
    assert dict(base.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = PeftModel.from_pretrained(base, good)
    with pytest.raises(ValueError, match=DAMAGES[kind]):
        model.load_adapter(path, "second")
    assert list(model.peft_config) == ["default"]
    assert_equal(model(x), y, 0)


def test_a_file_that_ends_anywhere_is_refused(saved):
    """What a process leaves that is killed while it saves: PEFT writes under the final name."""
    base, _, _, path = saved
    file = path / WEIGHTS
    data = file.read_bytes()
    PeftModel.from_pretrained(copy.deepcopy(base), path)
    for length in [*range(0, len(data), 13), *range(len(data) - 9, len(data))]:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="it is corrupt or truncated"):
            PeftModel.from_pretrained(base, path)
    file.unlink()
    with pytest.raises(ValueError, match="has adapter_config.json but no adapter file"):
        PeftModel.from_pretrained(copy.deepcopy(base), path)


def test_a_config_that_ends_anywhere_is_refused(saved):
    base, _, _, path = saved
    file = path / "adapter_config.json"
    text = file.read_text().rstrip()
    for length in range(0, len(text), 31):
        file.write_text(text[:length])
        with pytest.raises(ValueError, match="Expecting|Unterminated|Invalid|delimiter"):
            PeftModel.from_pretrained(base, path)


def test_a_damaged_pickle_file_is_refused(saved):
    base, x, y, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    shutil.rmtree(path)
    model.save_pretrained(path, safe_serialization=False)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), path)(x), y, 0)
    file = path / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="it is corrupt or truncated"):
        PeftModel.from_pretrained(base, path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: ChebyKAN([3, 7, 2]),
            "KAN layer 'layers.0': layout 'i o d' with sizes {'d': 4, 'i': 3, 'o': 6} does not",
        ),
        (lambda: ChebyKAN([3, 6, 2], degree=4), "does not fit the shape (3, 6, 5)"),
        (lambda: ChebyKAN([3, 6]), "`coefficients` names ['layers.1.cheby_coeffs'], which match no parameter"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "Is the adapter meant for another base model?"),
    ],
)
def test_an_adapter_for_another_base_is_refused(saved, other, message):
    _, _, _, path = saved
    model = other()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(model, path)
    assert dict(model.named_modules()) == modules


def test_a_wrong_state_dict_changes_nothing(saved):
    base, x, y, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    weights = load_file(path / WEIGHTS)
    key = next(iter(weights))
    for broken in (
        weights | {key: weights[key] * math.nan},
        weights | {key: weights[key][:1]},
        {k: v for k, v in weights.items() if k != key},
        weights | {"base_model.model.layers.7.lotra_core": weights[key]},
    ):
        broken = {k: v + 1 if k != key else v for k, v in broken.items()}
        with pytest.raises(ValueError, match="the state dict for the adapter 'default'"):
            set_peft_model_state_dict(model, broken)
        assert_equal(model(x), y, 0)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_nan_before_any_layer_is_merged(saved, merge):
    base, x, _, path = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), path)
    lotra_layers(model)["layers.1"].lotra_U1["default"].data[0, 0] = math.nan
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        getattr(model, merge)(safe_merge=True)
    assert not any(layer.merged for layer in lotra_layers(model).values())
    with model.disable_adapter():
        assert_equal(model(x), base(x), 0)
    assert_equal(model.unload()(x), base(x), 0)


def test_a_config_of_a_newer_version_warns(saved):
    base, x, y, path = saved
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"field_of_the_future": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments \\['field_of_the_future'\\]"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), path)
    assert_equal(loaded(x), y, 0)


def test_a_full_memory_is_not_blamed_on_the_file(saved, monkeypatch):
    base, _, _, path = saved

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LoTRALayer, "update_layer", full)
    with pytest.raises(torch.OutOfMemoryError, match="^no room$"):
        PeftModel.from_pretrained(base, path)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("around", [False, True])
def test_only_a_second_adapter_of_the_same_name_is_warned_of(around):
    """PEFT warns of every second one ("Already found a `peft_config`"), and its advice fits none of the two cases."""
    base, _ = make("ChebyKAN")
    model = get_peft_model(base, config("ChebyKAN"))
    given = model if around else base
    get_peft_model(given, config("ChebyKAN"), adapter_name="other")
    with pytest.warns(UserWarning, match=r"`adapter_name` 'default'.*replaces the one.*another name"):
        get_peft_model(given, config("ChebyKAN"))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize(
    ("earlier", "later", "left"),
    [
        ({}, {"target_modules": ["layers.0"]}, r"in \['layers.1.cheby_coeffs'\]"),
        ({"modules_to_save": ["head"]}, {}, r"in \['head'\]"),
        (LoraConfig(target_modules=["head"], init_lora_weights=False), {}, "LoraConfig"),
    ],
)
def test_an_adapter_of_the_same_name_that_would_stay_active_is_refused(earlier, later, left):
    torch.manual_seed(0)
    kan = nn.Sequential(ChebyKANLayer(3, 4, 3), ChebyKANLayer(4, 4, 3))
    base = nn.Sequential(OrderedDict(layers=kan, head=nn.Linear(4, 2)))
    config = earlier if isinstance(earlier, LoraConfig) else LoTRAConfig(r=2, init_weights=False, **earlier)
    model = get_peft_model(base, config)
    x = torch.randn(5, 3)
    y, before = model(x), dict(model.peft_config)
    with pytest.raises(ValueError, match=rf"`adapter_name` 'default': .* {left}.*another name.*`unload\(\)`"):
        get_peft_model(base, LoTRAConfig(r=2, init_weights=False, **later))
    assert_equal(model(x), y, 0)
    assert model.peft_config == before
    get_peft_model(base, LoTRAConfig(r=2, init_weights=False, **later), adapter_name="other")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_refused_adapter_leaves_the_configs_of_the_model():
    base, _ = make("ChebyKAN")
    before = dict(get_peft_model(base, config("ChebyKAN")).peft_config)
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, LoTRAConfig(r=2, target_modules=["nowhere"]), adapter_name="other")
    assert base.peft_config == before


def test_an_adapter_after_another_has_been_taken_off():
    base, _ = make("ChebyKAN")
    for _ in range(2):
        base = get_peft_model(base, config("ChebyKAN")).merge_and_unload()  # warnings are errors here
    get_peft_model(base, config("ChebyKAN")).unload()
    get_peft_model(base, config("ChebyKAN"))
