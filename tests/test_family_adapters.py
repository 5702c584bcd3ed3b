"""Adapters for single tasks of a family, and families that grow."""

import copy
import math
import os
import re
import warnings

import pytest
import torch
from adapted_layers import First
from conftest import approx, assert_different, assert_equal, within
from family_models import LAM, X, at, fill, kan, polynomials
from kan_layers import ChebyKAN
from layer_table import LAYERS
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    adapter_at,
    add_task,
    at_task,
    change_range,
    family_from,
    fit_gauss_newton,
    hotswap_adapter,
    load_task,
    save_task,
)
from peft_lotra.layers.lotra import adapted_tensors

# Adapters for one task -----------------------------------------------------------------------------------------------


def test_an_adapter_at_a_task_is_the_family_there_and_its_core_is_trained(tmp_path):
    base, model = kan(alpha=0.7)
    expected = at(base, model, polynomials(1.35))(X)
    adapter_at(model, "lam_1_35", lam=1.35)
    assert model.active_adapter == "lam_1_35"
    assert_equal(model(X), expected)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lotra_core"}
    result = fit_gauss_newton(
        model, lambda net, x: net(x) - x.sum(-1, keepdim=True), X, iterations=3, progressbar=False
    )
    assert result.losses[-1] < result.losses[0]
    model.save_pretrained(tmp_path, selected_adapters=["lam_1_35"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lam_1_35")
    assert_equal(loaded(X), model(X))
    assert_equal(loaded.merge_and_unload()(X), model(X))


def test_all_of_it_is_trained_if_asked_for_and_the_mean_core_is_a_start():
    base, model = kan()
    adapter_at(model, "mean", train="all")
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith(".mean"))
    assert_equal(model(X), at(base, model, torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))(X))


def test_tasks_of_one_family_are_swapped_and_served_together(tmp_path):
    base, model = kan()
    low, high = (at(base, model, polynomials(lam))(X) for lam in (1.1, 1.5))
    for name, lam in {"low": 1.1, "high": 1.5}.items():
        adapter_at(model, name, lam=lam)
    model.eval()
    y = model(X, adapter_names=["low", "high"] * 4)
    assert_equal(y[::2], low[::2])
    assert_equal(y[1::2], high[1::2])
    model.save_pretrained(tmp_path, selected_adapters=["high"])
    model.set_adapter("low")
    hotswap_adapter(model, tmp_path / "high", adapter_name="low")
    assert_equal(model(X), high)


@pytest.mark.usefixtures("fp32")
def test_a_task_is_a_small_file_beside_the_family(tmp_path):
    torch.manual_seed(0)
    base = ChebyKAN([2, 32, 32, 1])
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=(6, 6, None), family=LAM))
    fill(model)
    model.save_pretrained(tmp_path / "family")
    adapter_at(model, "new", lam=1.3)
    for layer in adapted_tensors(model).values():
        nn.init.normal_(layer.lotra_core["new"])
    save_task(tmp_path / "task.safetensors", model, "new")
    assert os.path.getsize(tmp_path / "task.safetensors") <= 2048
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "family")
    load_task(tmp_path / "task.safetensors", loaded, "again")
    x = torch.rand(4, 2)
    assert_equal(loaded(x), model(x), 0)
    _, other = kan()
    with pytest.raises(ValueError, match="is for another state of 'default', or another family"):
        load_task(tmp_path / "task.safetensors", other, "again")
    lotra = adapted_tensors(model)
    next(iter(lotra.values())).lotra_U2["new"].data += 1
    with pytest.raises(ValueError, match="`name` 'new' has other factors than 'default'"):
        save_task(tmp_path / "task.safetensors", model, "new")


def test_merging_takes_the_update_at_the_task():
    base, model = kan()
    expected = at(base, model, polynomials(1.2))(X)
    with pytest.raises(RuntimeError, match="is for a family of tasks"):
        copy.deepcopy(model).merge_and_unload()
    with at_task(model, lam=1.2):
        merged = model.merge_and_unload()
    assert_equal(merged(X), expected)


# Families that grow --------------------------------------------------------------------------------------------------


def separate(tasks, r=2, **kwargs):
    """A base, a family, and adapters of it at some tasks under names of their own."""
    base, model = kan(r=r, **kwargs)
    for name, task in tasks.items():
        adapter_at(model, name, **task)
    return base, model


