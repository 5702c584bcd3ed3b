"""Families beside other adapters, other families and other models, and in files."""

import copy
import re

import pytest
import torch
from conftest import FULLGRAPH, assert_different, assert_equal, within
from family_models import LAM, X, at, fill, kan, polynomials
from kan_layers import ChebyKAN
from layer_table import LAYERS, lotra_layers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, at_task, family_from, hotswap_adapter
from peft_lotra.layers.lotra import adapted_tensors

VALUES = torch.linspace(1, 1.6, 8, dtype=torch.float64)


def test_the_order_of_parameters_is_that_of_the_file(tmp_path):
    """A saved config has them sorted."""
    base, model = kan(family={"mu": (0.0, 2.0), "lam": (1.0, 1.6)}, family_degree=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with at_task(model, lam=1.2, mu=0.5), at_task(loaded, lam=1.2, mu=0.5):
        assert_equal(loaded(X), model(X), 0)


def test_parameters_of_which_one_is_the_same_for_all_samples():
    base, model = kan(family={"lam": (1.0, 1.6), "mu": (0.0, 2.0)}, family_degree=2)
    with at_task(model, lam=torch.tensor([1.3], dtype=torch.float64), mu=VALUES):
        y = model(X)
    with at_task(model, lam=torch.full((8,), 1.3, dtype=torch.float64), mu=VALUES):
        assert_equal(y, model(X))


def test_models_have_tasks_of_their_own():
    base, first = kan()
    _, second = kan(r=1)
    with at_task(first, lam=1.2), at_task(second, lam=1.5):
        assert_equal(first(X), at(base, first, polynomials(1.2))(X))
        assert_equal(second(X), at(base, second, polynomials(1.5))(X))
    with at_task(first, lam=1.2), pytest.raises(RuntimeError, match="this pass is at none of them"):
        second(X)


@pytest.mark.parametrize("r", [2, (2, None, 2), (None, None, None)])
@pytest.mark.parametrize("name", ["efficient-kan", "fast-kan", "i o d", "convolution"])
def test_a_family_beside_an_ordinary_adapter(name, r):
    row = LAYERS[name]
    base = nn.Sequential(row.make()).double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=r, family=LAM, coefficients=row.declared))
    model.add_adapter("other", LoTRAConfig(r=2, coefficients=row.declared))
    fill(model)
    model.base_model.set_adapter(["default", "other"])
    x = row.sample(torch.float64)
    lam = torch.linspace(1, 1.6, len(x), dtype=torch.float64)
    with at_task(model, lam=lam):
        y = model(x)
    for k, value in enumerate(lam):
        with at_task(model, lam=value):
            assert_equal(y[k], model(x)[k])


def test_a_mixed_batch_with_a_family():
    base, model = kan(r=(2, None, 2))
    model.add_adapter("other", LoTRAConfig(r=2))
    fill(model)
    model.eval()
    names = ["default", "other", "__base__", "default"] * 2
    with at_task(model, lam=VALUES):
        y = model(X, adapter_names=names)
        model.set_adapter("default")
        whole = model(X)
        model.set_adapter("other")
        others = model(X)
    expected = {"default": whole, "other": others, "__base__": base(X)}
    assert_equal(y, torch.stack([expected[name][k] for k, name in enumerate(names)]))


def test_a_mixed_batch_of_a_family_where_samples_cannot_be_told_apart():
    row = LAYERS["convolution"]
    model = get_peft_model(nn.Sequential(row.make()).double(), LoTRAConfig(r=2, family=LAM, coefficients=row.declared))
    model.add_adapter("other", LoTRAConfig(r=2, coefficients=row.declared))
    fill(model)
    model.eval()
    x = row.sample(torch.float64)
    names = (["default", "other"] * len(x))[: len(x)]
    for lam in (torch.tensor(1.3), torch.linspace(1, 1.6, len(x), dtype=torch.float64)):
        with at_task(model, lam=lam):
            expected = model(x)
            y = model(x, adapter_names=names)
        model.set_adapter("other")
        expected[1::2] = model(x)[1::2]
        assert_equal(y, expected)
        assert_equal(model(x, adapter_names=names, lotra_task=lam), expected)
        model.set_adapter("default")


def test_a_family_of_one_task_and_two_families_of_named_tasks():
    base, model = kan(family=["only"])
    with at_task(model, task=["only"] * 8):
        y = model(X)
    with at_task(model, task="only"):
        assert_equal(y, model(X))
    assert_different(y, base(X))
    model.add_adapter("second", LoTRAConfig(r=2, family=["c", "d"]))
    fill(model)
    model.set_adapter("second")
    with at_task(model, task="c"):
        assert_different(model(X), base(X))
    with pytest.raises(
        ValueError, match=re.escape("`task` 'e' is not one of the family's tasks ['only']; `task` 'e'")
    ):
        with at_task(model, task="e"):
            pass


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan, self.head = ChebyKAN([3, 6, 4]), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.kan(x))


