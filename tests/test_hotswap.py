"""Adapters swapped in place, under torch.compile without compiling again."""

import copy
import json
import math
import re
from collections import OrderedDict

import einops
import pytest
import torch
from accelerate import cpu_offload
from conftest import FULLGRAPH, assert_different, assert_equal
from kan_layers import ChebyKAN, ChebyKANLayer, TwoTensorKANLayer
from layer_table import MODELS, config, lotra_layers, make, randomize
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rounding import rounding_of
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.adapters.hotswap import hotswap_adapter_from_state_dict

WEIGHTS = "adapter_model.safetensors"
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def saved(base, path, config, seed=5):
    """The output of a random adapter at X, which is saved."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config)
    randomize(model)
    for name, p in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(p)
    model.save_pretrained(path)
    return model


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture
def cheby(tmp_path):
    """A base, a model with an adapter of ranks (2, 3, 2), and a directory for others."""
    torch.manual_seed(1)
    base = ChebyKAN([3, 6, 4]).double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(2, 3, 2), alpha=0.5))
    randomize(model)
    return base, model, tmp_path / "new"


# The adapters of other layers are as this one, or have no scale; their own passes are what is traced besides.
QUICK = ("efficient-kan",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MODELS]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_not_compiled_again(name, tmp_path):
    torch.manual_seed(1)
    base, x = make(name)
    slot = get_peft_model(copy.deepcopy(base), config(name, alpha=0.5))
    randomize(slot)
    new = {
        "same ranks": saved(base, tmp_path / "same ranks", config(name, alpha=0.5), 2),
        "smaller": saved(base, tmp_path / "smaller", config(name, r=(1, 2, 2), alpha=-2.0), 3),
        "smallest": saved(base, tmp_path / "smallest", config(name, r=1, alpha=3.0), 4),
        "again": saved(base, tmp_path / "again", config(name), 5),
    }
    torch._dynamo.reset()
    compiled = torch.compile(slot, fullgraph=FULLGRAPH, backend="eager")
    with torch.no_grad():
        last = compiled(x)
        assert_equal(last, slot(x))
    unknown = type("Unknown", (torch.Tensor,), {})  # a compiled call of einops would be compiled again for a new type
    einops.rearrange(torch.ones(2, 2).as_subclass(unknown), "a b -> b a")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        memory = {key: p.data_ptr() for key, p in slot.named_parameters()}
        for key, other in new.items():
            hotswap_adapter(compiled, tmp_path / key)
            y = compiled(x)
            assert_different(y, last)
            assert_different(y, base(x))
            last = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / key)(x)
            assert_equal(y, last)
            assert_equal(other(x), last)
    assert {key: p.data_ptr() for key, p in slot.named_parameters()} == memory


@pytest.mark.skipif(not FULLGRAPH, reason="the layers run between graphs, whose guards hold no scaling")
def test_recompilation_would_be_noticed(cheby):
    """By what the test above relies on: another scaling under `error_on_recompile`."""
    _, model, _ = cheby
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=FULLGRAPH, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(X)
        for layer in lotra_layers(model).values():
            layer.scaling["default"] = 7.0
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(X)


def test_what_stays_and_what_is_saved_afterwards(cheby, tmp_path):
    base, model, path = cheby
    new = saved(base, path, LoTRAConfig(r=(1, 2, 2), alpha=3.0, alpha_pattern={"layers.1": -1.0}))
    before = {key: (p.requires_grad, p.dtype, p.device, p.shape) for key, p in model.named_parameters()}
    own = copy.deepcopy(model.peft_config["default"].to_dict())
    y = model(X)
    hotswap_adapter(model, path)
    assert_different(model(X), y)
    assert_equal(model(X), new(X))
    assert {key: (p.requires_grad, p.dtype, p.device, p.shape) for key, p in model.named_parameters()} == before
    assert any(p.requires_grad for p in model.parameters())
    assert model.peft_config["default"].to_dict() == own
    for layer in lotra_layers(model).values():
        assert layer.scaling["default"] == layer.alpha["default"] == 0.5
    model.save_pretrained(tmp_path / "after")
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "after")(X), model(X), 0)


def test_the_slot_keeps_its_dtype(tmp_path):
    base, x = ChebyKAN([3, 6, 4]).bfloat16(), X.bfloat16()
    for fp32_slot in (False, True):
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2), autocast_adapter_dtype=fp32_slot)
        new = saved(base, tmp_path, LoTRAConfig(r=2))
        before = {key: p.dtype for key, p in model.named_parameters()}
        assert (torch.float32 in before.values()) == fp32_slot
        assert_different(model(x), new(x))
        hotswap_adapter(model, tmp_path)
        rounding_of(base, new, x).check(model(x))
        assert {key: p.dtype for key, p in model.named_parameters()} == before


def test_what_the_new_adapter_does_not_fill_is_zero(cheby):
    base, model, path = cheby
    saved(base, path, LoTRAConfig(r=(1, 2, 1), target_modules=["layers.1"], alpha=0.5))
    for layer in lotra_layers(model).values():
        layer.lotra_U1["default"].data.fill_(math.nan)  # of a slot that has diverged nothing may remain
    hotswap_adapter(model, path)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), path)
    assert_different(model(X), base(X))
    assert_equal(model(X), expected(X))
    assert not any(factor.any() for factor in lotra_layers(model)["layers.0"].tucker("default").tensors())
    core, U1, U2, U3 = lotra_layers(model)["layers.1"].tucker("default").tensors()
    G, *sides = lotra_layers(expected)["layers.1"].tucker("default").tensors()
    assert torch.equal(core[:1, :2, :1], G)
    model(X).square().sum().backward()
    for factor in (core, core.grad):
        assert factor[:1, :2, :1].all()
        factor.data[:1, :2, :1] = 0
        assert not factor.any()
    assert not any(factor.grad.any() for factor in lotra_layers(model)["layers.0"].tucker("default").tensors())
    for own, U in zip((U1, U2, U3), sides, strict=True):
        assert torch.equal(own[:, : U.shape[1]], U)
        assert own.grad[:, : U.shape[1]].all()
        assert not own[:, U.shape[1] :].any()
        assert not own.grad[:, U.shape[1] :].any()


def test_other_adapters_and_set_scale(cheby):
    base, model, path = cheby
    model.add_adapter("other", LoTRAConfig(r=1))
    randomize(model, "other")
    model.set_adapter("other")
    y = model(X)
    model.set_adapter("default")
    new = saved(base, path, LoTRAConfig(r=2, alpha=2.0))
    layers = list(lotra_layers(model).values())
    for layer in layers:
        layer.set_scale("default", 3.0)
    hotswap_adapter(model, path, "default")
    for layer in lotra_layers(new).values():
        layer.set_scale("default", 3.0)
    assert_equal(model(X), new(X))
    for layer in [*layers, *lotra_layers(new).values()]:
        layer.unscale_layer()
    assert_equal(model(X), new(X))
    model.set_adapter("other")
    assert_different(y, new(X))
    assert_equal(model(X), y, 0)


def test_from_memory(cheby):
    base, model, path = cheby
    new = saved(base, path, LoTRAConfig(r=2))
    assert_different(model(X), new(X))
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(new), "default", new.peft_config["default"])
    assert_equal(model(X), new(X))


def test_several_tensors_on_one_module(tmp_path):
    """The new adapter has one of the two, under the key that in the slot is the other's."""
    base = nn.Sequential(TwoTensorKANLayer(3, 2)).double()
    layouts = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    for left_out in layouts:
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=layouts))
        randomize(model)
        one = {key: layout for key, layout in layouts.items() if key != left_out}
        new = saved(base, tmp_path / left_out, LoTRAConfig(r=2, coefficients=one))
        assert_different(model(X), new(X))
        hotswap_adapter(model, tmp_path / left_out)
        assert_different(model(X), base(X))
        assert_equal(model(X), new(X))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.kan = nn.Embedding(7, 3), ChebyKANLayer(3, 4, 3)
        self.head = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(4), linear=nn.Linear(4, 2)))

    def forward(self, x):
        return self.head(self.kan(self.emb(x)))


