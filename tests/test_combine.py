"""Weighted combinations of adapters, against dense updates combined by hand."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import approx, assert_different, assert_equal, within
from kan_layers import ChebyKAN, GroupedPolyConvKANLayer, PackedKANLayer, TwoTensorKANLayer
from layer_table import MODELS, config, lotra_layers, make, randomize
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.combination import combine_adapters
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.testing import dense_model

NAMES = ["one", "two"]
PRUNED = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


def adapted(base, ranks=(2, (2, 1, 3)), alphas=(0.5, 2.0), **kwargs):
    """`base` with the adapters "one" and "two" of different ranks and scalings."""
    model = get_peft_model(base, LoTRAConfig(r=ranks[0], alpha=alphas[0], **kwargs), adapter_name="one")
    model.add_adapter("two", LoTRAConfig(r=ranks[1], alpha=alphas[1], **kwargs))
    for name in NAMES:
        randomize(model, name)
    return model


def updates(model, adapter):
    return {
        name: layer.get_delta_weight(adapter)
        for name, layer in lotra_layers(model).items()
        if adapter in layer.lotra_core
    }


def ranks(model, adapter):
    return {name: layer.r[adapter] for name, layer in lotra_layers(model).items() if adapter in layer.r}


def relative(error, whole):
    return ((error).norm() / whole.norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_cat_is_the_weighted_sum(name):
    base, x = make(name, torch.float64)
    model = get_peft_model(copy.deepcopy(base), config(name, r=(1, 2, 3), alpha=0.5), adapter_name="one")
    model.add_adapter("two", config(name, r=(2, 1, 2), alpha=2.0))
    for adapter in NAMES:
        randomize(model, adapter)
    errors = model.add_weighted_adapter(NAMES, [0.7, -1.3], "sum", "cat")
    a, b, total = (updates(model, adapter) for adapter in ("one", "two", "sum"))
    for layer in total:
        assert_different(a[layer], b[layer])
        assert_equal(total[layer], 0.7 * a[layer] - 1.3 * b[layer], 1e-6)
    assert set(errors.values()) == {0.0}
    model.set_adapter("sum")
    y = model(x)
    assert_equal(y, dense_model(base, model, {"one": 0.7, "two": -1.3})(x), 1e-6)
    assert_different(y, base(x))


def test_cat_adds_ranks_up_to_the_modes_and_blocks_stay_apart():
    model = adapted(ChebyKAN([5, 6, 4]), ranks=((2, 3, 1), (2, 2, 2)))
    model.add_weighted_adapter(NAMES, [2, 3], "sum", "cat")
    assert ranks(model, "sum") == {"layers.0": (4, 5, 3), "layers.1": (4, None, 3)}
    core = lotra_layers(model)["layers.0"].lotra_core["sum"]
    assert not core[:2, :3, 1:].any()
    assert not core[2:, :3].any()
    assert_equal(core[:2, :3, :1], 2 * 0.5 * lotra_layers(model)["layers.0"].lotra_core["one"])
    assert_equal(core[2:, 3:, 1:], 3 * 2.0 * lotra_layers(model)["layers.0"].lotra_core["two"])


@pytest.mark.parametrize("weights", [[0.7, -1.3], [0.0, 0.0], [1.0, 0.0]])
def test_svd_of_sufficient_rank_is_the_weighted_sum(weights):
    model = adapted(ChebyKAN([5, 6, 4]), ranks=((1, 2, 1), (2, 1, 2)))
    errors = model.add_weighted_adapter(NAMES, weights, "sum", svd_rank=6)
    assert ranks(model, "sum") == dict.fromkeys(["layers.0", "layers.1"], (None, None, None))
    a, b, total = (updates(model, adapter) for adapter in ("one", "two", "sum"))
    for name in total:
        assert (total[name] - weights[0] * a[name] - weights[1] * b[name]).abs().max() < within(1e-5)
    assert max(errors.values()) < within(1e-12)


@pytest.mark.parametrize("kind", ["svd", "linear"])
def test_svd_reports_its_error_and_is_as_good_as_hosvd_of_the_dense_sum(kind):
    model = adapted(ChebyKAN([5, 6, 4]), ranks=(3, 2))
    errors = model.add_weighted_adapter(NAMES, [1.0, -0.5], "cut", kind, svd_rank=(2, 2, 2))
    model.add_weighted_adapter(NAMES, [1.0, -0.5], "whole", "cat")
    cut, whole = updates(model, "cut"), updates(model, "whole")
    assert set(errors) == {f"{name}.cheby_coeffs" for name in cut}
    for name, error in errors.items():
        layer = name.removesuffix(".cheby_coeffs")
        assert 0.05 < error < 1
        assert relative(cut[layer] - whole[layer], whole[layer]) == approx(error, rel=1e-4)
        projected = whole[layer]  # HOSVD written out: project each mode on its two leading singular vectors
        for mode in range(3):
            U = torch.linalg.svd(whole[layer].movedim(mode, 0).flatten(1)).U[:, :2]
            projected = torch.tensordot(U @ U.T, projected, dims=([1], [mode])).movedim(0, mode)
        assert error <= relative(projected - whole[layer], whole[layer]) + 1e-6


def test_ranks_of_the_new_adapter():
    model = adapted(ChebyKAN([5, 6, 4]), ranks=((3, 1, 1), (1, 2, 2)))
    model.add_weighted_adapter(NAMES, [1, 1], "largest")
    assert ranks(model, "largest") == {"layers.0": (3, 2, 2), "layers.1": (3, 2, 2)}
    model.add_weighted_adapter(NAMES, [1, 1], "named", "svd", {"layers.1.cheby_coeffs": (1, 2, 3)})
    assert ranks(model, "named") == {"layers.0": (3, 2, 2), "layers.1": (1, 2, 3)}
    assert model.peft_config["named"].rank_pattern == {"layers.0": (3, 2, 2), "layers.1": (1, 2, 3)}
    assert model.peft_config["named"].r is None


def by_hand(kind, tensors, weights, density):
    """What the pruning rules leave of dense updates, entry by entry."""
    kept = []
    for tensor in tensors:
        if kind.startswith("dare"):
            mask = torch.bernoulli(torch.full_like(tensor, density))
            kept.append(tensor * mask / density)
        else:
            smallest = tensor.abs().flatten().sort(descending=True).values[int(density * tensor.numel()) - 1]
            kept.append(torch.where(tensor.abs() >= smallest, tensor, 0))
    if not kind.endswith("ties"):
        return sum(w * t for w, t in zip(weights, kept, strict=True))
    elected = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agreeing = [t.sign() == elected for t in kept]
    total = sum(w * t * m for w, t, m in zip(weights, kept, agreeing, strict=True))
    return total / sum(m.double() for m in agreeing).clamp(min=1)


@pytest.mark.parametrize("suffix", ["", "_svd"])
@pytest.mark.parametrize("kind", PRUNED)
def test_pruning_rules_act_on_the_dense_updates(kind, suffix):
    model = adapted(ChebyKAN([5, 6, 4]).double())
    tensors = {name: [updates(model, adapter)[name] for adapter in NAMES] for name in lotra_layers(model)}
    torch.manual_seed(5)
    expected = {name: by_hand(kind, pair, (0.6, -1.5), 0.4) for name, pair in tensors.items()}
    torch.manual_seed(5)
    errors = model.add_weighted_adapter(NAMES, [0.6, -1.5], "all", kind + suffix, 6, density=0.4)
    total = updates(model, "all")
    for name, update in expected.items():
        assert_different(update, 0.6 * tensors[name][0] - 1.5 * tensors[name][1])
        assert_equal(total[name], update, 1e-6)
    assert max(errors.values()) < within(1e-12)
    cut = model.add_weighted_adapter(NAMES, [0.6, -1.5], "cut", kind + suffix, 2, density=0.4)
    assert min(cut.values()) > 0.01


def test_the_majority_counts_or_weighs():
    model = adapted(ChebyKAN([5, 6]), ranks=(5, 5))
    for name, method in (("weighs", "total"), ("counts", "frequency")):
        model.add_weighted_adapter(
            ["one", "two", "two"], [1, 1, 1], name, "ties", 6, density=0.9, majority_sign_method=method
        )
    assert_different(updates(model, "weighs")["layers.0"], updates(model, "counts")["layers.0"])


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_save_and_load(kind, tmp_path):
    base, x = ChebyKAN([5, 6, 4, 3]), torch.randn(7, 5)
    model = adapted(copy.deepcopy(base), exclude_modules=["layers.2"], ranks=(1, 2))
    model.add_weighted_adapter(NAMES, [1, 1], "sum", kind)
    assert model.active_adapters == ["one"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if not name.endswith(".one"))
    model.set_adapter("sum")
    y = model(x).detach()
    assert_different(y, base(x))
    assert [name for name, p in model.named_parameters() if p.requires_grad][0].endswith("lotra_core.sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    assert_equal(loaded(x), y, 0)
    model.set_adapter("one")
    model.delete_adapter("sum")
    assert list(model.peft_config) == NAMES


def test_adapters_on_different_layers(tmp_path):
    base = ChebyKAN([5, 6, 4])
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, target_modules=["layers.0"]), adapter_name="one")
    model.add_adapter("two", LoTRAConfig(r=1, target_modules=["layers.1"]))
    for name in NAMES:
        randomize(model, name)
    for kind, rest in {"cat": {}, "svd": {}, "ties": {"density": 1}}.items():
        with pytest.warns(UserWarning, match="no pruning") if rest else nullcontext():
            model.add_weighted_adapter(NAMES, [1, -2], kind, kind, **rest)
        assert ranks(model, kind) == {"layers.0": (2, 2, 2), "layers.1": (1, 1, 1)}
        assert_equal(updates(model, kind)["layers.0"], updates(model, "one")["layers.0"])
        assert_equal(updates(model, kind)["layers.1"], -2 * updates(model, "two")["layers.1"])
    assert model.peft_config["cat"].target_modules == {"layers.0", "layers.1"}


@pytest.mark.parametrize(
    ("layer", "coefficients"),
    [
        (
            lambda: TwoTensorKANLayer(3, 2),
            {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"},
        ),
        (lambda: PackedKANLayer(3, 2, 6), {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, :18"}}),
        (
            lambda: GroupedPolyConvKANLayer(4, 6, groups=2),
            {"poly_weights": {"layout": "g o (d i) h w", "sizes": {"d": 4}}},
        ),
    ],
    ids=["two tensors", "packed", "convolution"],
)  # fmt: skip
def test_any_layout(layer, coefficients):
    model = adapted(nn.Sequential(layer()).double(), coefficients=coefficients)
    full = {name: layer.spec.layout.canonical_shape[:3] for name, layer in adapted_tensors(model).items()}
    pruned = {"svd_rank": full, "density": 0.5}
    for kind, rest in {"cat": {}, "svd": {"svd_rank": full}, "magnitude_prune": pruned}.items():
        model.add_weighted_adapter(NAMES, [0.5, 2], kind, kind, **rest)
        for name, layer in lotra_layers(model).items():
            a, b = layer.get_delta_weight("one"), layer.get_delta_weight("two")
            if kind == "magnitude_prune":
                size = math.prod(layer.spec.layout.canonical_shape) // 2
                a, b = (t * (t.abs() >= t.abs().flatten().topk(size).values[-1]) for t in (a, b))
            assert_different(a, b)
            assert_equal(layer.get_delta_weight(kind), 0.5 * a + 2 * b, 1e-6), name


def test_scale_in_use_counts_and_16_bit_factors():
    base = ChebyKAN([5, 6, 4]).bfloat16()
    model = get_peft_model(base, LoTRAConfig(r=2), adapter_name="one", autocast_adapter_dtype=False)
    randomize(model, "one")
    assert lotra_layers(model)["layers.0"].lotra_core["one"].dtype == torch.bfloat16
    model.add_weighted_adapter(["one"], [-0.5], "mean", "cat")
    for layer in lotra_layers(model).values():
        mean, one = (layer.tucker(name).map(torch.Tensor.double).dense() for name in ("mean", "one"))
        assert layer.lotra_core["mean"].dtype == torch.float32
        assert_equal(mean, -0.5 * one)  # a half is exact in bfloat16, too


def test_arguments():
    model = adapted(ChebyKAN([5, 6, 4]))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def refused(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*args, **kwargs)
        assert list(model.peft_config) == NAMES
        assert model.state_dict().keys() == before.keys()

    refused(r"`adapters` names \['c'\], which .* the model has \['one', 'two'\]", ["one", "c"], [1, 1], "new")
    refused("`adapters` should be a list of at least one adapter name but is 'one'", "one", [1, 1], "new")
    refused("`adapters` should be a list of at least one", [], [], "new")
    refused("`weights` should be one number for each of", NAMES, [1], "new")
    refused(r"`weights` should be finite numbers but \[nan\]", NAMES, [1, math.nan], "new")
    refused(r"`weights` should be finite numbers but \['1'\]", NAMES, [1, "1"], "new")
    refused("`adapter_name` 'two' exists already: choose another, or call `delete_adapter`", NAMES, [1, 1], "two")
    refused("`combination_type` should be one of .* but the value passed is 'sum'", ["one"], [1], "new", "sum")
    refused("`density` 0.5 with `combination_type` 'svd', which prunes nothing", ["one"], [1], "new", density=0.5)
    refused(r"`density` should be a number in \(0, 1\] for `combination_type` 'ties'", ["one"], [1], "new", "ties")
    refused("`density` should be .* but is 0", ["one"], [1], "new", "ties_svd", density=0)
    refused("`majority_sign_method` should be", ["one"], [1], "new", "ties", density=0.5, majority_sign_method="most")
    refused("`svd_rank` 4 with `combination_type` 'cat', where the ranks add up", ["one"], [1], "new", "cat", 4)
    refused("`svd_rank` should be a positive integer value", ["one"], [1], "new", "svd", 0)
    refused(r"`svd_rank` names \['layers.7'\]", ["one"], [1], "new", "svd", {"layers.7": 2})
    too_high = {"layers.0.cheby_coeffs": 9}
    refused(r"`rank_pattern` gives .* the ranks \(9, 9, 9\)", ["one"], [1], "new", "svd", too_high)
    lotra_layers(model)["layers.1"].lotra_U1["two"].data[0, 0] = math.nan
    refused("the adapter 'two' has NaN or infinity at layers.1.cheby_coeffs", NAMES, [1, 1], "new")
    model.add_weighted_adapter(["one"], [1], "new")  # the broken one is not among them


class EmbeddedKAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.kan, self.head = nn.Embedding(7, 3), ChebyKAN([3, 4]), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.kan(self.emb(x)))


@pytest.mark.parametrize("trained", [{"modules_to_save": ["head"]}, {"trainable_token_indices": {"emb": [1, 2]}}])
def test_trained_copies_come_from_the_one_adapter_that_has_them(trained, tmp_path):
    base, x = EmbeddedKAN(), torch.arange(7)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=1), adapter_name="one")
    model.add_adapter("two", LoTRAConfig(r=1, **trained))
    for name, p in model.named_parameters():
        if "two" in name:
            nn.init.normal_(p)
    model.set_adapter("two")
    y = model(x)
    model.add_weighted_adapter(NAMES, [1, 1], "sum", "cat")
    model.set_adapter("sum")
    assert_equal(model(x), y)  # the update of "one" is zero
    assert_different(y, base(x))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert_equal(PeftModel.from_pretrained(base, tmp_path / "sum")(x), model(x), 0)
    model.add_adapter("three", LoTRAConfig(r=1, **trained))
    with pytest.raises(ValueError, match="at most one of"):
        model.add_weighted_adapter(["two", "three"], [1, 1], "both")


def test_trained_tokens_of_several_adapters():
    model = get_peft_model(EmbeddedKAN(), LoTRAConfig(r=1, trainable_token_indices={"emb": [1]}), adapter_name="one")
    model.base_model.peft_config["two"] = LoTRAConfig(r=1, trainable_token_indices={"other": [1]})
    with pytest.raises(ValueError, match="have `trainable_token_indices`: at most one"):
        model.add_weighted_adapter(NAMES, [1, 1], "both")


def test_a_failed_injection_leaves_nothing(monkeypatch):
    model = adapted(ChebyKAN([5, 6, 4]))
    monkeypatch.setattr(
        model.base_model, "_prepare_model", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory"))
    )
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_weighted_adapter(NAMES, [1, 1], "new")
    assert list(model.peft_config) == NAMES


def test_large_layers_never_become_dense():
    torch.manual_seed(0)
    base = nn.Sequential(ChebyKAN([96, 96]))
    model = adapted(base, ranks=(4, 4))
    shapes = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                shapes.append(result.numel())
            return result

    with Seen():
        combine_adapters(model.base_model.model, model.peft_config, NAMES, [1, 1], "svd", 4, None, "total")
    assert max(shapes) < 96 * 96
