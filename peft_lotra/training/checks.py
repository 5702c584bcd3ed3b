"""Checks of the arguments and models of this room."""

from __future__ import annotations

import math
from inspect import signature
from numbers import Integral, Real
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..preserved import reached


def check_numbers(**arguments: tuple[Any, float]) -> None:
    """Raise ValueError unless each argument, given by name as (value, bound), is a number that respects its bound."""
    for name, (value, bound) in arguments.items():
        whole = name in ("iterations", "patience", "max_memory", "every")
        above = not whole and not name.endswith(("tolerance", "decay"))
        if value is None and name in ("max_seconds", "patience"):
            continue
        good = isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < bound or (above and value == bound):
            kind, relation = "whole" if whole else "finite", "above" if above else "of at least"
            raise ValueError(
                f"`{name}` should be a {kind} number {relation} {bound} but the value passed is {value!r}"
            )


def check_callable(argument: str, function: Any, wanted: str, *given: object) -> None:
    """Raise TypeError, naming the argument and what is wanted, unless `function` can be called with `given`."""
    try:
        signature(function).bind(*given)
    except TypeError:
        takes = f", which takes the arguments {signature(function)}" if callable(function) else ""
        raise TypeError(f"`{argument}` should be {wanted} but the value passed is {function!r}{takes}") from None
    except ValueError:
        pass  # some builtins have no signature


def check_repeatable(model: nn.Module) -> None:
    """Raise ValueError if a layer gives other outputs when it is called again, or with other samples in the batch."""
    for name, module in model.named_modules():
        dropout = isinstance(module, _DropoutNd) and module.p > 0
        if module.training and (dropout or isinstance(module, _BatchNorm)):
            raise ValueError(
                f"`model` has a {type(module).__name__} in train mode, {name}, whose outputs depend on "
                f"{'chance' if dropout else 'the other samples of the batch'}: call `model.eval()` before"
            )


def followed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with a gradient if it can have one, so that autograd records what is computed from it."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def check_functions(outputs: torch.Tensor) -> None:
    """Raise ValueError if outputs come from a torch.autograd.Function that torch.func does not differentiate."""
    for node in reached([outputs.grad_fn]):
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and function.setup_context is torch.autograd.Function.setup_context:
            raise ValueError(
                f"`model` computes by {function.__qualname__}, a torch.autograd.Function without `setup_context`, "
                "which `torch.func` does not differentiate. Layers of bitsandbytes have such functions: train "
                "this model by Adam"
            )


def check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if a forward pass writes to the model's parameters, which torch.func does not differentiate."""
    for name, module in model.named_modules():
        active = isinstance(module, ParamWrapper) and set(module.active_adapters) & set(module.lora_A)
        if active and not module.disable_adapters and not module.merged:
            raise ValueError(
                f"`model` has LoRA on the parameter {module.parameter_name!r} of the layer {name} "
                "(`target_parameters`). PEFT writes it into the layer in every pass, which `torch.func` cannot "
                "differentiate: name the layer in `target_modules` if it is an nn.Linear, use "
                "`LoTRAConfig(r=(None, r, None))`, which is LoRA of coefficients, or merge the adapter if it is not "
                "to be trained"
            )
