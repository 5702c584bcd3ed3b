"""`bias`: which biases are trained with an adapter, and what becomes of them."""

import copy
import json
import re
from collections import OrderedDict

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import ChebyKANLayer, FastKANLayer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer, extract_adapter, fit_gauss_newton, hotswap_adapter
from peft_lotra.adapters.lora import convert_to_lora

X = torch.linspace(-0.9, 0.9, 24).reshape(6, 4)
KAN = ["kan.layernorm.weight", "kan.layernorm.bias", "kan.base_linear.bias"]
OTHERS = ["norm.bias", "first.bias", "head.bias"]


def make():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "kan": FastKANLayer(4, 3), "head": nn.Linear(3, 2)}
    return nn.Sequential(OrderedDict(layers))


def adapt(base=None, **kwargs):
    return get_peft_model(base or make(), LoTRAConfig(**{"r": 2, "init_weights": False} | kwargs))


def trained(model):
    """The base's own parameters that are trained, by their plain names."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".lotra_" not in name]
    return {name.removeprefix("base_model.model.").replace("base_layer.", "") for name in names}


def moved(model):
    """The model, everything that is trained of it moved."""
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return model


CASES = {
    "none": ({}, []),
    "lotra_only": ({"bias": "lotra_only"}, KAN),
    "all": ({"bias": "all"}, KAN + OTHERS),
    "lotra_only, all-linear": (
        {"bias": "lotra_only", "target_modules": "all-linear"},
        [*KAN, "first.bias", "head.bias"],
    ),
    "all, all-linear": ({"bias": "all", "target_modules": "all-linear"}, KAN + OTHERS),
    "all, with a copy": ({"bias": "all", "modules_to_save": ["head"]}, [*KAN, *OTHERS[:2]]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_saved_and_loaded(name, tmp_path):
    kwargs, expected = CASES[name]
    base = make()
    model = adapt(copy.deepcopy(base), **kwargs)
    copies = {"head.modules_to_save.default.weight", "head.modules_to_save.default.bias"}
    assert trained(model) == set(expected) | (copies if "modules_to_save" in kwargs else set())
    y = moved(model)(X).detach()
    optimizer = create_lotra_optimizer(model, torch.optim.SGD, lr=1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        p.requires_grad for p in model.parameters()
    )
    assert_different(y, base(X))
    model.save_pretrained(tmp_path)
    saved = {key for key in load_file(tmp_path / "adapter_model.safetensors") if ".lotra_" not in key}
    plain = {key.removeprefix("base_model.model.").replace("base_layer.", "") for key in saved}
    assert plain == set(expected) | ({"head.weight", "head.bias"} if "modules_to_save" in kwargs else set())
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_equal(loaded(X), y, 0)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert trained(loaded) == trained(model)
    merged = loaded.merge_and_unload()
    assert_equal(merged(X), y)
    assert not any(p.requires_grad for p in merged.parameters()) or "modules_to_save" in kwargs


def test_as_with_lora():
    """All biases of LoRA's are ours too; ours are also those of normalisations in adapted layers."""
    for bias, own in {"all": "all", "lora_only": "lotra_only"}.items():
        lora = get_peft_model(make(), LoraConfig(target_modules=["first", "head"], bias=bias))
        names = {name for name in trained(lora) if "lora_" not in name}
        given = {f"{name}.weight": {"layout": "o (i d)", "sizes": {"d": 1}} for name in ("first", "head")}
        model = adapt(target_modules=["first", "head"], coefficients=given, bias=own)
        assert names == trained(model)


def test_biases_belong_to_the_model():
    base = make()
    model = moved(adapt(copy.deepcopy(base), bias="all"))
    y = model(X)
    with pytest.warns(UserWarning, match="bias configured to be 'all'"), model.disable_adapter():
        assert_different(model(X), base(X))
    assert_equal(model(X), y, 0)
    model.add_adapter("other", LoTRAConfig(r=1))
    assert trained(model) == {*KAN, *OTHERS}
    model.set_adapter("other")
    assert not trained(model)
    model.set_adapter("default")
    assert trained(model) == {*KAN, *OTHERS}
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not trained(model)
    unloaded = model.unload()
    assert_different(unloaded(X), base(X))
    assert_equal(unloaded.head.bias, model.get_base_model().head.bias, 0)


def test_deleting_the_adapter_freezes_its_biases():
    model = adapt(bias="all")
    model.delete_adapter("default")
    assert not any(p.requires_grad for p in model.parameters())


def test_one_adapter_of_a_model_may_have_biases(tmp_path):
    model = adapt(bias="lotra_only")
    y = moved(model)(X)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", LoTRAConfig(r=1, bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert_equal(model(X), y, 0)


