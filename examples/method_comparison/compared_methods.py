"""The methods that are compared: each makes part of a model trainable, at a budget of parameters if it has one."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from objectives import Objective
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tasks import Task
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lotra import LoTRAConfig, create_lotra_optimizer, initialize_lotra_weights, slim_kan
from peft_lotra.analysis import effective_coefficients
from peft_lotra.targets.resolve import resolve_targets

Settings = Mapping[str, Any]
INITIALISATIONS = ("random", "gradient", "gradient_hosvd")
GRADIENT_BATCHES = 4  # from which the gradient of an initialisation is taken
HIGHEST_RANK = 64  # that is tried for PEFT's own methods

# Settings that every method may have, and those of single methods.
COMMON = ("method", "optimizer", "weight_decay", "lr", "lr_of", "steps", "cases")
RANKS = ("ratio", "r", "rank_pattern")
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "scratch": ("width",),  # of a smaller KAN, with as many numbers as an adapter
    "last_layer": (),
    "base_weights": (),
    "lotra": (*RANKS, "layers", "freeze_factors", "alpha", "init", "lr_rule", "orthonormal"),
    "slim": (*RANKS, "lr_rule", "orthonormal"),
    "lora": ("ratio",),
    "lora_parameters": ("ratio", "layers"),
    "loha": ("ratio",),
    "lokr": ("ratio",),
}
FROM_SCRATCH = ("scratch", "slim")  # those that use no base
LAYERS = ("kan", "all-linear")
# By name: where the class is. Levenberg–Marquardt is `fit_gauss_newton`.
FIRST_ORDER = {"adam": "torch.optim:Adam", "soap": "pytorch_optimizer:SOAP"}
OPTIMIZERS = (*FIRST_ORDER, "lm")


def check_method(label: str, settings: Settings) -> None:
    """
    Raises:
        ValueError: naming what is allowed, if the settings are not those of a method.
    """
    name = settings.get("method")
    if name not in METHODS:
        raise ValueError(f"{label!r}: `method` should be one of {list(METHODS)} but the value passed is {name!r}")
    allowed = (*COMMON, *METHODS[name])
    if unknown := sorted(set(settings) - set(allowed)):
        raise ValueError(f"{label!r}: the method {name!r} should have some of {list(allowed)} but has {unknown}")
    for key, values in {"optimizer": OPTIMIZERS, "init": INITIALISATIONS, "layers": LAYERS}.items():
        if settings.get(key, values[0]) not in values:
            raise ValueError(f"{label!r}: `{key}` should be one of {list(values)} but the value is {settings[key]!r}")
    if "weight_decay" in settings and settings.get("optimizer") != "lm":
        raise ValueError(f"{label!r}: `weight_decay` is that of the optimizer 'lm'; the others have none")
    if "ratio" in METHODS[name] and sum(key in settings for key in RANKS) != 1:
        needed = [key for key in RANKS if key in METHODS[name]]
        raise ValueError(f"{label!r}: the method {name!r} needs one of {needed}")


def count_coefficients(model: nn.Module, task: Task, settings: Settings) -> int:
    """Of the layers that the method is about, which its ratio refers to."""
    return sum(A.numel() for A in tensors_of(model, task, settings).values())


def tensors_of(model: nn.Module, task: Task, settings: Settings) -> dict[str, torch.Tensor]:
    """The KAN layers' coefficients by name, and with "all-linear" the weights of the other layers too."""
    if settings.get("layers") != "all-linear":
        return effective_coefficients(model, task.coefficients(model))
    config = LoTRAConfig(r=1, coefficients=task.coefficients(model), target_modules="all-linear")
    return {target.parameter: model.get_parameter(target.parameter) for target in resolve_targets(model, config)}


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
    return _APPLY[settings["method"]](model, settings, task, objective)


def optimizer_of(model: nn.Module, settings: Settings, lr: float) -> torch.optim.Optimizer:
    """The method's optimizer on what is trainable, with its own defaults but without weight decay."""
    module, name = FIRST_ORDER[settings.get("optimizer", "adam")].split(":")
    optimizer_cls = getattr(importlib.import_module(module), name)
    if settings["method"] in ("lotra", "slim"):
        others = {key: settings[key] for key in ("lr_rule", "orthonormal") if key in settings}
        return create_lotra_optimizer(model, optimizer_cls, lr=lr, weight_decay=0.0, **others)
    return optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def _everything(model: nn.Module, *_: Any) -> nn.Module:
    return model


