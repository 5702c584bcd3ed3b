"""The one place that reaches into PEFT to make LoTRA one of its methods."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from .coefficients.registry import qualified_name


def extend_peft_type(name: str) -> PeftType:
    """The member `PeftType.<name>`, added to the enum if PEFT does not have it.

    PEFT has no plugin interface: the enum is closed, and everything in PEFT looks methods up by its members. A member
    PEFT itself brings is used as it is.

    Raises:
        RuntimeError: if this Python's enum works otherwise than expected; nothing is half-registered then.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)  # EnumMeta.__setattr__ refuses once the map below has the name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)  # from Python 3.13
    found = getattr(PeftType, name, None) is PeftType(name) is PeftType[name] is list(PeftType)[-1]
    if not found or member.value != name or name not in list(PeftType):
        raise RuntimeError(f"PeftType could not be extended by {name} on this Python; please report this")
    return member


LOTRA = extend_peft_type("LOTRA")
TASK = "lotra_task"  # an argument of a call


def _take_out(argument: str) -> None:
    """Let a PeftModel of this method take an argument out of a call, as PEFT does with `adapter_names`.

    Each PeftModel has the names of such arguments from its `__init__`, and no tuner sees the PeftModel around it.
    """
    name = "special_peft_forward_args"

    def write(model: Any, value: set[str]) -> None:
        # There, where torch.compile reads it.
        model.__dict__[name] = value | {argument} if model.__dict__.get("peft_type") == LOTRA else value

    setattr(PeftModel, name, property(lambda model: model.__dict__[name], write))


def register(config_cls: type, model_cls: type) -> None:
    """Register LoTRA's config and model with PEFT; again is allowed, the newer classes then count.

    Raises:
        RuntimeError: if PEFT already has another method of the name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(LOTRA)
    if registered is not None and qualified_name(registered) != qualified_name(config_cls):
        raise RuntimeError(
            f"PEFT already has a method called LOTRA, {qualified_name(registered)}: either this PEFT ships its own, "
            "or another plugin took the name. Use one of the two in a process"
        )
    # This package's modules were imported anew in the process, as notebooks do: PEFT refuses to register twice.
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(LOTRA, None)
    register_peft_method(name="lotra", config_cls=config_cls, model_cls=model_cls)
    _take_out(TASK)