TRAINED = [{"modules_to_save": ["head"]}, {"trainable_token_indices": {"emb": [1, 2]}}]


@pytest.mark.parametrize("trained", TRAINED)
def test_trained_copies_are_swapped(trained, tmp_path):
    base, x = Model().eval(), torch.arange(7)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, **trained)).eval()
    new = saved(base, tmp_path, LoTRAConfig(r=1, **trained)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert_different(compiled(x), new(x))
        hotswap_adapter(compiled, tmp_path)
        assert_equal(compiled(x), new(x))
    with model.disable_adapter():
        assert_equal(model(x), base(x), 0)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("in_slot", [False, True])
def test_trained_copies_of_other_modules_are_refused(trained, in_slot, tmp_path):
    base = Model()
    slot, new = ({}, trained) if not in_slot else (trained, {})
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1, **slot))
    saved(base, tmp_path, LoTRAConfig(r=1, **new))
    before = state(model)
    with pytest.raises(ValueError, match="`(modules_to_save|trainable_token_indices)`.* use `load_adapter`"):
        hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_other_tokens_and_broken_copies_are_refused(tmp_path):
    base = Model()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1, trainable_token_indices={"emb": [1, 2]}))
    saved(base, tmp_path / "tokens", LoTRAConfig(r=1, trainable_token_indices={"emb": [1, 3]}))
    before = state(model)
    with pytest.raises(ValueError, match=r"`trainable_token_indices` {'emb': \[1, 3\]}, 'default' has {'emb': \[1, 2"):
        hotswap_adapter(model, tmp_path / "tokens")
    assert_unchanged(model, before)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1, modules_to_save=["head"]))
    saved(base, tmp_path / "head", LoTRAConfig(r=1, modules_to_save=["head"]))
    weights = load_file(tmp_path / "head" / WEIGHTS)
    weights["base_model.model.head.linear.bias"][0] = math.nan
    save_file(weights, tmp_path / "head" / WEIGHTS)
    before = state(model)
    with pytest.raises(ValueError, match="has NaN or infinity in base_model.model.head.linear.bias: the"):
        hotswap_adapter(model, tmp_path / "head")
    assert_unchanged(model, before)


