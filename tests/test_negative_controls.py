"""Layers that are no KAN layers, and layers that contradict themselves, are not taken for KAN layers."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from kan_layers import ChebyKANLayer, FastKANLayer, KANLinear, chebyshev
from peft import get_peft_model
from test_coefficients import scratch_registry  # noqa: F401
from torch import nn

from peft_lotra import LoTRAConfig, infer_coefficients, register_kan_layer, verify_coefficients

TOKENS = torch.arange(12).reshape(2, 6)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
IMAGE = {"image_size": 32, "patch_size": 8}
GROUPED = SMALL | {"vocab_size": 50, "num_key_value_heads": 2}
slow = pytest.mark.slow

STOCK = {
    "Bert": (SMALL | {"vocab_size": 50}, TOKENS),
    "ViT": (SMALL | IMAGE, (2, 3, 32, 32)),
    "ConvNext": ({"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, (2, 3, 64, 64)),
    "GPT2": (
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        TOKENS,
    ),
    "Llama": (GROUPED, TOKENS),
    "Qwen3": (GROUPED | {"head_dim": 8}, TOKENS),
    "Swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2},
        (2, 3, 32, 32),
    ),
    "CLIPVision": (SMALL | IMAGE, (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", ["Bert", "ViT", *(pytest.param(name, marks=slow) for name in [*STOCK][2:])])
def test_stock_transformers_are_refused(name):
    fields, sample = STOCK[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields)).eval()
    with pytest.raises(ValueError, match="no KAN coefficient tensor found"):
        infer_coefficients(model, torch.randn(sample) if isinstance(sample, tuple) else sample)


class Wrapped(nn.Module):
    """y = f(layer, x)."""

    def __init__(self, layer, f):
        super().__init__()
        self.layer, self.f = layer, f

    def forward(self, x):
        return self.f(self.layer, x)


class NormedAttention(nn.Module):
    """Queries and keys of each head are normalised, as in ViT-22B."""

    def __init__(self, features, heads):
        super().__init__()
        self.heads, self.q, self.k, self.v = heads, *(nn.Linear(features, features) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return (y.softmax(-1) @ v).transpose(1, 2).flatten(2)


NONE = {
    "heads": (lambda: Wrapped(nn.Linear(6, 12), lambda f, x: f(x).unflatten(-1, (3, 4)).tanh().sum(-1)), (5, 6)),
    "capsules": (lambda: Wrapped(nn.Linear(6, 12), lambda f, x: f(x).unflatten(-1, (3, 4)).norm(dim=-1)), (5, 6)),
    "softmax by groups": (
        lambda: Wrapped(nn.Linear(6, 12), lambda f, x: f(x).unflatten(-1, (3, 4)).softmax(-1).amax(-1)),
        (5, 6),
    ),
    "one function": (
        lambda: Wrapped(nn.Linear(6, 12), lambda f, x: f(F.silu(x)).unflatten(-1, (3, 4)).norm(dim=-1)),
        (5, 6),
    ),
    "heads in the batch": (
        lambda: Wrapped(nn.Linear(6, 12), lambda f, x: f(x).view(-1, 4).softmax(-1).view(-1, 12)),
        (5, 6),
    ),
    "pixel shuffle": (
        lambda: Wrapped(nn.Conv2d(3, 8, 3, padding=1), lambda f, x: F.pixel_shuffle(f(x), 2).tanh()),
        (2, 3, 6, 6),
    ),
    "normed attention": (lambda: NormedAttention(12, 3), (2, 5, 12)),
    "mixed tokens": (
        lambda: Wrapped(nn.Linear(5, 8), lambda f, x: f(x.mT).unflatten(-1, (2, 4)).relu().sum(-1).mT),
        (3, 5, 6),
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_linear_layers_behind_views_are_refused(name):
    make, shape = NONE[name]
    with pytest.raises(ValueError, match="no KAN coefficient tensor found") as error:
        infer_coefficients(nn.Sequential(make()), torch.randn(shape))
    assert "; inferred" not in str(error.value)


def test_the_refusal_says_what_to_do():
    make, shape = NONE["capsules"]
    with pytest.raises(
        ValueError, match=re.escape('no KAN layer (`target_modules="all-linear"` adapts linear layers)')
    ):
        infer_coefficients(nn.Sequential(make()), torch.randn(shape))


def test_in_a_vit_with_kan_layers_these_alone_are_found():
    config = transformers.ViTConfig(**SMALL, **IMAGE)
    model = transformers.ViTModel(config).eval()
    if not hasattr(model, "layers"):
        pytest.skip("an older transformers has other names")
    for layer in model.layers:
        layer.mlp = Wrapped(FastKANLayer(32, 32), lambda f, x: f(x))
    found = infer_coefficients(model.double(), torch.randn(2, 3, 32, 32))
    assert len(found) == 2
    assert all(name.endswith("mlp.layer.spline_linear.weight") for name in found)


class OneFunctionKAN(nn.Module):
    """Its functions are T_1 … T_4, of which the first is x itself."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(6, 5, 4))

    def forward(self, x):
        return torch.einsum("bid,iod->bo", chebyshev(x, 4)[..., 1:], self.c)


