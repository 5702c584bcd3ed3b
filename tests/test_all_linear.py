"""`target_modules="all-linear"`: matrices and convolution kernels, in KAN layers and outside of them."""

import copy
import json
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import FULLGRAPH, assert_different, assert_equal
from convkan import ConvKAN
from kan import KAN as PyKAN
from kan_layers import KAN, ChebyKANLayer, ConvKANLayer, FastKAN, FastKANLayer, KANLinear
from layer_table import randomize
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rounding import rounding_of
from safetensors.torch import load_file
from test_transformers import needs_mixin
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peft_lotra import LoTRAConfig, extract_adapter, hotswap_adapter, register_kan_layer
from peft_lotra.coefficients import registry
from peft_lotra.layers.linear import LinearLayer
from peft_lotra.layers.lotra import LoTRALayer, adapted_tensors
from peft_lotra.testing import dense_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

# PEFT 0.21 calls what transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

SPLINE_CONV = {"spline_conv.weight": {"layout": "o (i d) h w", "sizes": {"d": 4}}}


def lotra(**kwargs):
    return LoTRAConfig(**{"target_modules": "all-linear", "r": 2, "init_weights": False, "alpha": 0.5} | kwargs)


def names(model, adapter=None):
    return list(adapted_tensors(model, adapter))


# Models --------------------------------------------------------------------------------------------------------------


class ResNetKAN(nn.Module):
    """A stem, a residual block with a KAN convolution, a strided and a depthwise convolution, a KAN as head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.kan = ConvKANLayer(4, 4)
        self.down, self.depthwise = nn.Conv2d(4, 6, 2, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = FastKANLayer(6, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(self.down(x + self.kan(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            Attention(dim),
            nn.LayerNorm(dim),
            KAN([dim, dim]),
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x).tanh())


class VisionKAN(nn.Module):
    """A plain ViT, its names those of timm, with a KAN for each MLP."""

    def __init__(self, dim=8):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(Block(dim), Block(dim))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2)).mean(1))


def transformer_kan(**kwargs):
    sizes = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 16, "kan_hidden_size": 6, "kan_degree": 3}
    return TransformerKANForCausalLM(TransformerKANConfig(**sizes, **kwargs)).eval()


IMAGES, ROWS = torch.rand(2, 3, 8, 8), torch.rand(6, 4) * 1.6 - 0.8
# A model, an input, and the tensors that are adapted.
MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), ROWS, ["0.weight", "2.weight"]),
    "Conv1D": (
        lambda: nn.Sequential(Conv1D(5, 4), nn.Linear(5, 3)),
        ROWS.expand(2, 6, 4).clone(),
        ["0.weight", "1.weight"],
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(6, 4, 2, dilation=2), nn.Conv1d(4, 6, 1, groups=2)),
        ROWS.expand(2, 6, 4).clone(),
        ["0.weight", "1.weight"],
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.Conv2d(6, 4, (1, 2), groups=2, padding=1, padding_mode="reflect", bias=False),
            nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        ),
        IMAGES,
        ["0.weight", "1.weight", "2.weight"],
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3)), nn.Conv3d(4, 4, 2, groups=2)),
        IMAGES.expand(2, 2, 3, 8, 8),
        ["0.weight", "1.weight"],
    ),
    "efficient-kan": (lambda: KAN([4, 3]), ROWS, ["layers.0.spline_weight", "layers.0.base_weight"]),
    "fast-kan": (lambda: FastKAN([4, 3]), ROWS, ["layers.0.spline_linear.weight", "layers.0.base_linear.weight"]),
    "pykan": (
        lambda: PyKAN(width=[4, 3], grid=4, k=3, auto_save=False, seed=7),
        ROWS,
        ["act_fun.0.coef", "act_fun.0.scale_sp", "act_fun.0.scale_base"],
    ),
    "convkan": (
        lambda: nn.Sequential(ConvKAN(4, 6, 3, groups=2)),
        torch.rand(2, 4, 5, 6),
        ["0.kan_layer.spline_weight", "0.kan_layer.base_weight"],
    ),
    "ResNet-KAN": (
        ResNetKAN,
        IMAGES,
        ["stem.weight", "kan.spline_conv.weight", "kan.base_conv.weight", "down.weight", "depthwise.weight"]
        + ["head.spline_linear.weight", "head.base_linear.weight"],
    ),
    "ViT-KAN": (
        VisionKAN,
        IMAGES,
        ["patch_embed.weight"]
        + [
            f"blocks.{k}.{name}"
            for k in range(2)
            for name in (
                "attn.qkv.weight",
                "attn.proj.weight",
                "mlp.layers.0.spline_weight",
                "mlp.layers.0.base_weight",
            )
        ]
        + ["head.weight"],
    ),
    "Transformer-KAN": (
        transformer_kan,
        torch.randint(1, 23, (2, 7), generator=torch.Generator().manual_seed(5)),
        [
            f"transformer.h.{k}.{name}"
            for k in range(2)
            for name in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.0.coefficients", "mlp.1.coefficients")
        ],
    ),
}


def first(y):
    return y.logits if hasattr(y, "logits") else y


def make(name, dtype=torch.float64):
    build, x, expected = MODELS[name]
    base = build().eval()
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    return base, x.to(dtype) if x.is_floating_point() else x, expected


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_adapted_and_exact(name, tmp_path):
    base, x, expected = make(name)
    fresh = [copy.deepcopy(base) for _ in range(4)]  # pykan keeps what it has computed
    model = get_peft_model(base, lotra(coefficients=SPLINE_CONV if name == "ResNet-KAN" else {}))
    assert names(model) == expected
    y = first(model(x))
    assert_different(y, first(fresh[0](x)))
    oracle = dense_model(fresh[1], model)
    assert_equal(y, first(oracle(x)))
    factors = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn_like(y)
    own, dense = (torch.autograd.grad((first(m(x)) * weights).sum(), factors) for m in (model, oracle))
    for a, b in zip(own, dense, strict=True):
        assert b.any()
        assert_equal(a, b, 1e-9)
    y = y.detach()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(fresh[2], tmp_path).eval()
    assert_equal(first(loaded(x)), y, 0)
    loaded.merge_adapter(safe_merge=True)
    assert_equal(first(loaded(x)), y)
    loaded.unmerge_adapter()
    assert_equal(first(loaded(x)), y, 0)
    merged = loaded.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in fresh[3].modules()]
    assert_equal(first(merged(x)), y)
    assert_equal(first(model.unload()(x)), first(fresh[3](x)), 0)


@pytest.mark.parametrize("name", MODELS)
def test_in_the_types_of_training(name):
    base, x, _ = make(name, torch.float32)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, lotra(coefficients=SPLINE_CONV if name == "ResNet-KAN" else {}))
    rounding_of(fresh, model, x).check(first(model(x)))


@pytest.mark.skipif(not FULLGRAPH, reason="older versions of torch run these layers between graphs")
@pytest.mark.slow
def test_compiled():
    base = nn.Sequential(Conv1D(5, 4), nn.Linear(5, 4), FastKANLayer(4, 3))
    model = get_peft_model(base, lotra())
    y = model(ROWS)
    torch._dynamo.reset()
    assert_equal(torch.compile(model, fullgraph=True, backend="eager")(ROWS), y)


# What is selected ----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """KAN layers, linear layers, and attention whose output projection is read past its module."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in range(2))
        self.kan, self.head = FastKANLayer(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.kan(x))


