"""Adapters of nn.Linear coefficients as LoRA checkpoints, loaded by a process that has no peft_lotra."""

import copy
import math
from collections import OrderedDict

import peft
import pytest
import torch
from conftest import assert_different, assert_equal, within
from kan_layers import KAN, FastKAN, FastKANLayer
from launching import launch
from layer_table import full_factors, lotra_layers, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import rounding_of
from safetensors.torch import load_file
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.adapters.lora import convert_to_lora, save_as_lora

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


def adapted(dtype=torch.float64, widths=(3, 6, 2), **kwargs):
    """A base whose layers have the same names as some that are not adapted, an input, and a random adapter."""
    torch.manual_seed(1)
    kwargs = {"r": (2, 3, 2), "alpha": 0.7, "alpha_pattern": {"layers.1": -1.3}} | kwargs
    base = FastKAN(list(widths)).to(dtype)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(**kwargs))
    randomize(model)
    return base, X.to(dtype), model


def update(lora, name):
    """lora_B · lora_A of a converted state dict, whose scaling has to be 1."""
    config, state_dict = lora
    pattern = [config.rank_pattern.get(f"^{name}".replace(".", r"\."), config.r)]
    pattern += [config.alpha_pattern.get(f"^{name}".replace(".", r"\."), config.lora_alpha)]
    A, B = (state_dict[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert pattern == [len(A)] * 2 == [B.shape[1]] * 2
    return B @ A


def outputs_without_this_package(cases, tmp_path):
    """y for each (base, x, path), from a process that loads the adapters and never imports peft_lotra."""
    widths = [[layer.input_dim for layer in base.layers] + [base.layers[-1].output_dim] for base, _, _ in cases]
    data = [(w, base.state_dict(), x, str(path)) for w, (base, x, path) in zip(widths, cases, strict=True)]
    torch.save(data, tmp_path / "cases.pt")
    code = f"""
import sys
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from kan_layers import FastKAN

outputs = []
for widths, state_dict, x, path in torch.load({str(tmp_path / "cases.pt")!r}):
    base = FastKAN(widths).to(x.dtype)
    base.load_state_dict(state_dict)
    model = PeftModel.from_pretrained(base, path)
    assert sum(type(module) is Linear for module in model.modules()) == len(base.layers)
    outputs.append(model(x).detach())
assert "peft" in sys.modules and "peft_lotra" not in sys.modules
torch.save(outputs, {str(tmp_path / "y.pt")!r})
"""
    assert "Warning" not in launch(code, launcher="python", num_processes=1).stdout
    return torch.load(tmp_path / "y.pt")


@pytest.mark.slow
def test_exact_and_loaded_without_this_package(tmp_path):
    cases, expected = [], []
    for dtype in (torch.float64, torch.float32):
        base, x, model = adapted(dtype)
        y, path, rounding = model(x).detach(), tmp_path / str(dtype), rounding_of(base, model, x)
        save_as_lora(path, model)
        assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert_equal(model(x), y, 0)
        here = PeftModel.from_pretrained(copy.deepcopy(base), path)
        assert_different(here(x), base(x))
        rounding.check(here(x))
        rounding.check(here.merge_and_unload()(x))
        cases.append((base, x, path))
        expected.append(rounding)
    loaded = outputs_without_this_package(cases, tmp_path)
    for y, rounding, (base, x, _) in zip(loaded, expected, cases, strict=True):
        assert_different(y, base(x))
        rounding.check(y)


def test_matrices_and_config():
    base, _, model = adapted()
    lora = convert_to_lora(model)
    config, state_dict = lora
    assert type(config) is LoraConfig
    assert set(config.target_modules) == {"layers.0.spline_linear", "layers.1.spline_linear"}
    assert (config.r, config.lora_alpha) == (3, 3)
    assert config.rank_pattern == config.alpha_pattern == {r"^layers\.1\.spline_linear": 2}
    assert len(state_dict) == 4
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(tensor.requires_grad or tensor.data_ptr() in own for tensor in state_dict.values())
    for name, layer in lotra_layers(model).items():
        delta = torch.einsum("abc,ia,ob,dc->oid", *full_factors(layer)).flatten(1) * layer.scaling["default"]
        assert delta.any()
        assert_equal(update(lora, f"{name}.spline_linear"), delta)


@pytest.mark.parametrize("rank", [1, 2, 3, 50, 0.5, 0.9, 1.0])
def test_truncated(rank):
    """Against the singular values of the dense update."""
    _, _, model = adapted(r=(3, 4, 3), widths=(3, 6, 5))
    lora = convert_to_lora(model, rank)
    exact = convert_to_lora(model)
    for name in lotra_layers(model):
        name = f"{name}.spline_linear"
        delta = update(exact, name)
        values = torch.linalg.svdvals(delta)
        if isinstance(rank, int):
            k = min(rank, 4)
        else:
            k = next(k for k in range(1, 6) if values[:k].square().sum() >= (rank - 1e-12) * values.square().sum())
        assert len(lora[1][f"base_model.model.{name}.lora_A.weight"]) == k
        error = (update(lora, name) - delta).norm()
        assert (error - values[k:].norm()).abs() <= within(1e-10) * delta.norm()
        if k == 1:
            assert error > 0.1 * delta.norm()


def test_the_other_order_of_the_columns_and_bias():
    """A layer whose nn.Linear has a bias and takes (d i)."""

    class Layer(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.linear = nn.Linear(n * 2, m)

        def forward(self, x):
            return self.linear(torch.stack([x.tanh(), x.square()], 1).flatten(1))

    base = nn.Sequential(Layer(3, 4), Layer(4, 2)).double()
    layout = {"linear.weight": {"layout": "o (d i)", "sizes": {"d": 2}}}
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(2, 2, 1), coefficients=layout))
    randomize(model)
    lora = convert_to_lora(model)
    for name, layer in lotra_layers(model).items():
        delta = torch.einsum("abc,ia,ob,dc->odi", *full_factors(layer)).flatten(1)
        assert delta.any()
        assert_equal(update(lora, f"{name}.linear"), delta)


def test_the_linear_layer_itself_is_adapted(tmp_path):
    base, x, _ = adapted()
    names = ["layers.0.spline_linear", "layers.1.spline_linear"]
    layouts = {f"{name}.weight": {"layout": "o (i d)", "sizes": {"d": 8}} for name in names}
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, coefficients=layouts))
    assert list(lotra_layers(model)) == names
    randomize(model)
    save_as_lora(tmp_path, model)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_different(lora(x), base(x))
    assert_equal(lora(x), model(x))