@pytest.mark.parametrize("r", [2, (None, 2, None)])
def test_a_family_is_found_again_in_its_members(r):
    """Five members determine a family of degree 4, whose factors they share."""
    values = [1.0, 1.15, 1.3, 1.45, 1.6]
    base, model = separate({f"a{k}": {"lam": value} for k, value in enumerate(values)}, r=r, alpha=0.7)
    expected = copy.deepcopy(model)
    expected.set_adapter("default")
    config = LoTRAConfig(r=r, family=LAM, alpha=-2.0)
    errors = family_from(model, {f"a{k}": value for k, value in enumerate(values)}, "again", config)
    assert max(errors.values()) < within(1e-8)
    for value in (1.05, 1.37):
        with at_task(model, lam=value), at_task(expected, lam=value):
            assert_equal(model(X), expected(X), 1e-7)
            assert_different(model(X), base(X))


def test_what_a_family_cannot_hold_is_said():
    base, model = separate({"first": {"lam": 1.0}, "second": {"lam": 1.6}})
    config = LoTRAConfig(r=1, family=LAM, family_degree=1)
    errors = family_from(model, {"first": {"lam": 1.0}, "second": {"lam": 1.6}}, "small", config)
    for parameter, layer in adapted_tensors(model).items():
        found = []
        for name, lam in {"first": 1.0, "second": 1.6}.items():
            wanted = layer.get_delta_weight(name)
            with at_task(model, lam=lam):
                found.append((layer.get_delta_weight("small") - wanted, wanted))
        miss, size = (torch.stack(parts).norm() for parts in zip(*found, strict=True))
        assert 0.05 < (miss / size).item() == approx(errors[parameter])


def test_a_family_of_convolutions_from_its_members():
    row = LAYERS["convolution"]
    base = First(row.make().double())
    config = LoTRAConfig(r=(2, 2, None, 3), coefficients=row.declared)
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("other", config)
    fill(model)
    family = LoTRAConfig(r=(4, 4, None, 6), family=["one", "two"], coefficients=row.declared)
    errors = family_from(model, {"default": "one", "other": "two"}, "both", family)
    assert max(errors.values()) < within(1e-8)
    x = row.sample(torch.float64)
    for name, task in {"default": "one", "other": "two"}.items():
        model.set_adapter(name)
        y = model(x)
        assert_different(y, base(x))
        model.set_adapter("both")
        with at_task(model, task=task):
            assert_equal(model(x), y, 1e-7)


