"""The layers and parameters of a model, by the names that they have without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class BaseModel:
    """The base model as it would be without adapters."""

    layers: dict[str, nn.Module]  # by name, without the modules inside a layer that is adapted already
    parameters: list[str]  # the full names of all parameters

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        layers, parameters = {}, []
        inside: str | None = None  # the adapted layer whose submodules are being skipped
        for name, module in model.named_modules():
            if inside is not None and name.startswith(inside):
                continue
            is_adapted = isinstance(module, BaseTunerLayer)
            if is_adapted:
                inside = f"{name}."
                module = module.get_base_layer()
            layers[name] = module
            paths = [path for path, _ in module.named_parameters(recurse=is_adapted)]
            parameters += [f"{name}.{path}" if name else path for path in paths]
        return cls(layers, parameters)


def around(module: str) -> list[str]:
    """The names of the modules around a module, from the outside inwards, without the model itself."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


@contextmanager
def naming_layer(module: str, kind: str = "KAN layer") -> Iterator[None]:
    """Errors raised inside name the layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{kind} {module!r}: {error}") from None