LAYERS = [f"layers.{k}.linear{j}.weight" for k in (0, 1) for j in (1, 2)]
OF_KAN = ["kan.spline_linear.weight", "kan.base_linear.weight"]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ["embed.weight", *LAYERS, *OF_KAN, "head.weight"]),
        ({"target_modules": "All-Linear"}, ["embed.weight", *LAYERS, *OF_KAN, "head.weight"]),
        ({"exclude_modules": ["layers.0.linear1", "kan"]}, ["embed.weight", *LAYERS[1:], "head.weight"]),
        ({"exclude_modules": ["base_linear"]}, ["embed.weight", *LAYERS, OF_KAN[0], "head.weight"]),
        ({"exclude_modules": r"(?!kan).*|kan\.spline_linear"}, OF_KAN[1:]),
        ({"modules_to_save": ["head"]}, ["embed.weight", *LAYERS, *OF_KAN]),
        ({"layers_to_transform": 1}, LAYERS[2:]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, LAYERS[:2]),
    ],
)
def test_selection(kwargs, expected):
    assert names(get_peft_model(Mixed(), lotra(**kwargs))) == expected


@pytest.mark.parametrize("training", [True, False])
def test_attention_of_torch_is_left_out_and_its_fast_path_sees_the_adapters(training):
    base = Mixed().double().train(training)
    x = ROWS.double().expand(2, 6, 4)
    model = get_peft_model(copy.deepcopy(base), lotra())
    with torch.set_grad_enabled(training):
        y = model(x)
        assert_different(y, base(x))
        assert_equal(y, dense_model(base, model)(x))


