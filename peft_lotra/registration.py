"""Makes LoTRA a method of PEFT. Only this file reaches into PEFT's internals to register."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .coefficients.registry import qualified_name
from .files.transaction import with_whole_adapters


def extend_peft_type(name: str) -> PeftType:
    """The member `PeftType.<name>`, added to the enum if PEFT, which has no plugin interface, does not have it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)  # EnumMeta.__setattr__ refuses when the map below has the name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)  # from Python 3.13
    return member


LOTRA = extend_peft_type("LOTRA")
TASK = "lotra_task"  # the argument of a call that sets the task
AXIS = "batch_axis"  # the argument of a call that says on which axis samples are


def _prepare_peft_models(model_cls: type) -> None:
    """PeftModels of this method remove our arguments from a call, and write and load adapters as a whole.

    torch tells when a PeftModel gets its tuner, which cannot see the PeftModel around it.
    """

    def add(module: nn.Module, _: str, child: nn.Module | None) -> None:
        if isinstance(child, model_cls) and isinstance(module, PeftModel):
            module.special_peft_forward_args |= {TASK, AXIS}
            cls: Any = type(module)
            module.__class__ = with_whole_adapters(cls)

    register_module_module_registration_hook(add)


def register(config_cls: type, model_cls: type) -> None:
    """Register LoTRA's config and model with PEFT. A second call is allowed, and replaces the classes."""
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(LOTRA)
    if registered is not None and qualified_name(registered) != qualified_name(config_cls):
        raise RuntimeError(
            f"PEFT already has a method called LOTRA, {qualified_name(registered)}: either this PEFT ships its own, "
            "or another plugin took the name. Use only one of the two in a process"
        )
    # A notebook may import this package's modules again in one process, but PEFT refuses to register a name twice.
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(LOTRA, None)
    register_peft_method(name="lotra", config_cls=config_cls, model_cls=model_cls)
    _prepare_peft_models(model_cls)
