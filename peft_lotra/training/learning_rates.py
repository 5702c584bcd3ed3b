"""Learning rates of the core and the factors, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..layers.lotra import adapted_tensors
from ..placement.sharded import check_not_sharded
from ..preserved import check_model
from ..tucker.decomposition import CORE, NAMES
from ..tucker.ranks import mode_sizes

Multipliers = Mapping[str, float]

# η/lr of each component in a layer with n inputs, m outputs, n_d basis functions and K positions; 1 if not named.
_RULES: dict[str, Callable[[int, int, int, int], dict[str, float]]] = {
    "LR-1": lambda n, m, n_d, K: {"i": 1 / n, "d": 1 / n_d, "k": 1 / K},
    "LR-2": lambda n, m, n_d, K: {"i": 1 / n},
    "LR-3": lambda n, m, n_d, K: {"d": 1 / n_d},
    "LR-4": lambda n, m, n_d, K: {},
    "adam": lambda n, m, n_d, K: {"i": 1 / n, "o": 1 / m**0.5, "d": 1 / n_d, "k": 1 / K},
}
_COMPONENTS = {"core": CORE, **NAMES}
_NOT_WHOLE = "`orthonormal`=True needs whole factors in every process: leave it out, or use DDP"


def create_lotra_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    lr_rule: str | Multipliers = "LR-4",
    weight_decay: float | None = None,
    orthonormal: bool = False,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """`optimizer_cls` over all trainable parameters, with the learning rates of `lotra_parameter_groups`.

    With `orthonormal`, each step ends with U_k ← Q_k, G ← G ×_k R_k for every factor U_k = Q_k R_k. This leaves the
    update as it is. Entrywise steps such as Adam's then act on factors of constant size. Ours.

    Args:
        model: an adapted model.
        optimizer_cls: any of torch's optimizers, or one with the same interface. SOAP from the package
            pytorch_optimizer (Adam in the eigenbases of each factor's gradients) was the best of those tried: it
            reached 0.29 to 0.46 × Adam's error on four PDEs (examples/method_comparison). Start with a rate of 1e-2
            for both.
        lr, lr_rule, weight_decay: as for `lotra_parameter_groups`.
        orthonormal: whether to keep the columns of the factors orthonormal. With Adam this lowered the error on two of
            three PDEs (0.43 to 0.95 ×), and raised it on the third (1.3 and 2.0 ×). Do not use it with SOAP, whose
            averages belong to the factors before they are changed.
        kwargs: further arguments of the optimizer.

    Raises:
        ValueError: as `lotra_parameter_groups`. With `orthonormal`, also if the model is sharded, now or in a step.
    """
    groups = lotra_parameter_groups(model, lr=lr, lr_rule=lr_rule, weight_decay=weight_decay)
    optimizer = optimizer_cls(groups, **kwargs)
    if orthonormal:
        check_not_sharded(model, "`model`", _NOT_WHOLE)
        optimizer.register_step_post_hook(lambda *_: _orthonormalize(model))
    return optimizer


@torch.no_grad()
def _orthonormalize(model: nn.Module) -> None:
    """U_k ← Q_k, G ← G ×_k R_k for the adapters that are being trained."""
    check_not_sharded(model, "`model`", _NOT_WHOLE)  # it may have been sharded since
    for layer in adapted_tensors(model).values():
        for name in layer.lotra_core:
            if all(factor.requires_grad for factor in layer.tucker(name).tensors()):
                layer.set_tucker(name, layer.tucker(name).orthonormal())


def lotra_parameter_groups(
    model: nn.Module, *, lr: float, lr_rule: str | Multipliers = "LR-4", weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """All trainable parameters in one named group per distinct learning rate, η = lr · multiplier.

    For transformers' Trainer: `optimizer_cls_and_kwargs=(AdamW, {"params": lotra_parameter_groups(model, lr=1e-2)})`.

    Args:
        model: an adapted model.
        lr: the rate of the core, and of tensors that are trained beside adapters (`modules_to_save`, biases).
        lr_rule: the multipliers in a layer with n inputs, m outputs, n_d basis functions and K kernel positions:

            | rule | core | i | o | d | k |
            |---|---|---|---|---|---|
            | "LR-1" | 1 | 1/n | 1 | 1/n_d | 1/K |
            | "LR-2" | 1 | 1/n | 1 | 1 | 1 |
            | "LR-3" | 1 | 1 | 1 | 1/n_d | 1 |
            | "LR-4" | 1 | 1 | 1 | 1 | 1 |
            | "adam" | 1 | 1/n | 1/√m | 1/n_d | 1/K |

            The rule may also be a mapping from some of "core" and the factors' modes, "i", "o", "d", "k", to
            multipliers for every layer; the others are then 1. LR-4, one rate for all, was best or near the best in
            layers of up to 256 inputs (examples/learning_rates.py). In wider layers its rate has to fall with the
            width, and that of LR-2 does not.
        weight_decay: the weight decay of all groups. None leaves the optimizer's default.

    Raises:
        TypeError: if `model` is not a torch.nn.Module.
        ValueError: if no adapter is trainable, or an argument is not as described.

    Source: LR-1 is Theorem 2, for gradient descent. LR-4 is the source's baseline. The others are ours; "adam" is the
    same argument for steps that move every entry by about ±η.
    """
    check_model(model=model)
    if not isinstance(lr, Real | torch.Tensor) or not 0 < lr:
        raise ValueError(f"`lr` should be a positive number, got {lr!r}")
    rule = _rule(lr_rule)
    of_adapters: dict[nn.Parameter, tuple[str, float]] = {}
    for layer in adapted_tensors(model).values():
        multipliers = rule(*mode_sizes(layer.spec.layout.canonical_shape))
        for component, container in _COMPONENTS.items():
            found = component, float(multipliers.get(component, 1))
            of_adapters |= dict.fromkeys(getattr(layer, container).values(), found)
    if not any(parameter.requires_grad for parameter in of_adapters):
        raise ValueError("the model has no trainable LoTRA adapter: add one, or activate it with `set_adapter`")
    members: dict[float, dict[nn.Parameter, str]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            component, multiplier = of_adapters.get(parameter, ("other", 1.0))
            members.setdefault(multiplier, {})[parameter] = component
    groups = []
    for multiplier, held in members.items():
        names = ", ".join(name for name in (*_COMPONENTS, "other") if name in held.values())
        groups.append({"params": list(held), "lr": lr * multiplier, "name": f"{names}: lr · {multiplier:g}"})
        if weight_decay is not None:
            groups[-1]["weight_decay"] = weight_decay
    return groups


def _rule(lr_rule: str | Multipliers) -> Callable[[int, int, int, int], Multipliers]:
    if isinstance(lr_rule, str) and lr_rule in _RULES:
        return _RULES[lr_rule]
    if isinstance(lr_rule, str):
        raise ValueError(f"`lr_rule` should be one of {list(_RULES)} or a mapping of multipliers, got {lr_rule!r}")
    if not isinstance(lr_rule, Mapping) or set(lr_rule) - set(_COMPONENTS):
        raise ValueError(f"`lr_rule` should map some of {[*_COMPONENTS]} to multipliers, got {lr_rule!r}")
    if not all(isinstance(value, Real) and 0 < value < float("inf") for value in lr_rule.values()):
        raise ValueError(f"`lr_rule` should give positive multipliers, got {dict(lr_rule)}")
    return lambda n, m, n_d, K: lr_rule
