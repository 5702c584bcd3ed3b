"""What PEFT collects of an adapter to save it, and what it would write besides."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .checkpoint import CONTAINERS, Slot
from .layer import LoTRALayer
from .placement.sharded import any_sharded


def adapter_slots(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, Slot]]:
    """What an adapter consists of, trained copies and token rows included: name in its file -> name in `model`, slot.

    Names of a model that is not wrapped in a PeftModel have no prefix.
    """
    found: dict[str, tuple[str, Slot]] = {}
    for module_name, module in model.named_modules():
        module_name = module_name.replace("_fsdp_wrapped_module.", "")  # as in the state dict
        if isinstance(module, LoTRALayer) and adapter_name in module.lotra_core:
            dtype = module.dtype_in_use(adapter_name)
            for key, factor in zip(CONTAINERS, module.factors(adapter_name), strict=True):
                if factor is not None:
                    name = f"{module_name}.{key}"
                    found[name] = f"{name}.{adapter_name}", Slot(tuple(factor.shape), dtype)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
            held = module.state_dict()
            for key, name in module.adapter_state_dict_load_map(adapter_name).items():
                slot = Slot(tuple(held[name].shape), held[name].dtype)
                found[f"{module_name}.{key}"] = f"{module_name}.{name}", slot
    return found


class Collected(dict):
    """An adapter's tensors by their names in the model, to which PEFT adds others, the base model's embeddings too."""

    def __init__(self, own: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
        super().__init__(own)
        self._model, self._adapter = model, adapter_name

    def update(self, more: Mapping[str, torch.Tensor]) -> None:  # type: ignore[override]
        """Take what belongs to the adapter; the frozen original beside a trained copy or token rows is passed over.

        Raises:
            ValueError: for other tensors of the base model, which no adapter loads.
        """
        names = adapter_slots(self._model, self._adapter)
        originals = [f"{name}." for name, m in self._model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        base = sorted(key for key in more if key not in names and not key.startswith(tuple(originals)))
        if base:
            raise ValueError(
                f"the adapter {self._adapter!r} cannot be saved with the base model's {base}, which no "
                "adapter loads: pass `save_embedding_layers=False`, and save the base model too if they were changed, "
                "or adapt it anew with them in `modules_to_save`, or with single rows in `trainable_token_indices`"
            )
        super().update({key: tensor for key, tensor in more.items() if key in names})


def check_whole(tensors: Iterable[torch.Tensor], adapter_name: str) -> None:
    """Raise ValueError if PEFT's `save_pretrained` is about to write tensors of which this process has a part."""
    if any_sharded(tensors) and _is_saving():
        raise ValueError(
            f"the adapter {adapter_name!r} cannot be saved: each process has a part of its factors only (FSDP2). "
            "Gather them in all processes, by `state = accelerator.get_state_dict(model)` or `get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))` of "
            "torch.distributed.checkpoint.state_dict, and in the first one call "
            "`save_pretrained(..., state_dict=state)`"
        )


def _is_saving() -> bool:
    # accelerate collects parts by the same function, and writes them by its own means. PEFT tells a tuner of neither,
    # and calls nothing of it between collecting and writing.
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not PeftModel.save_pretrained.__code__:
        frame = frame.f_back
    return frame is not None