def test_ranks_and_budget():
    model = get_peft_model(Mixed(), lotra(rank_pattern={"embed": 1, "linear1": (3, 2, 1), "kan": {OF_KAN[0][4:]: 4}}))
    ranks = {name: layer.r["default"] for name, layer in adapted_tensors(model).items()}
    assert ranks["embed.weight"] == (1, 1, None)
    assert ranks[LAYERS[0]] == (3, 2, None)
    assert ranks[OF_KAN[0]] == (None, None, 4)
    assert (ranks[OF_KAN[1]], ranks["head.weight"]) == ((2, 2, None), (2, None, None))
    coefficients = sum(p.numel() for name, p in Mixed().named_parameters() if name in ranks)
    model = get_peft_model(Mixed(), lotra(r=None, compression_ratio=0.5))
    assert 0.4 * coefficients < model.get_nb_trainable_parameters()[0] <= 0.5 * coefficients


def test_what_the_model_has_twice_is_left_out():
    base = nn.Sequential(
        OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), kan=ChebyKANLayer(4, 4, 2))
    )
    base.b.weight = base.a.weight
    base.add_module("again", base.c)
    assert names(get_peft_model(base, lotra())) == ["kan.cheby_coeffs"]


def gpt2(cls=GPT2LMHeadModel, **kwargs):
    config = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8, pad_token_id=0, **kwargs)
    return cls(config)


GPT2 = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_of_a_language_model_is_left_out(tied):
    base = gpt2(tie_word_embeddings=tied)
    assert (base.lm_head.weight is base.transformer.wte.weight) == tied
    assert names(get_peft_model(base, lotra(task_type="CAUSAL_LM"))) == GPT2
    base = gpt2(tie_word_embeddings=False)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    assert len(names(get_peft_model(base, lotra()))) == sum(hasattr(m, "lora_A") for m in lora.modules())


def test_the_head_of_a_classifier_is_left_out_by_its_task():
    cls = GPT2ForSequenceClassification
    assert names(get_peft_model(gpt2(cls), lotra(task_type="SEQ_CLS"))) == GPT2
    assert names(get_peft_model(gpt2(cls), lotra())) == [*GPT2, "score.weight"]


@needs_mixin
def test_the_head_of_a_classifier_is_left_out_by_transformers():
    model = gpt2(GPT2ForSequenceClassification)
    model.add_adapter(lotra(task_type="SEQ_CLS"), "default")
    assert names(model) == GPT2


def quantized():
    base = nn.Sequential(nn.Linear(3, 3))
    base[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return base


def test_linear_layers_may_be_named_instead():
    given = {"qkv.weight": {"layout": "o (i d)", "sizes": {"d": 1}}}
    config = lotra(target_modules=["qkv"], coefficients=given)
    model = get_peft_model(VisionKAN(), config)
    assert names(model) == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    assert model.peft_config["default"].target_modules == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    given = {"base_linear.weight": {"layout": "o (i d)", "sizes": {"d": 1}}}
    assert (
        names(get_peft_model(FastKAN([4, 3]), lotra(target_modules=None, coefficients=given))) == MODELS["fast-kan"][2]
    )
    with pytest.raises(
        ValueError, match=re.escape("`coefficients={'proj.weight': {'layout': 'o (i d)', 'sizes': {'d'")
    ):
        get_peft_model(VisionKAN(), lotra(target_modules=["proj"]))


@pytest.mark.parametrize(
    ("base", "kwargs", "error", "message"),
    [
        (Mixed, {"exclude_modules": r".*"}, ValueError, "no KAN layer is left by {'target_modules': 'all-linear', "),
        (
            Mixed,
            {"exclude_modules": ["embed", "head", "layers.0", "linear1", "linear2", "base_linear", "spline_linear"]},
            ValueError,
            "leaves out every tensor of the layers ['kan']",
        ),
        (lambda: nn.Sequential(nn.Tanh()), {}, ValueError, "no KAN layer found"),
        (lambda: nn.Linear(3, 3), {}, ValueError, "no KAN layer found"),
        (quantized, {}, TypeError, "linear layer '0': `weight` has"),
        (Mixed, {"r": (1, 1, 9)}, ValueError, "`r`=(1, 1, 9) is above the modes (input, output, basis) of every"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
            {},
            ValueError,
            "`weight` of the KAN layer 0 (ParametrizedLinear) is computed from other tensors",
        ),
    ],
)
def test_errors(base, kwargs, error, message):
    model = base()
    modules = dict(model.named_modules())
    with pytest.raises(error, match=re.escape(message)):
        get_peft_model(model, lotra(**kwargs))
    assert dict(model.named_modules()) == modules


def test_matrices_of_a_class_are_checked(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    with pytest.raises(ValueError, match=re.escape("`matrices['w']`: layout 'o i' lacks the axes ['d']")):
        register_kan_layer(Block, {"w": "i o d"}, {"w": "o i"})
    register_kan_layer(Attention, {}, {"qkv.weight": {"layout": "o (i d)", "sizes": {"d": 1}}})
    assert "blocks.0.attn.qkv.weight" not in names(get_peft_model(VisionKAN(), lotra(target_modules=None)))
    model = get_peft_model(VisionKAN(), lotra(target_modules="all-linear"))
    assert {"blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"} <= set(names(model))
    assert adapted_tensors(model)["blocks.0.attn.qkv.weight"].get_base_layer().__class__ is Attention


# With the rest of the library ----------------------------------------------------------------------------------------


def test_a_saved_adapter_loads_without_registrations(tmp_path, monkeypatch):
    base, x = FastKAN([4, 5, 3]), ROWS
    model = get_peft_model(copy.deepcopy(base), lotra())
    y = model(x)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["layers.0", "layers.1"]
    assert saved["coefficients"]["layers.0.base_linear.weight"] == {
        "layout": "o (i d)",
        "sizes": {"o": 5, "i": 4, "d": 1},
        "layer": "layers.0",
    }
    monkeypatch.setattr(registry, "_REGISTRY", {})
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), y, 0)
    register_kan_layer(FastKAN, {"layers.0.spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": 8}}})
    assert_equal(PeftModel.from_pretrained(nn.Sequential(base)[0], tmp_path)(x), y, 0)


