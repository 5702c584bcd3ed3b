"""Modes without a factor, the factor of groups and kernel positions, and cores on frozen factors."""

import copy
import itertools
import json
import re

import pytest
import torch
from adapted_layers import adapt, dense, factors_of
from conftest import assert_different, assert_equal, forced_order, within
from kan_layers import ChebyKAN, FastKAN
from layer_table import LAYERS, full_factors, lotra_layers, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer, fit_gauss_newton, hotswap_adapter, initialize_lotra_weights
from peft_lotra.adapters.lora import adapter_from_lora, save_as_lora
from peft_lotra.standin.cost import DENSE, ORDERS
from peft_lotra.testing import dense_model
from peft_lotra.tucker.decomposition import core_count, parameter_count
from peft_lotra.tucker.ranks import choose_ranks, mode_sizes

RANKS = [r for r in itertools.product((2, None), repeat=3) if None in r]
CONVOLUTIONS = [name for name in LAYERS if name.startswith("convolution") and "tensor per group" not in name]
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


def whole(name, r, adapters=1):
    row = LAYERS[name]
    r = tuple(None if k is None else min(k, size) for k, size in zip(r, (*row.sizes, 9, 9), strict=False))
    return adapt(row.make(), row.declared, row.sample(torch.float64).shape, torch.float64, adapters, r)


def compare(base, model, x):
    """Values, gradients and second derivatives."""
    parameters = [x, *factors_of(model)]
    results = []
    for function in (model, dense(base, model)):
        y = function(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        gradients = torch.autograd.grad((y * weights).sum(), parameters, create_graph=True)
        results.append([y, *gradients])
        if gradients[0].requires_grad:
            results[-1] += torch.autograd.grad(gradients[0].square().sum(), parameters, allow_unused=True)
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_equal(actual, expected, 1e-9)
    assert_different(results[0][0], base(x))


@pytest.mark.parametrize("r", RANKS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name, r):
    compare(*whole(name, r))


@pytest.mark.parametrize("order", [*ORDERS, DENSE])
@pytest.mark.parametrize("r", RANKS, ids=str)
@pytest.mark.parametrize("name", ["efficient-kan", "i o d", "convolution, groups"])
def test_every_order(name, r, order):
    base, model, x = whole(name, r)
    with forced_order(order):
        compare(base, model, x)


@pytest.mark.parametrize("order", [*ORDERS, DENSE])
@pytest.mark.parametrize("name", ["efficient-kan", "convolution"])
def test_adapters_with_other_whole_modes_side_by_side(name, order):
    base, model, x = whole(name, (2, 2, 2))
    coefficients = LAYERS[name].declared
    for k, r in enumerate([(None, 2, 2), (2, None, 1), (None, None, None)]):
        model.add_adapter(f"{k}", LoTRAConfig(r=r, coefficients=coefficients, init_weights=False))
    model.base_model.set_adapter(["default", "0", "1", "2"])
    with forced_order(order):
        compare(base, model, x)


@pytest.mark.parametrize("r", [(2, 2, 2, 2), (None, 2, None, 3), (2, 2, None, 1)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_factor_of_positions(name, r):
    base, model, x = whole(name, r)
    (layer,) = lotra_layers(model).values()
    *sizes, positions = mode_sizes(layer.spec.layout.canonical_shape)
    assert layer.lotra_U4["default"].shape == (positions, r[3])
    core = [n if k is None else min(n, k) for n, k in zip(sizes, r, strict=False)]
    assert layer.lotra_core["default"].shape == (*core, r[3])
    compare(base, model, x)


def test_positions_are_ignored_by_layers_without():
    row = LAYERS["convolution"]
    base = nn.ModuleDict({"conv": row.make(), "kan": ChebyKAN([3, 6, 4])})
    model = get_peft_model(base, LoTRAConfig(r=(2, 2, 2, 3), coefficients=row.declared))
    layers = lotra_layers(model)
    assert {name: bool(layer.lotra_U4) for name, layer in layers.items()} == {
        "conv": True,
        "kan.layers.0": False,
        "kan.layers.1": False,
    }
    with pytest.raises(ValueError, match=re.escape("`r`=(2, 2, 2, 2) is above the modes")):
        get_peft_model(ChebyKAN([3, 6, 4]), LoTRAConfig(r=(2, 2, 2, 2)))


# What is trained, stored and counted ---------------------------------------------------------------------------------


def kan(r=None, widths=(3, 6, 4), **kwargs):
    torch.manual_seed(1)
    base = ChebyKAN(list(widths)).double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=r, **kwargs))
    return base, model


def test_a_rank_of_the_modes_size_is_whole():
    _, model = kan(r=4)  # modes (3, 6, 4) and (6, 4, 4)
    first, second = lotra_layers(model).values()
    assert (first.r["default"], second.r["default"]) == ((None, 4, None), (4, None, None))
    assert [tuple(p.shape) for p in first.parameters() if p.requires_grad] == [(3, 4, 4), (6, 4)]
    assert [tuple(p.shape) for p in second.parameters() if p.requires_grad] == [(4, 4, 4), (6, 4)]


@pytest.mark.parametrize("r", [*RANKS, (2, 2, 2)], ids=str)
def test_saved_and_loaded(r, tmp_path):
    base, model = kan(r=r)
    randomize(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == model.get_nb_trainable_parameters()[0]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]["layers.0"] == list(r)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal(loaded(X), model(X), 0)
    assert_different(model(X), base(X))
    assert_equal(loaded.merge_and_unload()(X), model(X))


def test_earlier_files_with_square_factors_load_as_they_are(tmp_path):
    """They name ranks of the size of their modes, and have a factor there."""
    base, model = kan(r=(2, 2, 2))
    for layer in lotra_layers(model).values():
        n_d = layer.spec.layout.canonical_shape[2]
        layer.update_layer("default", (2, 2, n_d), init_weights=False)
    for module in ("layers.0", "layers.1"):
        model.peft_config["default"].rank_pattern[module] = [2, 2, 4]
    y = model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert lotra_layers(loaded)["layers.0"].lotra_U3["default"].shape == (4, 4)
    assert_equal(loaded(X), y, 0)
    assert_different(y, base(X))


def test_budgets_count_no_factor_of_a_whole_mode():
    base, model = kan(compression_ratio=0.5)
    total = sum(p.numel() for name, p in base.named_parameters() if "coeffs" in name)
    assert 0.3 * total < model.get_nb_trainable_parameters()[0] <= 0.5 * total


def test_the_adapter_of_a_small_kan_comes_with_a_warning():
    base = ChebyKAN([2, 5, 1])
    with pytest.warns(
        UserWarning, match=r"the adapter has \d+ numbers, \d+% of the \d+ coefficients .* `fit_gauss_newton`"
    ):
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig())
    trained, total = model.get_nb_trainable_parameters()[0], sum(p.numel() for p in base.parameters())
    assert trained <= total
    for widths in ([2, 5, 1], [1, 1]):
        with pytest.raises(ValueError, match="`compression_ratio`=0.1 allows") as error:
            get_peft_model(ChebyKAN(widths), LoTRAConfig(compression_ratio=0.1))
        least = float(re.search(r"at least ([\d.]+)", str(error.value)).group(1))
        get_peft_model(ChebyKAN(widths), LoTRAConfig(compression_ratio=least))


