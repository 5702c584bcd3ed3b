"""The tensors that an adapter consists of, by their names in its file and in the model."""

from __future__ import annotations

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..layers.biases import trained_biases
from ..layers.lotra import LoTRALayer
from .adapter_file import Slot


def slots_of(model: nn.Module, adapter_name: str, bias: str) -> dict[str, tuple[str, Slot]]:
    """The tensors of an adapter, with trained copies, token rows and biases: name in file -> (name in model, slot).

    In the file, a LoTRALayer has the name that it would have if the model had no other adapters. If the model is not
    wrapped in a PeftModel, the names have no prefix.
    """
    biases = trained_biases(model, adapter_name, bias)
    found = {entry.saved: (entry.name, Slot(tuple(entry.parameter.shape), entry.parameter.dtype)) for entry in biases}
    saved: dict[nn.Module, str] = {}  # names in the file of the modules that LoTRALayers wrap
    for module_name, module in model.named_modules():
        module_name = module_name.replace("_fsdp_wrapped_module.", "")  # as in the state dict
        if isinstance(module, LoTRALayer):
            saved_name = saved.get(module, module_name)
            is_own = adapter_name in module.lotra_core
            saved[module.base_layer] = f"{saved_name}.base_layer" if is_own else saved_name
            for key, factor in module.parameters_of(adapter_name).items() if is_own else ():
                slot = Slot(tuple(factor.shape), module.dtype_in_use(adapter_name))
                found[f"{saved_name}.{key}"] = f"{module_name}.{key}.{adapter_name}", slot
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
            held = module.state_dict()
            for key, name in module.adapter_state_dict_load_map(adapter_name).items():
                slot = Slot(tuple(held[name].shape), held[name].dtype)
                found[f"{module_name}.{key}"] = f"{module_name}.{name}", slot
    return found
