"""diffusers' own way to save adapters, which is for LoRA: refused, because diffusers could not read the file."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import LoraConfig
from torch import nn

_METHOD = "save_lora_adapter"


def refuse_foreign_saving(model: nn.Module) -> None:
    """From now on, a diffusers model saves LoRA only. Its loading makes a LoRA of every file."""
    if hasattr(model, _METHOD) and _METHOD not in vars(model):
        setattr(model, _METHOD, partial(_save_lora_adapter, model))


def _save_lora_adapter(model: Any, save_directory: Any, adapter_name: str = "default", **kwargs: Any) -> None:
    config = model.peft_config.get(adapter_name)
    if config is not None and not isinstance(config, LoraConfig):
        raise ValueError(
            f"`save_lora_adapter` writes what `load_lora_adapter` takes for LoRA, and the adapter {adapter_name!r} is "
            f"a {type(config).__name__}: adapt the model by `get_peft_model(model, config)`, and use its "
            "`save_pretrained` and `PeftModel.from_pretrained(model, directory)`"
        )
    type(model).save_lora_adapter(model, save_directory, adapter_name=adapter_name, **kwargs)
