"""A plugin for pytest that runs PEFT's own tests on LoTRA: PEFT's rows for LoRA, read as rows for LoTRA.

Where a test module of PEFT's has been imported, it finds under the name `LoraConfig` a config of LoTRA that reads
LoRA's fields, and its models get KAN layers where they make linear ones. Of every table, the rows that are
about LoRA and need nothing that only LoRA has are kept. With `LOTRA_SUITE=LoRA` the same rows run on LoRA and on the
models as they are, to compare with. Outcomes are written to the file `LOTRA_SUITE_OUTCOMES`, with the numbers of rows
and of tests that were dropped.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import peft
import pytest
import torch
from torch import nn

from peft_lotra import LoTRAConfig, register_kan_layer

ON_LOTRA = os.environ.get("LOTRA_SUITE") != "LoRA"
MODELS = ("MLP", "MLP2", "MLP_LayerNorm", "EmbConv1D")
READ = {"r", "lora_alpha", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save", "task_type"}
READ |= {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "inference_mode"}
READ |= {"trainable_token_indices", "base_model_name_or_path", "revision", "bias"}


def is_read(fields):
    """Whether LoTRA has what these fields of a LoraConfig say."""
    default = peft.LoraConfig()
    changed = {key: value for key, value in fields.items() if value != getattr(default, key, None)}
    targets = str(changed.get("target_modules"))
    known = not any(name in targets for name in ("emb", "mha", "conv2d", "conv3d"))
    return known and set(changed) <= READ and changed.get("init_lora_weights", False) is False


class LoraConfig(LoTRAConfig):
    """LoRA's fields for a LoTRA adapter: one rank for all modes, at most 3, and alpha = lora_alpha / r."""

    target_parameters = None

    def __init__(self, *args, **fields):
        if args or set(fields) != set(LoTRAConfig.__dataclass_fields__):  # not a copy made by `dataclasses.replace`
            given = dict(zip(inspect.signature(peft.LoraConfig).parameters, args, strict=False)) | fields
            if not is_read(given):
                pytest.skip(f"LoTRA has not all of {given}")
            fields = {key: value for key, value in given.items() if key in READ}
            fields.setdefault("r", 8)
            if fields["r"] > 0:
                fields["alpha"] = fields.pop("lora_alpha", 8) / fields["r"]
                fields["r"] = min(fields["r"], 3)  # their smallest model has one layer, with the modes (3, 3, 3)
            fields["rank_pattern"] = {key: min(r, 3) for key, r in fields.get("rank_pattern", {}).items()}
            fields["init_weights"] = fields.pop("init_lora_weights", True)
            fields["bias"] = fields.get("bias", "none").replace("lora_only", "lotra_only")
        super().__init__(**fields)


