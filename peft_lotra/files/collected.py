"""Checks the tensors that PEFT collects to save an adapter, and what it would write in addition."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..layers.biases import trained_biases
from ..placement.sharded import any_sharded
from .adapter_file import PREFIX, check_weights, is_adapter_key
from .base_marks import marks_of, warn_of_a_trained_base, warn_of_another_base
from .config_file import ConfigFile
from .slots import slots_of

# Whether a PeftModel loads an adapter's file just now; otherwise a state dict is a user's own.
loads_a_file: ContextVar[bool] = ContextVar("loads_a_file", default=False)


class Collected(dict):
    """An adapter's tensors by their names in the model. PEFT adds others, for instance the base model's embeddings."""

    def __init__(self, own: Mapping[str, Any], model: nn.Module, adapter: str, names: Collection[str]) -> None:
        super().__init__(own)
        self._adapter, self._names = adapter, names
        self._originals = tuple([f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)])

    def update(self, more: Mapping[str, torch.Tensor]) -> None:  # type: ignore[override]
        """Take what belongs to the adapter, skip frozen originals of trained copies, and refuse other tensors."""
        if base := sorted(key for key in more if key not in self._names and not key.startswith(self._originals)):
            raise ValueError(
                f"the adapter {self._adapter!r} cannot be saved with the base model's {base}, which no adapter loads: "
                "pass `save_embedding_layers=False`, and save the base model too if they were changed; or adapt it "
                "again with these modules in `modules_to_save`, or rows in `trainable_token_indices`"
            )
        super().update({key: tensor for key, tensor in more.items() if key in self._names})


def warn_of_parts(tensors: Iterable[torch.Tensor], adapter_name: str) -> None:
    """Warn of parts, which PEFT's `save_pretrained` cannot write. accelerate collects them by the same function."""
    if any_sharded(tensors):
        warnings.warn(
            f"each process has only a part of the factors of the adapter {adapter_name!r} (FSDP2), which "
            "`save_pretrained` cannot write. Gather them in all processes, by `state = accelerator.get_state_dict("
            "model)` or torch's `get_model_state_dict` with `full_state_dict=True`, then call "
            "`save_pretrained(..., state_dict=state)` in the first process",
            stacklevel=3,
        )


def collected(
    model: nn.Module, config: ConfigFile, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> Collected:
    """An adapter's tensors, which the config keeps until it is saved; ValueError unless it names them."""
    slots = slots_of(model, adapter_name, config.bias)
    tensors = {key: state_dict.get(name) for key, (name, _) in slots.items()}
    config._written = {PREFIX + key.removeprefix(PREFIX): t for key, t in tensors.items() if t is not None}
    # Only the first process has a gathered state dict. The others have none, and write nothing.
    if state_dict or not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        config.check_written(adapter_name)
    warn_of_parts(config._written.values(), adapter_name)
    warn_of_a_trained_base(model, adapter_name)
    config.base_marks = marks_of(model, adapter_name)
    # PEFT adds trained copies and token rows itself, and removes the adapter's name from the other keys.
    biases = {entry.saved for entry in trained_biases(model, adapter_name, config.bias)}
    named = {f"{key}.{adapter_name}" if is_adapter_key(key) else key: t for key, t in tensors.items()}
    own = {key: t for key, t in named.items() if t is not None and (is_adapter_key(key) or key in biases)}
    return Collected(own, model, adapter_name, slots)


def remapped(
    model: nn.Module, config: ConfigFile, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a file by their names in the model; ValueError unless they fit the adapter."""
    if loads_a_file.get() and config._saved is not None:  # what was checked, and not what PEFT has read after it
        device = next((tensor.device for tensor in state_dict.values()), None)
        state_dict = {key: tensor.to(device) for key, tensor in config._saved.weights.items()}
    slots = slots_of(model, adapter_name, config.bias)
    names = {key: name for key, (name, _) in slots.items()}
    names |= {f"{PREFIX}{key}": name for key, name in names.items()}  # for a model without a PeftModel around it
    found = {names.get(key, key): tensor for key, tensor in state_dict.items()}
    check_weights(dict(slots.values()), found, f"the state dict for the adapter {adapter_name!r}")
    warn_of_another_base(model, adapter_name, config.base_marks)
    return found
