"""The biases that are trained and saved with an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .lotra import LoTRALayer

_NORM = re.compile(r"Norm(\d[dD])?$")  # LayerNorm, BatchNorm2d, LlamaRMSNorm


class Bias(NamedTuple):
    """A parameter that `LoTRAConfig.bias` selects, and its names in the adapter's file, the model, the plain model."""

    saved: str
    name: str
    plain: str
    parameter: nn.Parameter


def trained_biases(model: nn.Module, adapter: str, bias: str, modules: Collection[str] = ()) -> list[Bias]:
    """The biases in `model` that the config field `bias` of `adapter` selects, except those inside `modules_to_save`.

    A bias is a parameter called "bias", as for LoRA. In adapted layers, the vectors of normalisations count as biases,
    too: parameters of one axis in modules such as LayerNorm and BatchNorm2d. In the file, an adapted layer has the
    name that it would have if the model had no other adapters. `modules` names layers that will be adapted.
    """
    found: dict[int, Bias] = {}

    def visit(module: nn.Module, names: tuple[str, ...], within: bool) -> None:
        """`names`: the beginning of a `Bias`. `within`: whether the module lies in an adapted layer."""
        if isinstance(module, AuxiliaryTrainingWrapper):
            return
        while isinstance(module, BaseTunerLayer):
            is_own = isinstance(module, LoTRALayer) and adapter in module.lotra_core
            within |= is_own
            names = f"{names[0]}base_layer." if is_own else names[0], f"{names[1]}base_layer.", names[2]
            module = module._modules["base_layer"]  # type: ignore[assignment]
        within |= names[2].removesuffix(".") in modules
        is_norm = within and _NORM.search(type(module).__name__) is not None
        for name, parameter in module.named_parameters(recurse=False) if within or bias == "all" else ():
            if name == "bias" or (is_norm and parameter.dim() == 1):
                found[id(parameter)] = Bias(names[0] + name, names[1] + name, names[2] + name, parameter)
        for name, child in module.named_children():
            visit(child, names if name == "_fsdp_wrapped_module" else tuple([f"{n}{name}." for n in names]), within)

    if bias != "none":
        visit(model, ("", "", ""), False)
    return list(found.values())