def test_a_kan_layer_with_an_affine_function_among_others_is_found():
    assert infer_coefficients(nn.Sequential(OneFunctionKAN()), torch.rand(7, 6))["0.c"]["layout"] == "i o d"


# Copies that contradict themselves -----------------------------------------------------------------------------------


class Mine:
    class KANLayer(nn.Module):
        """Has the name and the parameter of flashkan's, and another layout."""

        def __init__(self, n, m):
            super().__init__()
            self.in_features, self.out_features = n, m
            self.spline_weight = nn.Parameter(torch.randn(n, m, 4))

        def forward(self, x):
            return torch.einsum("bid,iod->bo", chebyshev(x, 3), self.spline_weight)


def test_a_copy_that_contradicts_its_attributes_is_not_taken():
    base = nn.Sequential(Mine.KANLayer(3, 5))
    message = "`spline_weight` as 'o i d' has 5 inputs, and the layer has in_features=3"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_peft_model(base, LoTRAConfig(r=2))
    assert infer_coefficients(base, torch.rand(6, 3))["0.spline_weight"]["layout"] == "i o d"


def test_a_declared_layout_that_contradicts_attributes_warns():
    base = nn.Sequential(Mine.KANLayer(3, 5))
    with pytest.warns(UserWarning, match=r"declared for 0, .*KANLayer, contradicts its attributes: .* in_features=3"):
        get_peft_model(base, LoTRAConfig(r=2, coefficients={"spline_weight": "o i d"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(nn.Sequential(Mine.KANLayer(3, 5)), LoTRAConfig(r=2, coefficients={"spline_weight": "i o d"}))


class Scaled(ChebyKANLayer):
    """Multiplies its coefficients by a scale that nobody has declared."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(3, 4) + 0.5)

    def forward(self, x):
        return torch.einsum("bid,iod->bo", chebyshev(torch.tanh(x), 3), self.cheby_coeffs * self.gain[..., None])


@pytest.mark.usefixtures("scratch_registry")
def test_a_scale_that_is_missing_is_found():
    base, x = nn.Sequential(Scaled(3, 4, 3)), torch.rand(6, 3)
    register_kan_layer(Scaled, {"cheby_coeffs": "i o d"})
    with pytest.raises(ValueError, match="found the scale gain i o"):
        verify_coefficients(base, x)
    register_kan_layer(Scaled, {"cheby_coeffs": {"layout": "i o d", "scale": "gain", "scale_layout": "i o"}})
    assert verify_coefficients(base, x)


def test_real_copies_are_still_taken():
    for layer in (KANLinear(3, 5), FastKANLayer(3, 5), ChebyKANLayer(3, 5, 3)):
        get_peft_model(nn.Sequential(layer), LoTRAConfig(r=2))


def test_the_advice_comes_first():
    base = nn.Sequential(*(type(f"Layer{k}", (nn.Linear,), {})(2, 2) for k in range(8)))
    with pytest.raises(ValueError, match="no KAN layer found") as error:
        get_peft_model(base, LoTRAConfig())
    advice, declare, classes = str(error.value).splitlines()
    assert "infer_coefficients(model, *sample)" in advice
    assert "register_kan_layer(Layer" in declare
    assert classes.count("Layer") == 5
    assert "… 4 more" in classes
