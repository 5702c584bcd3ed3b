"""What PEFT and code around it do with any tuner's layers: scaling, status, injection, pickling, meta devices."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from accelerate import cpu_offload
from conftest import assert_different, assert_equal
from kan_layers import KAN, ChebyKAN, FastKAN, TwoTensorKANLayer
from layer_table import lotra_layers, randomize
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from torch import nn

from peft_lotra import LoTRAConfig, LoTRALayer

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def adapted(base=None, **kwargs):
    model = get_peft_model(ChebyKAN([3, 6, 4]) if base is None else base, LoTRAConfig(r=2, **kwargs))
    randomize(model)
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def factors(adapter, *layers):
    names = "lotra_core", "lotra_U1", "lotra_U2", "lotra_U3"
    return {f"base_model.model.layers.{k}.{name}.{adapter}" for k in layers for name in names}


# Sizes of another model ----------------------------------------------------------------------------------------------


def test_ignore_mismatched_sizes_leaves_out_nothing(tmp_path):
    """A directory is loaded whole or not at all."""

    def base(width=4, outputs=2):
        net = nn.Sequential()
        net.add_module("kan", ChebyKAN([3, width]))
        net.add_module("head", nn.Linear(width, outputs))
        return net

    model = adapted(base(), modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    for ignore in (False, True):
        with pytest.raises(ValueError, match=r"head\.weight of shape \(2, 4\), expected \(5, 4\)"):
            PeftModel.from_pretrained(base(outputs=5), tmp_path, ignore_mismatched_sizes=ignore)
    weights = get_peft_model_state_dict(model)
    cut = {key: value[:1] if "lotra_U2" in key else value for key, value in weights.items()}
    with pytest.raises(ValueError, match="lotra_U2.* of shape"):
        set_peft_model_state_dict(model, cut, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="does not fit the shape"):
        PeftModel.from_pretrained(base(width=5), tmp_path, ignore_mismatched_sizes=True)


# Scaling -------------------------------------------------------------------------------------------------------------


def test_layers_are_scaled_and_unscaled():
    base = nn.Sequential(TwoTensorKANLayer(3, 2)).double()
    layouts = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    model = adapted(copy.deepcopy(base), alpha=0.5, coefficients=layouts)
    model.add_adapter("other", LoTRAConfig(r=1, alpha=3.0, coefficients=layouts))
    x = X.double()
    update = model(x) - base(x)
    assert_different(update, 2 * update)
    layers = [module for module in model.modules() if isinstance(module, LoTRALayer)]
    assert len(layers) == 2

    def scaled(factor, method, *args):
        for layer in layers:
            getattr(layer, method)(*args)
            assert layer.scaling["other"] == 3.0
        assert_equal(model(x) - base(x), factor * update)

    scaled(-2, "set_scale", "default", -2.0)
    scaled(-2, "set_scale", "unknown", 5.0)
    scaled(-6, "scale_layer", 3.0)
    scaled(-3, "unscale_layer", 2.0)
    scaled(1, "unscale_layer")
    scaled(0, "set_scale", "default", 0)
    scaled(1, "unscale_layer", None)
    model.delete_adapter("other")
    assert all(set(layer.alpha) == {"default"} for layer in layers)


def test_rescale_adapter_scale_takes_lora_alone_and_layers_scale_themselves():
    """PEFT asks for a LoraLayer (`peft/helpers.py:213` of 0.21.2)."""
    base = ChebyKAN([3, 2]).double()
    model, x = adapted(copy.deepcopy(base)), X.double()
    y = model(x)
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        with rescale_adapter_scale(model, 0.5):
            pass
    for layer in lotra_layers(model).values():
        layer.scale_layer(0.5)
    assert_different(model(x), y)
    assert_equal(model(x) - base(x), (y - base(x)) / 2)


# Status and what is trained ------------------------------------------------------------------------------------------


def test_status_of_several_adapters():
    model = adapted()
    model.add_adapter("last", LoTRAConfig(r=1, target_modules=["layers.1"]))
    first, last = model.get_layer_status()
    assert (first.name, first.available_adapters, first.requires_grad) == (
        "model.layers.0",
        ["default"],
        {"default": True},
    )
    assert last.available_adapters == ["default", "last"]
    assert last.requires_grad == {"default": True, "last": False}
    assert last.devices == {"default": ["cpu"], "last": ["cpu"]}
    model.base_model.set_adapter(["default", "last"])
    model.merge_adapter(["default"])
    status = model.get_model_status()
    assert (status.active_adapters, status.merged_adapters) == (["default", "last"], ["default"])
    assert status.requires_grad == {"default": True, "last": True}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_what_requires_gradients_follows_the_active_adapters(capsys):
    model = adapted()
    model.add_adapter("last", LoTRAConfig(r=1, target_modules=["layers.1"]))
    assert trainable(model) == factors("default", 0, 1)
    model.set_adapter("last")
    assert trainable(model) == factors("last", 1)
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model)
    model.base_model.set_adapter(["default", "last"])
    assert trainable(model) == factors("default", 0, 1) | factors("last", 1)
    model.set_requires_grad("default", False)
    assert trainable(model) == factors("last", 1)
    model.set_requires_grad(["default", "last"])
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert capsys.readouterr().out.startswith(f"trainable params: {count:,d} || all params: ")


@pytest.mark.parametrize("names", ["typo", ["default", "typo"]])
def test_the_tuner_too_takes_only_adapters_that_there_are(names):
    model = adapted()
    model.add_adapter("last", LoTRAConfig(r=1))
    before = trainable(model)
    with pytest.raises(ValueError, match=r"'typo' does not exist: the model has the adapters \['default', 'last'\]"):
        model.base_model.set_adapter(names)
    assert (model.active_adapters, trainable(model)) == (["default"], before)
    model.base_model.set_adapter(["last"])
    assert trainable(model) == factors("last", 0, 1)


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"layers.7": 1}}, {"alpha_pattern": {"layers.7": 1.0}}])
def test_patterns_that_match_nothing_warn(pattern):
    with pytest.warns(RuntimeWarning, match=r"keys did not match any targeted module .* ignored: \['layers.7'\]"):
        adapted(**pattern)


def test_input_dtype_casting_can_be_switched_off():
    model = adapted(ChebyKAN([3, 6, 2]).bfloat16())
    y = model(X.bfloat16())
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in lotra_layers(model).values())
        assert_equal(model(X.bfloat16()), y, 0)
    assert all(layer.cast_input_dtype_enabled for layer in lotra_layers(model).values())


# State dicts and injection -------------------------------------------------------------------------------------------


def test_state_dict_of_the_base():
    base = KAN([3, 5, 2])
    model = adapted(copy.deepcopy(base))
    held = get_base_model_state_dict(model)
    assert held.keys() == base.state_dict().keys()
    fresh = KAN([3, 5, 2])
    assert_different(fresh(X), base(X))
    fresh.load_state_dict(held)
    assert_equal(fresh(X), base(X), 0)


def bare_state_dict(model):
    return {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injection_by_a_state_dict(low_cpu_mem_usage):
    base = ChebyKAN([3, 6, 2])
    model = adapted(copy.deepcopy(base))
    weights = bare_state_dict(model)
    injected = inject_adapter_in_model(
        LoTRAConfig(r=2), copy.deepcopy(base), state_dict=weights, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert any(p.is_meta for p in injected.parameters()) == low_cpu_mem_usage
    set_peft_model_state_dict(injected, weights, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_different(model(X), base(X))
    assert_equal(injected(X), model(X), 0)


def test_injection_by_a_state_dict_of_fewer_layers_warns():
    base = ChebyKAN([3, 6, 2])
    model = adapted(copy.deepcopy(base), target_modules=["layers.1"])
    with pytest.warns() as caught:
        injected = inject_adapter_in_model(LoTRAConfig(r=2), copy.deepcopy(base), state_dict=bare_state_dict(model))
    assert any("contained these additional target modules: ['layers.0']" in str(w.message) for w in caught)
    set_peft_model_state_dict(injected, bare_state_dict(model))
    assert_equal(injected(X), model(X), 0)


def test_meta_devices(tmp_path):
    base = ChebyKAN([3, 6, 2])
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=2))
        later = ChebyKAN([3, 6, 2])
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert_equal(empty(X), model(X), 0)
    # The base comes after the adapter, as when a large model is loaded in parts.
    loaded = PeftModel.from_pretrained(later, tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for name, p in loaded.named_parameters() if "lotra_" in name)
    state = {key: value for key, value in model.state_dict().items() if "lotra_" not in key}
    loaded.load_state_dict(state, strict=False, assign=True)
    assert_equal(loaded(X), model(X), 0)


@pytest.mark.parametrize("kan", [ChebyKAN, KAN, FastKAN])
@pytest.mark.parametrize("adapter_comes", ["after", "before"])
def test_a_base_that_accelerate_offloads(kan, adapter_comes, tmp_path):
    base = kan([3, 6, 2])
    expected = adapted(copy.deepcopy(base))
    expected.save_pretrained(tmp_path)
    if adapter_comes == "after":
        model = PeftModel.from_pretrained(cpu_offload(copy.deepcopy(base), execution_device="cpu"), tmp_path)
    else:
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        cpu_offload(model.get_base_model(), execution_device="cpu")
    offloaded = {name for name, p in model.named_parameters() if p.is_meta}
    assert any("lotra_" not in name for name in offloaded)
    assert_different(expected(X), base(X))
    assert_equal(model(X), expected(X), 0)
    with model.disable_adapter():
        assert_equal(model(X), base(X), 0)
    with pytest.raises(RuntimeError):
        model(X[:, :2])
    assert {name for name, p in model.named_parameters() if p.is_meta} == offloaded
    assert_equal(model(X), expected(X), 0)
    model.add_weighted_adapter(["default"], [1.0], "same", "cat")
    model.eval().set_adapter("same")
    assert_equal(model(X), expected(X))
    y = model(X, adapter_names=["default", "__base__", "same", "default"])
    assert_equal(y[[0, 2, 3]], expected(X)[[0, 2, 3]])
    assert_equal(y[1:2], base(X[1:2]))


@pytest.mark.parametrize("kan", [ChebyKAN, KAN])
def test_merging_into_an_offloaded_base(kan, tmp_path):
    base = kan([3, 6, 2])
    expected = adapted(copy.deepcopy(base))
    expected.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(cpu_offload(base, execution_device="cpu"), tmp_path)
    assert_equal(model.merge_and_unload()(X), expected(X))


# Pickling ------------------------------------------------------------------------------------------------------------


def through_torch_save(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_torch_save, lambda x: pickle.loads(pickle.dumps(x))])
def test_models_and_configs_are_copied_and_saved_whole(copied):
    model = adapted()
    twin = copied(model)
    assert_equal(twin(X), model(X), 0)
    with twin.disable_adapter(), model.disable_adapter():
        assert_equal(twin(X), model(X), 0)
    lotra_layers(twin)["layers.0"].lotra_core["default"].data += 1
    assert_different(twin(X), model(X))
    assert copied(model.peft_config["default"]) == model.peft_config["default"]


@pytest.mark.slow
def test_a_spawned_process_takes_an_adapted_model(tmp_path):
    model = adapted(KAN([3, 5, 2]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        config, y = pool.apply(output_of, (pickle.dumps(model), X))
    assert config == model.peft_config["default"]
    assert_equal(y, model(X).detach(), 0)


def output_of(pickled, x):
    model = pickle.loads(pickled)
    return model.peft_config["default"], model(x).detach()
