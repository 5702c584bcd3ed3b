"""Checks the tensors that PEFT collects to save an adapter, and what it would write in addition."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..placement.sharded import any_sharded
from .slots import slots_of


class Collected(dict):
    """An adapter's tensors by their names in the model. PEFT adds others, for instance the base model's embeddings."""

    def __init__(self, own: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str, bias: str) -> None:
        super().__init__(own)
        self._model, self._adapter, self._bias = model, adapter_name, bias

    def update(self, more: Mapping[str, torch.Tensor]) -> None:  # type: ignore[override]
        """Take the tensors that belong to the adapter. Frozen originals of trained copies or token rows are skipped.

        Raises:
            ValueError: for other tensors of the base model, which no adapter loads.
        """
        names = slots_of(self._model, self._adapter, self._bias)
        originals = [f"{name}." for name, m in self._model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        base = sorted(key for key in more if key not in names and not key.startswith(tuple(originals)))
        if base:
            raise ValueError(
                f"the adapter {self._adapter!r} cannot be saved with the base model's {base}, which no "
                "adapter loads: pass `save_embedding_layers=False`, and save the base model too if they were changed; "
                "or adapt the model again with these modules in `modules_to_save`, or with single rows in "
                "`trainable_token_indices`"
            )
        super().update({key: tensor for key, tensor in more.items() if key in names})


def warn_of_parts(tensors: Iterable[torch.Tensor], adapter_name: str) -> None:
    """Warn if this process has only a part of some tensors. PEFT's `save_pretrained` fails on them, with other words.

    accelerate collects parts by the same function, and writes them in its own way.
    """
    if any_sharded(tensors):
        warnings.warn(
            f"each process has only a part of the factors of the adapter {adapter_name!r} (FSDP2), which "
            "`save_pretrained` cannot write. Gather them in all processes, by `state = accelerator.get_state_dict("
            "model)` or `get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
            "` of torch.distributed.checkpoint.state_dict. Then call `save_pretrained(..., state_dict=state)` in the "
            "first process",
            stacklevel=3,
        )
