"""Names of a wrapped layer on its wrapper: read with the adapted coefficients, and written where they are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import wraps
from inspect import ismethod
from typing import Any

import torch
from torch import nn

from .standin import Adapted, adapted_coefficients, is_sharded, replaced
from .standin.reading import read_only

# Methods of KAN layers that rewrite coefficients, by the beginning of their names.
_REWRITING = ("update_grid", "initialize_grid", "reset_parameters", "swap")


class Forwarding(nn.Module):
    """What a LoTRALayer looks up on the layer that it wraps."""

    spec: Any
    base_layer: Any
    get_base_layer: Any
    _active_updates: Any

    @property
    def _base_is_zero(self) -> bool:
        """Whether A is zero, held without memory."""
        return False

    @property
    def _paths(self) -> list[str]:
        return [path for path in (self.spec.parameter, self.spec.scale) if path is not None]

    @property
    def weight(self) -> torch.Tensor:
        """As any name of the base layer: adapted, if it is that of the coefficients. PEFT's class gives the base's."""
        value: torch.Tensor = self.__getattr__("weight")
        return value

    def _adapted_for_methods(self) -> AbstractContextManager[object]:
        """While this is entered, the base layer finds A_ft where its coefficients are, also outside of forward."""
        layer, updates = self.get_base_layer(), self._active_updates()
        if updates and is_sharded(layer, self.spec, updates):
            return replaced(layer, self.spec, adapted_coefficients(layer, self.spec, updates).contiguous())
        # A regulariser needs the dense coefficients, so no warning is due.
        return Adapted(layer, self.spec, updates, quiet=True, is_zero=self._base_is_zero)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the base layer had when it was wrapped is set there: the wrapper's would be lost with it."""
        if name not in self.__dict__.get("_names_of_base", ()) or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif name in self._paths:
            raise AttributeError(
                f"`{name}` of a {type(self.get_base_layer()).__qualname__} is under a LoTRA adapter, whose update "
                "belongs to the present values: call `merge_and_unload()` or `unload()` on the model first"
            )
        else:
            setattr(self.base_layer, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay on the wrapper: accelerate and torch keep state of modules under such names.
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        value = getattr(self.base_layer, name)
        if any(path.startswith(f"{name}.") for path in self._paths) and self._active_updates():
            raise RuntimeError(
                f"`{name}` of a {type(self.get_base_layer()).__qualname__} holds its adapted coefficients "
                f"`{self.spec.parameter}`, and past the adapter it has those of the base: call the layer itself, "
                f"adapt `{name}` instead of it, or read `base_layer.{name}` if the base is meant"
            )
        if name == self.spec.parameter and (updates := self._active_updates()):
            return read_only(adapted_coefficients(self.get_base_layer(), self.spec, updates))
        if name == self.spec.scale and self._active_updates():
            return read_only(torch.ones_like(value))
        if not ismethod(value):
            return value

        @wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            if name.startswith(_REWRITING):
                raise RuntimeError(
                    f"`{name}` would rewrite coefficients under a LoTRA adapter, whose update belongs to the old "
                    "ones: call `merge_and_unload()` or `unload()` on the model first, then rewrite and adapt anew, "
                    "or leave it out, as pykan's `fit(dataset, update_grid=False)` does"
                )
            with self._adapted_for_methods():
                return value(*args, **kwargs)

        return method