# Refused, with nothing changed ---------------------------------------------------------------------------------------


def other_base():
    return ChebyKAN([3, 7, 2]).double()


@pytest.mark.parametrize(
    ("base", "kwargs", "message"),
    [
        (None, {"r": (2, 4, 2)}, r"ranks \(2, 4, 2\) for layers.0.cheby_coeffs, above the \(2, 3, 2\) of 'default'"),
        (other_base, {"r": 1}, r"layout 'i o d' with sizes .*'o': 7} does not fit the shape \(3, 6, 4\)"),
        (lambda: ChebyKAN([3, 6, 2, 2]), {"r": 1}, r"names \['layers.2.cheby_coeffs'\], which match no parameter"),
    ],
)
def test_adapters_that_do_not_fit(base, kwargs, message, cheby):
    own, model, path = cheby
    saved(own if base is None else base(), path, LoTRAConfig(**kwargs))
    before, y = state(model), model(X)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, path)
    assert_unchanged(model, before)
    assert_equal(model(X), y, 0)


def test_another_layout_of_the_same_shape(tmp_path):
    base = ChebyKAN([3, 3, 2])
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1))
    saved(base, tmp_path, LoTRAConfig(r=1, coefficients={"layers.0.cheby_coeffs": "o i d"}))
    before = state(model)
    with pytest.raises(ValueError, match="layers.0.cheby_coeffs is adapted already with {'layout': 'i o d'"):
        hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_layers_that_the_slot_does_not_adapt(cheby):
    base, _, path = cheby
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, target_modules=["layers.0"]))
    saved(base, path, LoTRAConfig(r=2))
    before = state(model)
    with pytest.raises(ValueError, match=r"adapts \['layers.1.cheby_coeffs'\], which 'default' does not"):
        hotswap_adapter(model, path)
    model.add_adapter("other", LoTRAConfig(r=1, target_modules=["layers.1"]))
    with pytest.raises(ValueError, match=r"adapts \['layers.1.cheby_coeffs'\], which 'default' does not"):
        hotswap_adapter(model, path)
    model.delete_adapter("other")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)