def test_an_adapter_at_a_task_has_the_familys_trained_copies(tmp_path):
    base = Headed().double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, family=LAM, modules_to_save=["head"]))
    fill(model)
    nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    with at_task(model, lam=1.3):
        y = model(X)
    adapter_at(model, "task", lam=1.3)
    assert_equal(model(X), y)
    model.save_pretrained(tmp_path, selected_adapters=["task"])
    assert_equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "task")(X), y)
    biased = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, family=LAM, bias="all"))
    with pytest.raises(ValueError, match="`family` 'default' has `bias` 'all'"):
        adapter_at(biased, "task", lam=1.3)


@pytest.mark.parametrize("r", [2, (2, 2, None), (2, 2, None, 3)])
@pytest.mark.parametrize("name", ["ChebyKAN", "convolution"])
def test_a_family_is_swapped_for_another_of_its_kind(name, r, tmp_path):
    if name == "ChebyKAN" and r != 2 and len(r) > 3:
        pytest.skip("it has no positions")
    row = LAYERS[name]
    base = nn.Sequential(row.make()).double()
    x = row.sample(torch.float64)
    models = []
    for ranks in (r, (2, 2, None)):
        model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=ranks, family=LAM, coefficients=row.declared))
        for layer in adapted_tensors(model).values():
            for core in layer.lotra_core.values():
                nn.init.normal_(core)
        models.append(model)
    new, slot = models
    new.save_pretrained(tmp_path)
    hotswap_adapter(slot, tmp_path)
    with at_task(slot, lam=1.3), at_task(new, lam=1.3):
        assert_equal(slot(x), new(x))
    other = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, family={"mu": (0, 1)}, coefficients=row.declared))
    with pytest.raises(ValueError, match="only adapters with the same `family` can be swapped"):
        hotswap_adapter(other, tmp_path)


def test_a_family_with_a_rank_of_positions_above_what_updates_span():
    row = LAYERS["convolution"]
    config = LoTRAConfig(r=(1, 1, 1, 1), coefficients=row.declared)
    model = get_peft_model(nn.Sequential(row.make()).double(), config)
    fill(model)
    family = LoTRAConfig(r=(2, 2, 2, 4), family=["one"], coefficients=row.declared)
    errors = family_from(model, {"default": "one"}, "both", family)
    assert max(errors.values()) < within(1e-8)


def test_nothing_is_merged_if_a_family_is_at_no_task():
    base, model = kan()
    model.add_adapter("other", LoTRAConfig(r=1))
    model.base_model.set_adapter(["other", "default"])
    with pytest.raises(RuntimeError, match="this pass is at none of them"):
        model.merge_adapter()
    assert not any(layer.merged for layer in lotra_layers(model).values())
    with at_task(model, lam=VALUES), pytest.raises(Exception, match="give one task"):
        model.merge_adapter()
    assert not any(layer.merged for layer in lotra_layers(model).values())
    assert_equal(model.unload()(X), base(X), 0)


def test_budgets_of_cores_alone_and_of_families_of_small_kans():
    model = get_peft_model(ChebyKAN([1, 5, 1]), LoTRAConfig(compression_ratio=0.05, freeze_factors=True))
    assert model.get_nb_trainable_parameters()[0] == 2
    model = get_peft_model(ChebyKAN([1, 5, 1]), LoTRAConfig(compression_ratio=0.9, family=LAM))
    assert model.get_nb_trainable_parameters()[0] <= 36


def test_names_that_cannot_be_parameters():
    with pytest.raises(
        ValueError, match=re.escape("`family` names ['train'], which cannot be an argument of `at_task`")
    ):
        LoTRAConfig(r=2, family={"train": (0, 1)})


class AtTask(nn.Module):
    """A family whose task is an input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, lam):
        with at_task(self.model, lam=lam):
            return self.model(x)


@pytest.mark.slow
@pytest.mark.skipif(not FULLGRAPH, reason="before torch 2.13, adapted layers are not traced")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:While compiling:UserWarning")  # which entries of dicts the graph reads
@pytest.mark.parametrize(("strict", "each"), [(True, True), (True, False), (False, False)])
def test_exports_have_an_open_batch(strict, each):
    base, model = kan(r=(2, None, 2))
    batch = torch.export.Dim("batch", min=2, max=64)
    lam = VALUES if each else torch.tensor(1.2, dtype=torch.float64)
    sizes = ({0: batch}, {0: batch} if each else None)
    exported = torch.export.export(AtTask(model.eval()), (X, lam), dynamic_shapes=sizes, strict=strict).module()
    for count in (8, 3):
        x, own = X[:count], lam.flip(0)[:count] if each else lam + 0.1
        with at_task(model, lam=own):
            assert_equal(exported(x, own), model(x))