def test_names_that_are_endings_of_others(tmp_path):
    """The first is adapted, a second of the same ending is not; of a third pair both are, with other ranks."""
    torch.manual_seed(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.encoder, self.decoder = FastKAN([3, 3]).layers, FastKAN([3, 3, 3]), FastKAN([3, 3])

        def forward(self, x):
            return self.layers[0](self.decoder(self.encoder(x)))

    base = Model().double()
    adapt = ["layers.0", "encoder.layers.1"]
    model = get_peft_model(
        copy.deepcopy(base),
        LoTRAConfig(r=3, target_modules=adapt, exclude_modules=["encoder.layers.0", "decoder.layers.0"]),
    )
    assert set(lotra_layers(model)) == set(adapt)
    model.add_adapter("both", LoTRAConfig(r=2, rank_pattern={"^layers.0": 1}, exclude_modules=["decoder.layers.0"]))
    for adapter in ("default", "both"):
        randomize(model, adapter)
        model.set_adapter(adapter)
        save_as_lora(tmp_path / adapter, model, adapter_name=adapter)
        lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / adapter)
        assert_different(lora(X), base(X))
        assert_equal(lora(X), model(X))
        wrapped = {name for name, module in lora.named_modules() if hasattr(module, "lora_A")}
        targets = [name for name, layer in lotra_layers(model).items() if adapter in layer.lotra_core]
        assert wrapped == {f"base_model.model.{name}.spline_linear" for name in targets}
    assert len(targets) == 3


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.kan = nn.Embedding(7, 3), FastKANLayer(3, 4)
        self.head = nn.Sequential(OrderedDict(linear=nn.Linear(4, 2), out=nn.Linear(2, 2)))

    def forward(self, x):
        return self.head(self.kan(self.emb(x)))