def _only(model: nn.Module, chosen: Callable[[str], bool], what: str) -> nn.Module:
    names = {name for name, p in model.named_parameters() if p.requires_grad and chosen(name)}
    if not names:
        raise ValueError(f"this model has no {what} to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def _last_layer(model: nn.Module, settings: Settings, task: Task, *_: Any) -> nn.Module:
    """The last KAN layer, its coefficients and the rest."""
    *_, last = effective_coefficients(model, task.coefficients(model))
    layer = last.removesuffix(_suffix(last, task.coefficients(model)))
    return _only(model, lambda name: name.startswith(layer), "last layer")


def _suffix(name: str, coefficients: Settings) -> str:
    """What of a coefficient's name is within its layer."""
    return next((suffix for suffix in coefficients if name.endswith(suffix)), name.rpartition(".")[2])


def _base_weights(model: nn.Module, settings: Settings, task: Task, *_: Any) -> nn.Module:
    """Everything but the coefficients: residual weights, biases, norms."""
    coefficients = effective_coefficients(model, task.coefficients(model))
    return _only(model, lambda name: name not in coefficients, "weights beside its coefficients")


def _ranks(settings: Settings) -> dict[str, Any]:
    ranks = {key: settings[key] for key in ("r", "rank_pattern") if key in settings}
    return ranks or {"compression_ratio": settings["ratio"]}


def _lotra(model: nn.Module, settings: Settings, task: Task, objective: Objective, *_: Any) -> nn.Module:
    ranks = _ranks(settings)
    others = {key: settings[key] for key in ("alpha", "freeze_factors") if key in settings}
    if settings.get("layers") == "all-linear":
        others["target_modules"] = "all-linear"
    config = LoTRAConfig(coefficients=task.coefficients(model), **others, **ranks)
    adapted = get_peft_model(model, config)
    method = settings.get("init", "random")
    if method != "random":

        def train_step() -> None:
            for step in range(GRADIENT_BATCHES):
                objective.loss(adapted, step).backward()

        initialize_lotra_weights(adapted, train_step, method=method, progressbar=False)
    return adapted


def _slim(model: nn.Module, settings: Settings, task: Task, objective: Objective, *_: Any) -> nn.Module:
    coefficients = effective_coefficients(model, task.coefficients(model))
    # What is not a coefficient is trained as in the dense KAN.
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in coefficients]
    slim = slim_kan(model, coefficients=task.coefficients(model), **_ranks(settings))
    for parameter in others:
        parameter.requires_grad_(True)
    return slim


def _lora_parameters(model: nn.Module, settings: Settings, task: Task, *_: Any) -> nn.Module:
    """PEFT's LoRA on bare parameters: the first axis counts experts, each gets a pair of matrices. With "all-linear"
    on the other layers' weights too."""
    budget = settings["ratio"] * count_coefficients(model, task, settings)
    names = list(effective_coefficients(model, task.coefficients(model)))
    modules = [name.removesuffix(".weight") for name in tensors_of(model, task, settings) if name not in names]

    def adapted(model: nn.Module, r: int) -> nn.Module:
        found = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=[], target_parameters=names))
        if modules:  # two adapters: PEFT takes no bare parameters beside weights stored as transformers' Conv1D does
            transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in modules)
            config = LoraConfig(r=r, lora_alpha=r, target_modules=modules, fan_in_fan_out=transposed)
            found.add_adapter("matrices", config)
            found.base_model.set_adapter(["default", "matrices"])
        return found

    r = 1
    while r < HIGHEST_RANK and trainable(adapted(copy.deepcopy(model), r + 1)) <= budget:
        r += 1
    return adapted(model, r)


def _on_modules(
    config_class: type, alpha: str, variants: Sequence[dict[str, Any]] = ({},)
) -> Callable[..., nn.Module]:
    """A PEFT method of matrices on the modules whose weights are coefficients, in the variant that uses most of the
    budget."""

    def apply(model: nn.Module, settings: Settings, task: Task, *_: Any) -> nn.Module:
        coefficients = effective_coefficients(model, task.coefficients(model))
        modules = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in coefficients}
        if refused := [name for name, module in modules.items() if not isinstance(module, nn.Linear | nn.Conv2d)]:
            raise ValueError(
                f"the method {settings['method']!r} needs coefficients that are weights of nn.Linear or nn.Conv2d; "
                f"{refused[0]} is a {type(modules[refused[0]]).__name__}"
            )
        budget = settings["ratio"] * sum(A.numel() for A in coefficients.values())
        limits = {name: min(HIGHEST_RANK, *module.weight.flatten(1).shape) for name, module in modules.items()}

        def config(variant: Settings, ranks: dict[str, int]) -> Any:
            # alpha = r: the update is not scaled, as LoTRA's is not.
            pattern = {"rank_pattern": ranks, "alpha_pattern": ranks, "target_modules": list(ranks)}
            return config_class(r=max(ranks.values()), **{alpha: max(ranks.values())}, **pattern, **variant)

        best: tuple[bool, int, Any] | None = None
        for variant in variants:

            @cache
            def cost(name: str, r: int, variant: Settings = variant) -> int:
                # Built and counted: LoKr's sizes do not follow a simple formula.
                one = nn.ModuleDict({"layer": copy.deepcopy(modules[name])})
                return trainable(get_peft_model(one, config(variant, {"layer": r})))

            ranks = ranks_within(budget, limits, cost)
            total = sum(cost(name, r) for name, r in ranks.items())
            key = (total <= budget, total if total <= budget else -total)
            if best is None or key > best[:2]:
                best = *key, config(variant, ranks)
        return get_peft_model(model, best[2])

    return apply


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


def stored(model: nn.Module) -> int:
    """The numbers in an adapter's file; without an adapter, those that are trained."""
    if not isinstance(model, PeftModel):
        return trainable(model)
    return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())


def above_budget(model: nn.Module, settings: Settings, coefficients: int) -> bool:
    """Whether not even the lowest ranks have fitted into the budget. A Slim KAN's is that of its factors alone."""
    return settings["method"] not in FROM_SCRATCH and trainable(model) > settings.get("ratio", math.inf) * coefficients


_APPLY = {
    "full": _everything,
    "scratch": _everything,
    "last_layer": _last_layer,
    "base_weights": _base_weights,
    "lotra": _lotra,
    "slim": _slim,
    "lora": _on_modules(LoraConfig, "lora_alpha"),
    "lora_parameters": _lora_parameters,
    "loha": _on_modules(LoHaConfig, "alpha"),
    "lokr": _on_modules(LoKrConfig, "alpha", [{"decompose_factor": factor} for factor in (-1, 8, 4, 2)]),
}