@pytest.mark.parametrize("name", ["fast-kan", "efficient-kan", "Transformer-KAN"])
@pytest.mark.parametrize("whole_first", [True, False])
def test_an_adapter_of_everything_and_one_of_the_kan_layers(whole_first, name, tmp_path):
    base, x, everything = make(name)
    targets = {"whole": "all-linear", "part": None}
    order = list(targets) if whole_first else list(reversed(targets))
    model = get_peft_model(copy.deepcopy(base), lotra(target_modules=targets[order[0]]), adapter_name=order[0])
    model.add_adapter(order[1], lotra(target_modules=targets[order[1]]))
    assert set(names(model, "whole")) == set(everything) > set(names(model, "part"))
    y = {}
    for adapter in order:
        model.set_adapter(adapter)
        y[adapter] = first(model(x)).detach()
        assert_different(y[adapter], first(base(x)))
        assert_equal(y[adapter], first(dense_model(base, model)(x)))
    assert_different(y["whole"], y["part"])
    samples = ["whole", "part", "__base__"]
    rows = x[:1].expand(3, *x.shape[1:]) if name == "Transformer-KAN" else x[:3]
    mixed = first(model.eval()(rows, adapter_names=samples))
    alone = [y["whole"], y["part"], first(base(x)).detach()]
    expected = [part[0 if name == "Transformer-KAN" else k] for k, part in enumerate(alone)]
    assert_equal(mixed, torch.stack(expected))
    model.save_pretrained(tmp_path)
    for adapter in order:  # files are as if each adapter were alone
        alone = get_peft_model(copy.deepcopy(base), lotra(target_modules=targets[adapter]))
        keys = set(load_file(tmp_path / adapter / "adapter_model.safetensors"))
        assert keys == set(get_peft_model_state_dict(alone))
    for names_ in (order, order[::-1]):
        torch.manual_seed(3)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / names_[0], adapter_name=names_[0])
        loaded.load_adapter(tmp_path / names_[1], names_[1])
        for adapter in names_:
            loaded.set_adapter(adapter)
            assert_equal(first(loaded(x)), y[adapter], 0)
        loaded.set_adapter(names_[0])
        loaded.delete_adapter(names_[1])
        assert_equal(first(loaded(x)), y[names_[0]], 0)


def test_what_others_adapt_is_left_out():
    base = nn.Sequential(OrderedDict(q=nn.Linear(4, 4), kan=ChebyKANLayer(4, 4, 2), head=nn.Linear(4, 2)))
    get_peft_model(base, LoraConfig(target_modules=["q"], modules_to_save=["head"]), adapter_name="lora adapter")
    with pytest.warns(UserWarning, match="a second time"):
        model = get_peft_model(base, lotra(), adapter_name="rest")
    assert names(model) == ["kan.cheby_coeffs"]


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_lora_on_attention_and_lotra_on_the_kan_of_a_plain_module(tmp_path):
    """The README's lines: one optimizer, one directory."""
    base, x, _ = make("ViT-KAN")
    fresh = copy.deepcopy(base)
    get_peft_model(base, LoraConfig(target_modules=["qkv", "proj"], init_lora_weights=False), adapter_name="attention")
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False), adapter_name="kan")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2].partition("_")[0] for name in trained if "lotra" in name} == {"lotra"}
    assert len(trained) == 4 * 2 + 2 * 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(x).square().sum().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    y = model(x)
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(fresh)
    PeftModel.from_pretrained(again, tmp_path / "attention", adapter_name="attention", is_trainable=True)
    again = PeftModel.from_pretrained(again, tmp_path / "kan", adapter_name="kan", is_trainable=True)
    assert_different(y, fresh(x))
    assert_equal(again(x), y, 0)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    assert_equal(again.merge_and_unload()(x), y)