# What is done with adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [(True, "cat"), (False, "svd")])
def test_combined(rules):
    base, model = kan(r=(None, 2, 2))
    for name, r in {"b": (2, 2, None), "c": (2, None, 2)}.items():
        model.add_adapter(name, LoTRAConfig(r=r))
    for name in ("default", "b", "c"):
        randomize(model, name)
    weights = {"default": 0.5, "b": -1.0, "c": 2.0}
    errors = model.add_weighted_adapter(list(weights), list(weights.values()), "sum", rules[1])
    model.set_adapter("sum")
    assert lotra_layers(model)["layers.0"].r["sum"][0] is None
    assert max(errors.values()) < within(1e-12)
    assert_equal(model(X), dense_model(base, model, weights)(X))
    assert_different(model(X), base(X))


@pytest.mark.parametrize(
    ("slot", "new"),
    [
        ((None, 3, None), (2, 2, 2)),
        ((None, None, None), (2, 2, None)),
        ((2, 3, None), (2, 3, None)),
        ((None, 3, 2), (None, 2, 1)),
    ],
)
def test_swapped_into_whole_modes(slot, new, tmp_path):
    base, model = kan(r=slot, alpha=0.5)
    randomize(model)
    _, other = kan(r=new, alpha=2.0)
    randomize(other)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path)
    assert_equal(model(X), other(X))
    assert_different(model(X), base(X))


def test_a_whole_mode_does_not_fit_into_a_slot_with_a_factor(tmp_path):
    _, model = kan(r=(2, 3, 2))
    _, other = kan(r=(2, 3, None))
    other.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=re.escape("has ranks (2, 3, None) for layers.0.cheby_coeffs, above the (2, 3, 2)")
    ):
        hotswap_adapter(model, tmp_path)