def test_the_file_does_not_depend_on_other_adapters(tmp_path):
    base = make()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1, target_modules="all-linear"), adapter_name="whole")
    model.add_adapter("part", LoTRAConfig(r=2, init_weights=False, bias="all"))
    model.set_adapter("part")
    y = moved(model)(X).detach()
    model.save_pretrained(tmp_path)
    alone = adapt(copy.deepcopy(base), bias="all")
    assert load_file(tmp_path / "part" / "adapter_model.safetensors").keys() == set(get_peft_model_state_dict(alone))
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "part")(X), y, 0)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "whole", adapter_name="whole")
    again.load_adapter(tmp_path / "part", "part")
    again.set_adapter("part")
    assert_equal(again(X), y, 0)


def change(path, edit, digest=True):
    """Edit the tensors and the config of a saved adapter."""
    weights, config = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    edit(weights, config)
    if not digest:
        del config["digest"]
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))


BIAS = "base_model.model.kan.base_layer.base_linear.bias"


@pytest.mark.parametrize(
    ("edit", "digest", "message"),
    [
        (lambda w, c: w[BIAS].add_(1), True, "do not fit the `digest`"),
        (lambda w, c: c.update(bias="all"), True, "do not fit the `digest`"),
        (lambda w, c: w.pop(BIAS), False, f"it lacks ['{BIAS}']"),
        (
            lambda w, c: w.update({"base_model.model.head.bias": torch.ones(2)}),
            False,
            "only if `modules_to_save` or `bias` selects them",
        ),
        (lambda w, c: c.update(bias="none"), False, f"'{BIAS}'"),
        (lambda w, c: w[BIAS].fill_(float("nan")), False, f"NaN or infinity in {BIAS}"),
        (lambda w, c: w.update({BIAS: torch.ones(4)}), False, f"{BIAS} of shape (4,), expected (3,)"),
        (lambda w, c: c.update(bias="lora_only"), False, "`bias` should be one of ('none', 'all', 'lotra_only')"),
    ],
)
@pytest.mark.filterwarnings("ignore:adapter_config.json in .* has no `digest`")
def test_files_that_do_not_fit_are_refused(edit, digest, message, tmp_path):
    base = make()
    model = moved(adapt(copy.deepcopy(base), bias="lotra_only"))
    model.save_pretrained(tmp_path)
    change(tmp_path, edit, digest)
    y = base(X)
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == [name for name, _ in make().named_modules()]
    assert_equal(base(X), y, 0)


def test_adapters_without_bias_keep_their_digest():
    config = adapt().peft_config["default"]
    assert "bias" not in config._meaning()
    assert adapt(bias="all").peft_config["default"]._meaning()["bias"] == "all"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoTRAConfig(bias="lora_only"), "`bias` should be one of ('none', 'all', 'lotra_only') but the value"),
        (lambda: LoTRAConfig(bias=None), "but the value passed is None"),
        (
            lambda: adapt(bias="all").base_model.add_weighted_adapter(["default"], [1.0], "sum", "cat"),
            "`adapters` ['default'] have trained biases (`bias`), and only one adapter of a model may have them",
        ),
        (
            lambda: convert_to_lora(adapt(bias="all")),
            "'default' has `bias`='all': LoRA saves biases under other names",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_bias_of_which_there_is_none_is_warned_about():
    with pytest.warns(UserWarning, match="`bias`='all' has no effect"):
        get_peft_model(nn.Sequential(ChebyKANLayer(3, 2, 2)), LoTRAConfig(r=1, bias="all"))


def test_hotswap(tmp_path):
    base = make()
    new = moved(adapt(copy.deepcopy(base), bias="lotra_only", r=1))
    new.save_pretrained(tmp_path)
    slot = adapt(copy.deepcopy(base), bias="lotra_only")
    hotswap_adapter(slot, tmp_path)
    assert_equal(slot(X), new(X))
    plain = adapt(copy.deepcopy(base))
    y = plain(X)
    with pytest.raises(ValueError, match="only adapters with the same `bias` can be swapped"):
        hotswap_adapter(plain, tmp_path)
    assert_equal(plain(X), y, 0)


def test_a_fine_tune_with_biases_is_extracted():
    base = make()
    full = copy.deepcopy(base)
    for name, p in full.named_parameters():
        if name == "kan.spline_linear.weight" or name in KAN + OTHERS:
            p.data += 0.1 * torch.randn_like(p)
    with pytest.raises(ValueError, match=r"differ also in \['first.bias', 'head.bias', 'norm.bias'\].*`bias`"):
        extract_adapter(
            copy.deepcopy(base), full, LoTRAConfig(r=8, rank_pattern={"kan": (4, 3, 8)}, bias="lotra_only")
        )
    model, _ = extract_adapter(copy.deepcopy(base), full, LoTRAConfig(rank_pattern={"kan": (4, 3, 8)}, bias="all"))
    assert_different(full(X), base(X))
    assert_equal(model(X), full(X))


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # few points
def test_gauss_newton_fits_biases_too():
    model = adapt(bias="all", init_weights=True)
    before = model.base_model.model.head.bias.clone()
    fit_gauss_newton(model, lambda net, x: net(x) - x[:, :2].sin(), X, iterations=3, progressbar=False)
    assert_different(model.base_model.model.head.bias, before)