class KANLayer(nn.Module):
    """y = Σ_i Σ_d weight[o, (i d)] φ_d(x_i) + bias with φ = (tanh x, sin x, cos x); signature of nn.Linear."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features * 3))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x):
        basis = torch.stack([x.tanh(), x.sin(), x.cos()], dim=-1).flatten(-2)
        return nn.functional.linear(basis, self.weight, self.bias)


register_kan_layer(KANLayer, {"weight": {"layout": "o (i d)", "sizes": {"d": 3}}})


class KANLayersForLinear(ModuleType):
    """torch.nn, with KAN layers for linear ones."""

    Linear = KANLayer

    def __getattr__(self, name):
        return getattr(nn, name)


def translated(value, as_it_is=False):
    """A table's entry with configs of LoTRA for those of LoRA; None if it is about something else.

    Classes become `LoTRAConfig` if `as_it_is`, for tests of what a config class does.
    """
    if isinstance(value, tuple | list):
        parts = [translated(part, as_it_is) for part in value]
        return None if any(new is None and old is not None for new, old in zip(parts, value, strict=True)) else parts
    if isinstance(value, dict):
        return value if is_read(value) else None
    is_config = isinstance(value, peft.PeftConfig) or (isinstance(value, type) and issubclass(value, peft.PeftConfig))
    if not is_config:
        return value
    if value is peft.LoraConfig:
        return (LoraConfig, LoTRAConfig)[as_it_is] if ON_LOTRA else value
    if type(value) is peft.LoraConfig:
        default = vars(peft.LoraConfig())
        given = {key: new for key, new in vars(value).items() if new != default[key]}
        if is_read(given):
            return LoraConfig(**given) if ON_LOTRA else value
    return None


outcomes: dict[str, str] = {}
dropped = {"rows": 0, "tests": 0}


def translate_marks(function):
    for k, mark in enumerate(marks := getattr(function, "pytestmark", ())):
        if mark.name == "parametrize":
            names, rows, *rest = mark.args
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            kept, ids, others = [], [], dict(mark.kwargs)
            for row, label in zip(rows, others.get("ids") or [None] * len(rows), strict=True):
                entry = row.values if hasattr(row, "values") and hasattr(row, "marks") else row
                entry = translated(tuple(entry) if len(names) > 1 else [entry], "config_class" in names)
                if entry is not None and not ("model_id" in names and entry[names.index("model_id")] not in MODELS):
                    kept.append(tuple(entry) if len(names) > 1 else entry[0])
                    ids.append(label)
            dropped["rows"] += len(rows) - len(kept)
            if others.get("ids"):
                others["ids"] = ids
            marks[k] = pytest.mark.parametrize(mark.args[0], kept, *rest, **others).mark


def pytest_collectstart(collector):
    if not isinstance(collector, pytest.Module):
        return
    module = collector.obj
    for value in list(vars(module).values()):
        functions = vars(value).values() if inspect.isclass(value) else [value]
        for function in functions:
            if inspect.isfunction(function):
                translate_marks(function)
    if ON_LOTRA:
        module.nn = KANLayersForLinear("torch.nn")
        module.Conv1D = lambda outputs, inputs: KANLayer(inputs, outputs)
        for other in [m for name, m in sys.modules.items() if name.startswith("tests.")]:
            if getattr(other, "LoraConfig", None) is peft.LoraConfig:
                other.LoraConfig = LoraConfig


LORA_ONLY = re.compile(
    r"nested_config_cls|lora_[AB]|\blora\.|LoraLayer|LoraModel|_register_custom_module|\bclass .*Lora"
)


def pytest_collection_modifyitems(config, items):
    """Keep the tests that make adapters of LoRA's, and name nothing inside them."""
    kept = []
    for item in items:
        source = inspect.getsource(item.function)
        in_table = "config0" in getattr(getattr(item, "callspec", None), "params", ()) or "LoTRAConfig" in item.name
        made = in_table or "LoraConfig" in item.name.split("[")[-1] or re.search(r"\bLoraConfig\(", source)
        if made and not LORA_ONLY.search(source):
            kept.append(item)
    dropped["tests"] = len(items) - len(kept)
    items[:] = kept


def pytest_configure(config):
    # PEFT's helpers import these for tests of other models.
    for name, attribute in {"diffusers": "StableDiffusionPipeline", "datasets": "load_dataset"}.items():
        if name not in sys.modules and find_spec(name) is None:
            stub = ModuleType(name)
            stub.__spec__ = ModuleSpec(name, None)
            setattr(stub, attribute, type(attribute, (), {}))
            sys.modules[name] = stub


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        error = str(report.longrepr).strip().splitlines()[-1:] if report.failed else []
        outcomes.setdefault(report.nodeid.replace("LoTRAConfig", "LoraConfig"), " ".join([report.outcome, *error]))


def pytest_sessionfinish(session):
    if path := os.environ.get("LOTRA_SUITE_OUTCOMES"):
        with open(path, "w") as file:
            json.dump({"dropped": dropped, "outcomes": outcomes}, file)
