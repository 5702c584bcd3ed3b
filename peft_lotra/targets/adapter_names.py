"""Checks of the name of a new adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..calls.context import BASE
from ..config.lotra_config import LoTRAConfig
from ..files.adapter_file import PREFIX
from ..layers.lotra import adapted_tensors
from ..tucker.decomposition import CODES, CONTAINERS
from .resolve import NAMES_OF_HEADS, resolve_targets

# Names in the way to an adapter's tensors that are PEFT's or this package's.
_TAKEN = {*CONTAINERS, CODES, "base_layer", "base_model", "model", "modules_to_save", "original_module"}
_TAKEN |= {"token_adapter", "trainable_tokens_delta", "trainable_tokens_original", "weight", "bias"}


def check_name(adapter_name: str, model: nn.Module) -> None:
    """Raise unless the name can be a module's, a directory's and a sample's in a mixed batch, and is no module's."""
    if not isinstance(adapter_name, str):
        raise TypeError(f"`adapter_name` should be a str but the value passed is {adapter_name!r}")
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(
            f"`adapter_name` {adapter_name!r} is a name that torch's containers of parameters do not accept (empty, "
            "with a dot, or one of their attributes): choose another"
        )
    if len(adapter_name) > 100 or not adapter_name.isprintable() or set(adapter_name) & set("/\\:"):
        raise ValueError(
            f"`adapter_name` {adapter_name[:100]!r} cannot be the name of a directory to save to: choose a name of up "
            "to 100 printable characters, without / \\ :"
        )
    if adapter_name == BASE:
        raise ValueError(f"`adapter_name` {adapter_name!r} stands for no adapter in a mixed batch: choose another")
    if adapted_tensors(model, adapter_name):
        return  # the adapter is replaced, and its name is in the names of its tensors
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    theirs = {name for tuner in tuners for name in (*tuner.adapter_layer_names, *tuner.other_param_names)}
    modules = ((name, m) for name, m in model.named_modules() if not theirs.intersection(name.split(".")))
    tensors = (
        [*name.split("."), key]
        for name, m in modules
        for key, _ in chain(m.named_parameters(recurse=False), m.named_buffers(recurse=False))
    )
    holders = (".".join(parts).removeprefix(".") for parts in tensors if adapter_name in parts)
    holder = adapter_name if adapter_name in _TAKEN else next(holders, None)
    if holder:
        raise ValueError(
            f"`adapter_name` {adapter_name!r} is in names of tensors, such as {holder!r}. When PEFT saves an adapter, "
            "it leaves out all tensors whose names have that of another adapter in them, these too: choose another, "
            f"for example {f'adapter_{adapter_name}'!r} or {f'{adapter_name}_task'!r}"
        )


def check_replaced(model: nn.Module, peft_config: Any, adapter_name: str, earlier: PeftConfig) -> None:
    """Warn if a new adapter replaces the one of its name, and raise ValueError if that one would stay somewhere."""
    config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
    way_out = "Give the new one another name, or remove the adapters first (`unload()`, `merge_and_unload()`)"
    if not isinstance(earlier, LoTRAConfig):
        raise ValueError(
            f"`adapter_name` {adapter_name!r}: the model has an adapter of this name already, by "
            f"{type(earlier).__name__}, which would stay active. {way_out}"
        )
    new = {target.parameter.removeprefix(PREFIX) for target in resolve_targets(model, config)}
    left = [parameter for parameter in adapted_tensors(model, adapter_name) if parameter not in new]
    left += sorted({*(earlier.modules_to_save or ())} - {*(config.modules_to_save or ()), *NAMES_OF_HEADS})
    if left:
        raise ValueError(
            f"`adapter_name` {adapter_name!r}: the model has an adapter of this name already, which would stay active "
            f"in {left}. {way_out}"
        )
    warnings.warn(
        f"`adapter_name` {adapter_name!r}: the new adapter replaces the one of this name. {way_out}", stacklevel=3
    )