def test_a_task_is_added(tmp_path):
    base, model = kan(family=["a", "b"])
    with at_task(model, task="b"):
        expected = model(X)
    add_task(model, "c", core_from="b")
    add_task(model, "mean")
    for task in ("b", "c"):
        with at_task(model, task=task):
            assert_equal(model(X), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with at_task(loaded, task="c"):
        assert_equal(loaded(X), expected, 0)
    for wrong in ({"task": "a"}, {"task": "d", "core_from": "e"}):
        with pytest.raises(ValueError, match="`task` should be a new name|is not one of the family's tasks"):
            add_task(model, **wrong)
    with pytest.raises(ValueError, match="is not a family of named tasks"):
        add_task(kan()[1], "c")


def test_errors_of_families_from_adapters():
    base, model = separate({"first": {"lam": 1.0}})
    config = LoTRAConfig(r=2, family=LAM)
    for adapters, name, given, message in [
        ({}, "new", config, "`adapters` should map names of adapters to tasks"),
        ({"first": 1.0}, "new", LoTRAConfig(r=2), "`config` has no `family`"),
        ({"default": 1.0}, "new", config, "`adapters` has 'default', which is for a family itself"),
        ({"first": 1.0}, "first", config, "`adapter_name` 'first' exists already"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            family_from(model, adapters, name, given)
    assert set(model.peft_config) == {"default", "first"}


# Other ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [None, 4, 6])
@pytest.mark.parametrize("ends", [(0.8, 2.0), (1.1, 1.3), (1.0, 1.6), (-3, -1)])
def test_a_family_on_another_range_is_the_same_family(ends, degree, tmp_path):
    base, model = kan(alpha=0.7)
    old = copy.deepcopy(model)
    change_range(model, {"lam": ends}, family_degree=degree)
    assert model.peft_config["default"].family == {"lam": [float(end) for end in ends]}
    for layer in adapted_tensors(model).values():
        assert layer.lotra_core["default"].shape[-1] == (degree or 4) + 1
        assert layer.lotra_core["default"].requires_grad
    values = torch.linspace(0.9, 2.1, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`lam` is outside of the family's range")
        with at_task(model, lam=values), at_task(old, lam=values):
            # Far from the old range, numbers of the size of T_4(x) cancel.
            assert_equal(model(X), old(X), 1e-12 if ends[0] > 0 else 1e-8)
            assert_different(model(X), base(X))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert_equal(loaded(X, lotra_task=values), model(X, lotra_task=values), 0)


@pytest.mark.parametrize("degree", [None, 3, 5])
@pytest.mark.parametrize("ranges", [{"lam": (0.8, 2.0)}, {"mu": (-1, 1)}, {"mu": (0, 4), "lam": (1.2, 1.3)}, {}])
def test_a_family_of_two_parameters_on_other_ranges(ranges, degree):
    _, model = kan(family={"mu": (0.0, 2.0), **LAM}, family_degree=3)
    old = copy.deepcopy(model)
    change_range(model, ranges, family_degree=degree)
    assert adapted_tensors(model)["layers.0.cheby_coeffs"].terms["default"] == math.comb((degree or 3) + 2, 2)
    lam, mu = torch.linspace(1.0, 1.6, 8, dtype=torch.float64), torch.linspace(2, 0, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(lam|mu)` is outside of the family's range")
        assert_equal(model(X, lotra_task={"lam": lam, "mu": mu}), old(X, lotra_task={"lam": lam, "mu": mu}), 1e-11)


def test_a_family_of_convolutions_on_another_range_is_fitted_further():
    row = LAYERS["convolution"]
    config = LoTRAConfig(r=(2, 2, None, 3), family=LAM, coefficients=row.declared)
    model = get_peft_model(First(row.make().double()), config)
    fill(model)
    x = row.sample(torch.float64)
    expected = model(x, lotra_task=1.4)
    change_range(model, {"lam": (1.0, 2.0)}, family_degree=5)
    assert_equal(model(x, lotra_task=1.4), expected, 1e-12)
    before = model(x, lotra_task=1.9).square().mean()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before.backward()
    optimizer.step()
    assert model(x, lotra_task=1.9).square().mean() < before


@pytest.mark.parametrize(
    ("ranges", "kwargs", "error", "message"),
    [
        (
            {"mu": (0, 1)},
            {},
            ValueError,
            "`ranges` should map some of ['lam'] to new ranges, but is {'mu': (0, 1)}",
        ),
        ((0, 1), {}, ValueError, "`ranges` should map some of ['lam'] to new ranges, but is (0, 1)"),
        ({"lam": 3}, {}, TypeError, "`ranges` should map names of parameters to ranges"),
        ({"lam": (2, 1)}, {}, ValueError, "`ranges` gives 'lam' the range (2, 1), whose ends are not in order"),
        ({}, {"family_degree": 3}, ValueError, "`family_degree` 3 is below the family's degree 4, so it cannot hold"),
        ({}, {"family_degree": 4.5}, ValueError, "`family_degree` should be a positive integer"),
        ({}, {"family": "other"}, ValueError, "`adapter_name` 'other' does not exist"),
    ],
)
def test_errors_of_other_ranges(ranges, kwargs, error, message):
    _, model = kan()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        change_range(model, ranges, **kwargs)
    assert model.peft_config["default"].family == {"lam": [1.0, 1.6]}
    for name, value in model.state_dict().items():
        assert_equal(value, before[name], 0)


def test_nothing_is_changed_where_a_core_is_elsewhere():
    for family, change in [
        (LAM, lambda net: change_range(net, {"lam": (0, 2)})),
        (["a"], lambda net: add_task(net, "b")),
    ]:
        _, model = kan(family=family)
        *_, last = adapted_tensors(model).values()
        last.lotra_core["default"] = nn.Parameter(last.lotra_core["default"].to("meta"))
        with pytest.raises(ValueError, match=r"`family` 'default' is offloaded at \['layers.1.*before offloading"):
            change(model)
        assert len(model.peft_config["default"].family) == 1
        assert {layer.terms["default"] for layer in adapted_tensors(model).values()} == {5 if family is LAM else 1}


def test_named_tasks_have_no_range():
    with pytest.raises(ValueError, match="`family` 'default' is not a family of continuous parameters"):
        change_range(kan(family=["a", "b"])[1], {"lam": (0, 1)})