def damaged(path, kind):
    weights = load_file(path / WEIGHTS)
    key = "base_model.model.layers.1.lotra_U2"
    if kind == "truncated":
        (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-40])
    elif kind == "NaN":
        weights[key][0, 0] = math.nan
    elif kind == "lacking":
        del weights[key]
    if kind != "truncated":
        save_file(weights, path / WEIGHTS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("truncated", "it is corrupt or truncated"), ("NaN", "has NaN or infinity in .*lotra_U2"), ("lacking", "lacks")],
)
def test_damaged_files(kind, message, cheby):
    base, model, path = cheby
    new = saved(base, path, LoTRAConfig(r=2))
    damaged(path, kind)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, path)
    weights = dict(get_peft_model_state_dict(new))
    if kind != "truncated":
        key = "base_model.model.layers.1.lotra_U2"
        weights = {k: v for k, v in weights.items() if k != key or kind == "NaN"}
        weights |= {key: weights[key] * math.nan} if kind == "NaN" else {}
        with pytest.raises(ValueError, match=f"`state_dict` .*{message}"):
            hotswap_adapter_from_state_dict(model, weights, "default", new.peft_config["default"])
    assert_unchanged(model, before)


def test_merged_and_offloaded_slots(cheby):
    base, model, path = cheby
    new = saved(base, path, LoTRAConfig(r=2))
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ValueError, match=re.escape("'default' is merged into the base: call `unmerge_adapter()`")):
        hotswap_adapter(model, path)
    assert_unchanged(model, before)
    model.unmerge_adapter()
    hotswap_adapter(model, path)
    y = model(X)
    assert_equal(y, new(X))
    cpu_offload(model.eval(), torch.device("cpu"))
    with pytest.raises(ValueError, match="layers.0.lotra_U1.* of 'default' are offloaded"):
        hotswap_adapter(model, path)
    assert_equal(model(X), y, 0)


def test_alpha_of_the_slot(cheby):
    base, _, path = cheby
    with pytest.warns(UserWarning, match="`alpha` is 0"):
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, alpha=0.0))
    saved(base, path, LoTRAConfig(r=2))
    with pytest.raises(ValueError, match="`alpha` 0 for layers.0.cheby_coeffs, so that it holds no update of `alpha`"):
        hotswap_adapter(model, path)
    model = get_peft_model(copy.deepcopy(base).half(), LoTRAConfig(r=2, alpha=1e-6), autocast_adapter_dtype=False)
    before = state(model)
    with pytest.raises(ValueError, match="in base_model.model.layers.0.lotra_core, too large for the torch.float16"):
        hotswap_adapter(model, path)
    assert_unchanged(model, before)


def test_other_models_adapters_and_names(cheby, tmp_path):
    base, model, path = cheby
    saved(base, path, LoTRAConfig(r=2))
    with pytest.raises(TypeError, match="`model` should be a PeftModel with LoTRA adapters but a ChebyKAN is passed"):
        hotswap_adapter(base, path)
    with pytest.raises(ValueError, match=r"`adapter_name` 'other' does not exist: the model has the adapters \['defa"):
        hotswap_adapter(model, path, "other")
    with pytest.raises(TypeError, match=r"\['adapter', 'device'\] are not arguments of this function"):
        hotswap_adapter(model, path, adapter="default", device="cpu")
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(TypeError, match="a PeftModel is passed"):
        hotswap_adapter(lora, path)
    with pytest.raises(ValueError, match="is a LORA adapter: only LoTRA adapters can be swapped in"):
        hotswap_adapter(model, tmp_path / "lora")
    assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LOTRA"
    hotswap_adapter(model, path.parent, subfolder=path.name, torch_device="cpu")
    assert_equal(model(X), PeftModel.from_pretrained(copy.deepcopy(base), path)(X))