@pytest.mark.parametrize("trained", [{"modules_to_save": ["head"]}, {"trainable_token_indices": {"emb": [1, 2]}}])
def test_trained_copies_go_with_it(trained, tmp_path):
    base, x = Embedded().double(), torch.arange(7)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, **trained), adapter_name="one")
    model.add_adapter("two", LoTRAConfig(r=2, **trained))
    for name, p in model.named_parameters():
        if p.requires_grad or "two" in name:
            nn.init.normal_(p)
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        save_as_lora(tmp_path / adapter, model, adapter_name=adapter)
        lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / adapter)
        assert_different(lora(x), base(x))
        assert_equal(lora(x), model(x))
    assert_different(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")(x), lora(x))
    assert load_file(tmp_path / "one" / "adapter_model.safetensors").keys() == set(
        convert_to_lora(model, adapter_name="two")[1]
    )


def test_compiled_model_and_set_scale():
    _, x, model = adapted()
    lora = convert_to_lora(model)
    for layer in lotra_layers(model).values():
        layer.set_scale("default", 2.0)
    scaled = convert_to_lora(torch.compile(model, backend="eager"))
    for name in lotra_layers(model):
        assert_equal(update(scaled, f"{name}.spline_linear"), 2 * update(lora, f"{name}.spline_linear"))


# Refused -------------------------------------------------------------------------------------------------------------


class Weighted(nn.Linear):
    """Has the basis inside."""

    def forward(self, x):
        return nn.functional.linear(torch.stack([x, x.square()], -1).flatten(1), self.weight, self.bias)


class Held(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(torch.stack([x, x.square()], -1).flatten(1))


class Scaled(Held):
    def __init__(self):
        super().__init__(nn.Linear(6, 4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        basis = torch.stack([x, x.square()], -1).flatten(1)
        return nn.functional.linear(basis, self.linear.weight * self.scale[:, None])


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        return torch.stack([x, x.square()], -1).flatten(1) @ self.linear.weight


FLAT = {"layout": "o (i d)", "sizes": {"d": 2}}


@pytest.mark.parametrize(
    ("layer", "coefficients", "message"),
    [
        (lambda: KAN([3, 2]), {}, "layers.0.spline_weight .* no weight of an nn.Linear.* of a KANLinear; use `merge_"),
        (lambda: Weighted(6, 4), {"weight": FLAT}, "0.weight .* of a Weighted; use `merge_and_unload"),
        (
            lambda: Scaled(),
            {"linear.weight": {**FLAT, "scale": "scale", "scale_layout": "o"}},
            "0.linear.weight .* its `scale` 'scale' .* no part of an nn.Linear; use `merge_and_unload",
        ),
        (
            lambda: Held(nn.Linear(6, 4)),
            {"linear.weight": {"layout": "o (i d)", "slice": ":, :4", "sizes": {"d": 2}}},
            "0.linear.weight .* `slice` ':, :4' is no part of an nn.Linear",
        ),
        (
            lambda: Transposed(),
            {"linear.weight": {"layout": "(i d) o", "sizes": {"d": 2}}},
            r"0.linear.weight .* layout '\(i d\) o' has other rows than the outputs",
        ),
    ],
)
def test_layers_that_are_no_linear(layer, coefficients, message, tmp_path):
    model = get_peft_model(nn.Sequential(layer()), LoTRAConfig(r=1, coefficients=coefficients))
    with pytest.raises(ValueError, match=message):
        save_as_lora(tmp_path / "lora", model)
    assert not (tmp_path / "lora").exists()


def test_one_of_several_layers_that_is_no_linear():
    model = get_peft_model(nn.Sequential(FastKANLayer(3, 4), KAN([4, 2])), LoTRAConfig(r=1))
    with pytest.raises(ValueError, match="1.layers.0.spline_weight cannot be converted to LoRA"):
        convert_to_lora(model)


def test_merged_and_broken_adapters():
    _, _, model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="layers.0.spline_linear.weight .* is merged .* call `unmerge_adapter"):
        convert_to_lora(model)
    model.unmerge_adapter()
    for value, rank in ((math.nan, None), (math.inf, None), (math.nan, 1), (math.inf, 0.5)):
        lotra_layers(model)["layers.1"].lotra_core["default"].data[0, 0, 0] = value
        with pytest.raises(ValueError, match="'default' has NaN or infinity at layers.1.spline_linear.weight"):
            convert_to_lora(model, rank)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "3", math.nan])
def test_rank(rank):
    with pytest.raises(ValueError, match=f"`rank` should be a positive integer .* the value passed is {rank!r}"):
        convert_to_lora(adapted()[2], rank)


def test_models_and_names():
    base, _, model = adapted()
    with pytest.raises(TypeError, match="`model` should be a PeftModel with LoTRA adapters but a FastKAN is passed"):
        convert_to_lora(base)
    with pytest.raises(ValueError, match="`adapter_name` 'other' does not exist"):
        convert_to_lora(model, adapter_name="other")


def test_pefts_own_conversion_refuses():
    """It would name the KAN layer, which LoRA cannot wrap, and not the nn.Linear inside."""
    _, _, model = adapted()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="Some module types on this model do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=2)
