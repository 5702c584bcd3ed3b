"""The table of adapted tensors, against what is saved and what requires gradients."""

import doctest
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from kan_layers import ChebyKAN, ChebyKANLayer, KANLinear
from layer_table import MODELS, config, make
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, summary
from peft_lotra.layers.lotra import adapted_tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from chebyshev_kan import ChebyshevKAN


def model_with_biases():
    layers = {"first": KANLinear(3, 4), "norm": nn.LayerNorm(4), "second": ChebyKANLayer(4, 4, 3)}
    model = nn.Sequential(OrderedDict(layers | {"head": nn.Linear(4, 2)}))
    model.first.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_row_for_every_tensor(name):
    base, _ = make(name)
    model = get_peft_model(base, config(name))
    rows = summary(model)
    layers = adapted_tensors(model)
    assert [row.tensor for row in rows] == list(layers)
    for row, layer in zip(rows, layers.values(), strict=True):
        assert (row.adapter, row.layout, row.ranks) == ("default", layer.spec.layout.pattern, layer.r["default"])
        assert row.modes == layer.spec.layout.canonical_shape
    (totals,) = rows.totals.values()
    assert totals[:2] == model.get_nb_trainable_parameters()[:1] * 2
    assert totals[2] == sum(torch.Size(layer.spec.layout.canonical_shape).numel() for layer in layers.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_factors": True},
        {"bias": "all", "modules_to_save": ["head"]},
        {"bias": "lotra_only"},
        {"family": {"lam": (0.0, 1.0)}, "freeze_factors": True},
        {"family": ["a", "b", "c"]},
    ],
)
def test_trained_and_stored_numbers(options, tmp_path):
    model = get_peft_model(model_with_biases(), LoTRAConfig(r=2, **options))
    model.save_pretrained(tmp_path)
    stored = {key: tensor.numel() for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    rows = summary(model)
    assert rows.totals["default"][:2] == (model.get_nb_trainable_parameters()[0], sum(stored.values()))
    besides = {row.tensor: row.stored for row in rows if not row.layout}
    assert besides == {key[len("base_model.model.") :]: size for key, size in stored.items() if "lotra_" not in key}
    assert bool(besides) == ("bias" in options)
    model.requires_grad_(False)  # counted by the config
    assert summary(model) == rows


def test_every_adapter_has_its_rows_wherever_the_model_is():
    model = get_peft_model(ChebyKAN([3, 6, 2], 3), LoTRAConfig(r=2, family={"lam": (0.0, 1.0)}))
    adapter_at(model, "new", lam=0.5)
    model.add_adapter("one layer", LoTRAConfig(r=1, target_modules=["layers.1"]))
    rows = summary(model)
    assert [row.adapter for row in rows] == ["default"] * 2 + ["new"] * 2 + ["one layer"]
    trained, stored, _ = rows.totals["new"]
    assert trained == sum(layer.lotra_core["new"].numel() for layer in adapted_tensors(model, "new").values()) < stored
    assert rows.totals["default"][1] > stored  # a core with one more axis
    assert summary(model.base_model.model) == rows
    around = summary(nn.ModuleDict({"kan": model}))
    assert [row[5:] for row in around] == [row[5:] for row in rows]


def test_it_prints_as_a_table():
    model = get_peft_model(model_with_biases(), LoTRAConfig(r=(2, None, 2), modules_to_save=["head"]))
    lines = str(summary(model)).splitlines()
    assert lines[0].split() == ["adapter", "tensor", "layout", "modes", "ranks", "trained", "stored"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert re.search(r"first\.spline_weight +o i d +\(3, 4, \d\) +\(2, None, 2\)", lines[1])
    assert re.search(r"^default: \d+ trained and \d+ stored numbers for [\d,]+ coefficients$", lines[-1])


def test_the_example_of_the_docstring():
    names = {"get_peft_model": get_peft_model, "LoTRAConfig": LoTRAConfig, "ChebyshevKAN": ChebyshevKAN}
    names |= {"layouts": {"coefficients": "i o d"}, "summary": summary}
    (example,) = doctest.DocTestFinder().find(summary, "summary", globs=names)
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))
    assert example.examples


def test_errors_name_the_way_out():
    with pytest.raises(TypeError, match="`model` should be a torch.nn.Module"):
        summary(LoTRAConfig())
    with pytest.raises(ValueError, match=r"`model`, a Linear, has no LoTRA adapter: pass what `get_peft_model"):
        summary(nn.Linear(2, 2))