def test_hotswap(tmp_path):
    base = FastKAN([4, 5, 3])
    new = get_peft_model(copy.deepcopy(base), lotra(r=1))
    new.save_pretrained(tmp_path)
    slot = get_peft_model(copy.deepcopy(base), lotra(r=2))
    assert_different(slot(ROWS), new(ROWS))
    hotswap_adapter(slot, tmp_path)
    assert_equal(slot(ROWS), new(ROWS))


def test_a_full_fine_tune_of_pykan_is_extracted():
    base, x, _ = make("pykan")
    full = copy.deepcopy(base)
    for name in ("coef", "scale_base", "scale_sp"):
        p = getattr(full.act_fun[0], name)
        p.data += 0.1 * torch.randn_like(p)
    with pytest.raises(ValueError, match=re.escape("'act_fun.0.scale_base', 'act_fun.0.scale_sp']") + ".*all-linear"):
        extract_adapter(copy.deepcopy(base), full, LoTRAConfig(r=9, rank_pattern={"act_fun.0": (4, 3, 7)}))
    model, errors = extract_adapter(copy.deepcopy(base), full, lotra(r=7))
    assert errors.keys() == set(MODELS["pykan"][2])
    assert_different(full(x), copy.deepcopy(base)(x))
    assert_equal(model(x), full(x), 1e-9)


def test_the_weight_of_an_adapted_layer_reads_adapted():
    base = nn.Sequential(nn.Linear(4, 3))
    model = get_peft_model(copy.deepcopy(base), lotra())
    layer = model.base_model.model[0]
    expected = base[0].weight + layer.get_delta_weight("default")
    assert_different(layer.weight, base[0].weight)
    assert_equal(layer.weight * 1, expected * 1)
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    randomize(model)
    assert_equal(nn.functional.linear(ROWS, layer.weight, layer.bias), model(ROWS))


def test_a_linear_layer_inside_a_kan_layer_is_told_when_it_is_called_alone():
    model = get_peft_model(nn.Sequential(KANLinear(4, 3), FastKANLayer(3, 2)), lotra())
    with pytest.raises(RuntimeError, match="`base_linear` of a FastKANLayer holds its adapted coefficients"):
        _ = model.base_model.model[1].base_linear


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_what_others_adapt_inside_a_kan_layer_is_left_out():
    base = nn.Sequential(OrderedDict(kan=FastKANLayer(4, 4)))
    get_peft_model(base, LoraConfig(target_modules=["base_linear"]), adapter_name="lora adapter")
    assert names(get_peft_model(base, lotra(), adapter_name="rest")) == ["kan.spline_linear.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)])
def test_an_adapted_linear_layer_goes_the_short_way(lead, dtype, monkeypatch):
    """Without a stand-in: values, first and second derivatives, several adapters, and what goes the long way."""
    base = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16, bias=False)).to(dtype)
    config = lotra(rank_pattern={"0": (3, 2, 1)})
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("other", lotra(r=1, alpha=1.0))
    model.base_model.set_adapter(["default", "other"])
    assert {type(layer) for layer in adapted_tensors(model).values()} == {LinearLayer}
    x = torch.randn(*lead, 16, dtype=dtype, requires_grad=True)
    oracle = dense_model(base, model)
    long_way = []
    monkeypatch.setattr(
        LoTRALayer, "_run_once", lambda self, *args: long_way.append(self) or self.base_layer(*args[0])
    )
    y, z = model(x), oracle(x)
    assert not long_way
    assert_different(y, base(x))
    rounding_of(base, model, x).check(y)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    slopes = [torch.autograd.grad(out.square().sum(), inputs, create_graph=True) for out in (y, z)]
    second = [torch.autograd.grad(slope[0].square().sum(), inputs) for slope in slopes]
    for a, b in zip((*slopes[0], *second[0]), (*slopes[1], *second[1]), strict=True):
        assert a.dtype == dtype
        if dtype == torch.float64:  # a wrong formula shows there
            assert_equal(a, b, 1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(long_way) == 2