def test_lora_both_ways(tmp_path):
    """LoRA is the adapter of ranks (None, r, None); to it and back nothing changes but rounding."""
    torch.manual_seed(1)
    base = FastKAN([3, 6, 5]).double()
    ranks = {"layers.1.spline_linear": 3}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["spline_linear"], rank_pattern=ranks, use_rslora=True)
    lora = get_peft_model(copy.deepcopy(base), config)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    lora.save_pretrained(tmp_path / "lora")
    model = adapter_from_lora(copy.deepcopy(base), tmp_path / "lora")
    assert [layer.r["default"] for layer in lotra_layers(model).values()] == [(None, 2, None), (None, 3, None)]
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]
    assert_equal(model(X), lora(X))
    assert_different(model(X), base(X))
    save_as_lora(tmp_path / "back", model)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back")(X), lora(X))
    stored = load_file(tmp_path / "back" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.layers.0.spline_linear.lora_{side}.weight"] for side in "AB")
    assert A.shape == (2, base.layers[0].spline_linear.in_features)
    assert B.shape == (6, 2)


def test_lora_of_the_full_rank_and_of_some_layers(tmp_path):
    base = FastKAN([3, 6, 2]).double()
    config = LoraConfig(r=2, target_modules=["layers.1.spline_linear"], init_lora_weights=False)
    lora = get_peft_model(copy.deepcopy(base), config)
    lora.save_pretrained(tmp_path)
    model = adapter_from_lora(copy.deepcopy(base), tmp_path)
    (name, layer), *others = lotra_layers(model).items()
    assert (name, layer.r["default"], others) == ("layers.1", (None, None, None), [])
    assert_equal(model(X), lora(X))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, target_modules=["spline_linear"], use_dora=True), "lora_magnitude_vector"),
        (LoraConfig(r=2, target_modules=["base_linear"]), r"'layers.1.base_linear'\] are not coefficients of `base`"),
        (LoTRAConfig(r=2), "has a .*LOTRA adapter: only LoRA"),
    ],
)
def test_what_is_no_plain_lora(config, message, tmp_path):
    base = FastKAN([3, 6, 5])
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapter_from_lora(base, tmp_path)
    assert type(base) is FastKAN
    assert not any("lotra" in name for name, _ in base.named_parameters())


# Cores on frozen factors ---------------------------------------------------------------------------------------------


def residual(net, x):
    return net(x) - torch.sin(3 * x[:, :1])


def test_only_cores_are_trained_and_everything_is_saved(tmp_path):
    base, model = kan(r=2, freeze_factors=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.layers.{k}.lotra_core.default" for k in range(2)}
    for layer in lotra_layers(model).values():
        for U in layer.tucker("default").tensors()[1:]:
            assert_equal(U.T @ U, torch.eye(2, dtype=U.dtype))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit_gauss_newton(model, residual, X, iterations=5, progressbar=False)
    assert result.losses[-1] < 0.9 * result.losses[0]
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, orthonormal=True)
    residual(model, X).square().mean().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert_equal(loaded(X), model(X), 0)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    assert_equal(loaded.merge_and_unload()(X), model(X))


def test_factors_stay_frozen_when_adapters_change():
    _, model = kan(r=2, freeze_factors=True)
    model.add_adapter("other", LoTRAConfig(r=2))
    for active in (["default", "other"], ["other"], ["default"]):
        model.base_model.set_adapter(active)
        model.base_model.set_requires_grad(active, True)
        for name, p in model.named_parameters():
            if "lotra_" in name:
                container, adapter = name.split(".")[-2:]
                assert p.requires_grad == (adapter in active and (adapter == "other" or container == "lotra_core"))
    with pytest.warns(UserWarning, match="Adapter default was active"):
        model.delete_adapter("default")
    assert not lotra_layers(model)["layers.0"].frozen_peft_weight_names.get("default")


def test_frozen_factors_from_gradients():
    _, model = kan(r=2, freeze_factors=True)
    drawn = [layer.tucker("default").factors["i"].clone() for layer in lotra_layers(model).values()]
    initialize_lotra_weights(
        model, lambda: residual(model, X).square().mean().backward(), method="gradient_hosvd", progressbar=False
    )
    for U, layer in zip(drawn, lotra_layers(model).values(), strict=True):
        assert_different(layer.tucker("default").factors["i"], U)
        assert not layer.tucker("default").factors["i"].requires_grad


def test_a_budget_counts_what_is_trained():
    _, model = kan(compression_ratio=0.1, widths=(8, 16, 8), freeze_factors=True)
    total = (8 * 16 + 16 * 8) * 4
    trained = model.get_nb_trainable_parameters()[0]
    assert 0.05 * total < trained <= 0.1 * total
    assert trained == sum(layer.lotra_core["default"].numel() for layer in lotra_layers(model).values())


def test_what_is_stored_beside_frozen_cores():
    """The numbers in the README."""
    shapes = {"first": (2, 32, 8), "middle": (32, 32, 8), "last": (32, 1, 8)}
    ranks = choose_ranks(shapes, {}, None, 0.1, freeze_factors=True)
    counts = [sum(count(shapes[name], ranks[name]) for name in shapes) for count in (core_count, parameter_count)]
    assert counts == [896, 2144]


def test_full_factors_of_the_tests_are_identities_where_there_are_none():
    _, model = kan(r=(None, 2, 2))
    core, U1, U2, U3 = full_factors(lotra_layers(model)["layers.0"])
    assert torch.equal(U1, torch.eye(3).to(core))
    assert (U2.shape, U3.shape) == ((6, 2), (4, 2))
