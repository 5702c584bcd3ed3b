"""The methods that are compared: each makes part of a model trainable, at a budget of parameters if it has one."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from objectives import Objective
from peft import LoraConfig, get_peft_model
from tasks import Task
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer, initialize_lotra_weights
from peft_lotra.analysis import effective_coefficients

Settings = Mapping[str, Any]
INITIALISATIONS = ("random", "gradient_hosvd")
GRADIENT_BATCHES = 4  # from which the gradient of an initialisation is taken
HIGHEST_RANK = 64  # that is tried for PEFT's LoRA

# Settings that every method may have.
COMMON = ("method", "optimizer", "weight_decay", "lr", "steps")
RANKS = ("ratio", "r")
FROM_SCRATCH = ("scratch",)  # methods that use no base
# By name: where the class is. Levenberg–Marquardt is `fit_gauss_newton`, L-BFGS that of torch.
FIRST_ORDER = {"adam": "torch.optim:Adam", "soap": "pytorch_optimizer:SOAP"}
WITHOUT_RATE = ("lm", "lbfgs")
OPTIMIZERS = (*FIRST_ORDER, *WITHOUT_RATE)


def check_method(label: str, settings: Settings) -> None:
    """
    Raises:
        ValueError: naming what is allowed, if the settings are not those of a method.
    """
    name = settings.get("method")
    if name not in METHODS:
        raise ValueError(f"{label!r}: `method` should be one of {list(METHODS)} but the value passed is {name!r}")
    own = METHODS[name][1]
    allowed = (*COMMON, *own)
    if unknown := sorted(set(settings) - set(allowed)):
        raise ValueError(f"{label!r}: the method {name!r} should have some of {list(allowed)} but has {unknown}")
    for key, values in {"optimizer": OPTIMIZERS, "init": INITIALISATIONS}.items():
        if settings.get(key, values[0]) not in values:
            raise ValueError(f"{label!r}: `{key}` should be one of {list(values)} but the value is {settings[key]!r}")
    if "weight_decay" in settings and settings.get("optimizer") != "lm":
        raise ValueError(f"{label!r}: `weight_decay` is that of the optimizer 'lm'; the others have none")
    if "ratio" in own and sum(key in settings for key in RANKS) != 1:
        needed = [key for key in RANKS if key in own]
        raise ValueError(f"{label!r}: the method {name!r} needs one of {needed}")


def count_coefficients(model: nn.Module, task: Task) -> int:
    """Of the KAN layers, which a method's ratio refers to."""
    return sum(A.numel() for A in effective_coefficients(model, task.coefficients(model)).values())


def apply_method(model: nn.Module, settings: Settings, task: Task, objective: Objective, seed: int) -> nn.Module:
    """The model with what the method trains made trainable, and nothing else.

    Args:
        model: the trained base, or an untrained model where the method uses no base.
        settings: as in an experiment's file, checked by `check_method`.
        seed: of whatever is drawn.

    Raises:
        ValueError: if the method cannot be applied to this model.
    """
    torch.manual_seed(seed)
    return METHODS[settings["method"]][0](model, settings, task, objective)


def optimizer_of(model: nn.Module, settings: Settings, lr: float) -> torch.optim.Optimizer:
    """The method's optimizer on what is trainable, with its own defaults but without weight decay."""
    module, name = FIRST_ORDER[settings.get("optimizer", "adam")].split(":")
    optimizer_cls = getattr(importlib.import_module(module), name)
    if settings["method"] == "lotra":
        orthonormal = settings.get("orthonormal", False)
        return create_lotra_optimizer(model, optimizer_cls, lr=lr, weight_decay=0.0, orthonormal=orthonormal)
    return optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def _everything(model: nn.Module, *_: Any) -> nn.Module:
    return model


def _lotra(model: nn.Module, settings: Settings, task: Task, objective: Objective) -> nn.Module:
    options = {"r": settings["r"]} if "r" in settings else {"compression_ratio": settings["ratio"]}
    adapted = get_peft_model(model, LoTRAConfig(coefficients=task.coefficients(model), **options))
    method = settings.get("init", "random")
    if method != "random":

        def train_step() -> None:
            for step in range(GRADIENT_BATCHES):
                objective.loss(adapted, step).backward()

        initialize_lotra_weights(adapted, train_step, method=method, progressbar=False)
    return adapted


def _lora_parameters(model: nn.Module, settings: Settings, task: Task, *_: Any) -> nn.Module:
    """PEFT's LoRA on bare parameters: the first axis counts experts, each gets a pair of matrices."""
    budget = settings["ratio"] * count_coefficients(model, task)
    names = list(effective_coefficients(model, task.coefficients(model)))

    def adapted(model: nn.Module, r: int) -> nn.Module:
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=[], target_parameters=names))

    r = 1
    while r < HIGHEST_RANK and trainable(adapted(copy.deepcopy(model), r + 1)) <= budget:
        r += 1
    return adapted(model, r)


def _lora(model: nn.Module, settings: Settings, task: Task, *_: Any) -> nn.Module:
    """PEFT's LoRA on the modules whose weights are coefficients."""
    coefficients = effective_coefficients(model, task.coefficients(model))
    modules = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in coefficients}
    if refused := [name for name, module in modules.items() if not isinstance(module, nn.Linear | nn.Conv2d)]:
        raise ValueError(
            f"the method {settings['method']!r} needs coefficients that are weights of nn.Linear or nn.Conv2d; "
            f"{refused[0]} is a {type(modules[refused[0]]).__name__}"
        )
    budget = settings["ratio"] * sum(A.numel() for A in coefficients.values())
    limits = {name: min(HIGHEST_RANK, *module.weight.flatten(1).shape) for name, module in modules.items()}

    def config(ranks: dict[str, int]) -> LoraConfig:
        # alpha = r: the update is not scaled, as LoTRA's is not.
        pattern = {"rank_pattern": ranks, "alpha_pattern": ranks, "target_modules": list(ranks)}
        return LoraConfig(r=max(ranks.values()), lora_alpha=max(ranks.values()), **pattern)

    def cost(name: str, r: int) -> int:
        one = nn.ModuleDict({"layer": copy.deepcopy(modules[name])})
        return trainable(get_peft_model(one, config({"layer": r})))

    return get_peft_model(model, config(ranks_within(budget, limits, cost)))


def ranks_within(budget: float, limits: Mapping[str, int], cost: Callable[[str, int], int]) -> dict[str, int]:
    """Ranks of modules whose cost comes near to the budget from below: raised in turn, the lowest first.

    They are 1 everywhere, above the budget, if not even this fits.
    """
    ranks = dict.fromkeys(limits, 1)
    costs = {name: cost(name, 1) for name in ranks}
    open_ = [name for name in ranks if limits[name] > 1]
    while open_:
        name = min(open_, key=ranks.get)
        higher = cost(name, ranks[name] + 1)
        if sum(costs.values()) - costs[name] + higher <= budget:
            ranks[name], costs[name] = ranks[name] + 1, higher
            if ranks[name] < limits[name]:
                continue
        open_.remove(name)
    return ranks


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# How each is applied, and its own settings. "width" is that of a smaller KAN, with as many numbers as an adapter.
METHODS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "full": (_everything, ()),
    "scratch": (_everything, ("width",)),
    "lotra": (_lotra, (*RANKS, "init", "orthonormal")),
    "lora": (_lora, ("ratio",)),
    "lora_parameters": (_lora_parameters, ("ratio",)),
}
