"""A full fine-tune as an adapter."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
from conftest import approx, assert_different, assert_equal, within
from kan_layers import ChebyKAN, PackedKANLayer, TwoTensorKANLayer
from layer_table import LAYERS, MODELS, make
from peft import PeftModel
from torch import nn

from peft_lotra import LoTRAConfig, extract_adapter
from peft_lotra.analysis import coefficient_updates
from peft_lotra.layers.lotra import adapted_tensors


def finetuned(base, names=("coef", "spline_weight", "weight", "cheby_coeffs", "fouriercoeffs", "spline_scaler")):
    """A copy of the model with other coefficients."""
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in names and "base_linear" not in name and "layernorm" not in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_full_ranks_extract_everything(name, tmp_path):
    base, x = make(name)
    full = finetuned(base)
    assert_different(full(x), base(x))
    coefficients = dict(LAYERS[name].coefficients(3))
    ranks = {key: u.shape[:3] for key, u in coefficient_updates(base, full, coefficients).items()}
    model, errors = extract_adapter(
        copy.deepcopy(base), full, LoTRAConfig(coefficients=coefficients, rank_pattern=ranks, alpha=0.5)
    )
    assert set(errors) == set(ranks)
    assert max(errors.values()) < within(1e-10)
    assert_equal(model(x), full(x), 1e-5)  # the adapter itself is fp32, as PEFT's are
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    assert_equal(merged(x), full(x), 1e-5)


def test_errors_are_those_of_the_extracted_update():
    base = ChebyKAN([6, 5, 4])
    full = finetuned(base)
    updates = coefficient_updates(base, full)
    model, errors = extract_adapter(copy.deepcopy(base), full, LoTRAConfig(r=(3, 3, 2)))
    extracted = coefficient_updates(base, model.merge_and_unload())
    for name, update in updates.items():
        error = ((extracted[name] - update).norm() / update.norm()).item()
        assert errors[name] == approx(error, rel=1e-4)
        assert 0.1 < error < 1


def test_the_fit_to_outputs_beats_the_nearest_update():
    """Rank 2 of a full-rank change: far off in coefficients, and after the fit near where the inputs are."""
    base = nn.Sequential(OrderedDict(kan=ChebyKAN([2, 6, 4]), head=nn.Linear(4, 2)))
    full = copy.deepcopy(base)
    for parameter in full.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.rand(200, 2) - 0.5
    config = LoTRAConfig(r=2, modules_to_save=["head"])
    nearest, _ = extract_adapter(copy.deepcopy(base), full, config)
    fitted, errors = extract_adapter(copy.deepcopy(base), full, config, inputs=x, progressbar=False)
    new = torch.rand(200, 2) - 0.5
    off = [(model(new) - full(new)).norm().item() for model in (base, nearest, fitted)]
    assert off[2] < min(off[:2]) / 10
    assert max(errors.values()) > 0.1
    head = fitted.base_model.model.head.modules_to_save["default"]
    assert_equal(head.weight, full.head.weight, 0)
    assert head.weight.requires_grad
    with pytest.raises(ValueError, match="`iterations` should be"):
        extract_adapter(copy.deepcopy(base), full, config, inputs=x, iterations=0)


def test_trainable_and_wrapped_like_any_adapter():
    base = ChebyKAN([3, 2])
    model, _ = extract_adapter(base, finetuned(base), LoTRAConfig(r=1))
    assert model.get_base_model() is base
    assert all(parameter.requires_grad == (".lotra_" in name) for name, parameter in model.named_parameters())


def test_unchanged_layers_and_several_tensors():
    base = nn.Sequential(TwoTensorKANLayer(3, 4), TwoTensorKANLayer(4, 2))
    full = copy.deepcopy(base)
    full[0].cheby_weight.data += torch.randn_like(full[0].cheby_weight)
    layouts = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    model, errors = extract_adapter(copy.deepcopy(base), full, LoTRAConfig(r=4, coefficients=layouts))
    changed = {name for name, layer in adapted_tensors(model).items() if layer.get_delta_weight("default").any()}
    assert changed == {"0.cheby_weight"}
    assert max(errors.values()) < within(1e-10)
    x = torch.randn(5, 3)
    assert_different(full(x), base(x))
    assert_equal(model(x), full(x))


def test_modules_to_save_are_copied(tmp_path):
    base, x = nn.Sequential(OrderedDict(kan=ChebyKAN([3, 4, 2]), head=nn.Linear(2, 2))), torch.randn(5, 3)
    full = copy.deepcopy(base)
    for parameter in full.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with pytest.raises(ValueError, match=re.escape("differ also in ['head.bias', 'head.weight'], which an adapter")):
        extract_adapter(base, full, LoTRAConfig(r=4))
    assert not any("lotra" in name for name, _ in base.named_modules())
    model, _ = extract_adapter(copy.deepcopy(base), full, LoTRAConfig(r=4, modules_to_save=["head"]))
    assert_different(full(x), base(x))
    assert_equal(model(x), full(x))
    model.save_pretrained(tmp_path)
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x), 0)


def test_the_rest_of_a_packed_parameter():
    base = nn.Sequential(PackedKANLayer(3, 2))
    layout = {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, :18"}}
    full = copy.deepcopy(base)
    full[0].weight.data[:, :18] += 1
    extract_adapter(copy.deepcopy(base), full, LoTRAConfig(r=2, coefficients=layout))
    full[0].weight.data[:, 18:] += 1
    with pytest.raises(ValueError, match=re.escape("differ also in ['0.weight']")):
        extract_adapter(base, full, LoTRAConfig(r=2, coefficients=layout))


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (lambda p: p.fill_(float("nan")), {}, "the update of layers.0.cheby_coeffs has NaN or infinity"),
        (lambda p: p.add_(1), {"alpha": 0.0}, "`alpha` is 0 for layers.0.cheby_coeffs"),
        (lambda p: p.add_(1), {"rank_pattern": {"layers.0": 9}}, "above its modes"),
    ],
)
def test_errors_leave_the_base_alone(change, kwargs, message):
    base = ChebyKAN([3, 4, 2])
    full = copy.deepcopy(base)
    change(full.layers[0].cheby_coeffs.data)
    with pytest.raises(ValueError, match=message):
        extract_adapter(base, full, LoTRAConfig(r=1, **kwargs))
    assert not any("lotra" in name for name, _ in base.named_modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
