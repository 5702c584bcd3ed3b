"""Lets a wrapper read the attributes of the layer that it wraps, with adapted coefficients, and write them there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import wraps
from inspect import ismethod
from typing import Any

import torch
from torch import nn

from ..coefficients.spec import is_quantized_at, tensor_at
from ..placement.sharded import checksum
from ..standin import Adapted, adapted_coefficients, check_dense, is_sharded, replaced
from ..standin.reading import read_only

# The beginnings of the names of methods of KAN layers that rewrite coefficients.
_REWRITING = ("update_grid", "initialize_grid", "reset_parameters", "swap")


class Forwarding(nn.Module):
    """Access of a LoTRALayer to the attributes and methods of the layer that it wraps."""

    _merged_sums: list[int]

    @property
    def _paths(self) -> Any:
        return self.spec.paths

    @property
    def _is_quantized(self) -> bool:
        """Whether the layer itself computes with the coefficients, and their update is added to its output."""
        return is_quantized_at(self.get_base_layer(), self.spec.parameter)

    @property
    def weight(self) -> Any:
        """The base layer's `weight`, adapted if it holds the coefficients. (PEFT's class would return the base's.)"""
        return self.__getattr__("weight")

    def _adapted_for_methods(self) -> AbstractContextManager[object]:
        """While this is entered, the base layer finds A_ft in place of its coefficients, also outside of forward."""
        layer, updates = self.get_base_layer(), self._active_updates()
        if updates and is_sharded(layer, self.spec, updates):
            return replaced(layer, self.spec, adapted_coefficients(layer, self.spec, updates).contiguous())
        # A regulariser needs the dense coefficients, so no warning is due.
        return Adapted(layer, self.spec, updates, quiet=True)

    def _stored(self, path: str) -> torch.Tensor:
        return tensor_at(self.get_base_layer(), path)

    def _check_mergeable(self, adapter_names: Iterable[str]) -> None:
        """Raise if the update of an adapter cannot be added to the coefficients, and nothing is changed."""
        check_dense(self.get_base_layer(), self.spec)
        for name in adapter_names:
            if name in self.lotra_core and self.terms[name] and name not in self.merged_adapters:
                self._update(name).check_common()

    def _sums(self) -> list[int]:
        return [checksum(self._stored(path)) for path in self._paths]

    def _check_unwritten(self) -> None:
        for path, before, now in zip(self._paths, self._merged_sums, self._sums(), strict=False):
            if now != before:
                raise RuntimeError(
                    f"`{path}` of a {type(self.get_base_layer()).__qualname__} has been written to since "
                    f"{self.merged_adapters} were merged into it, and to unmerge them would lose that: keep the "
                    "values by `merge_and_unload()`, or write the merged ones back"
                )

    def _apply(self, *args: Any, **kwargs: Any) -> Forwarding:
        unwritten = bool(self._merged_sums) and self._merged_sums == self._sums()
        super()._apply(*args, **kwargs)
        if unwritten:
            self._merged_sums = self._sums()  # casts are no writes
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes of the base layer on the base layer. On the wrapper, they would be lost with it."""
        if name not in self.__dict__.get("_names_of_base", ()) or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif name in self._paths:
            raise AttributeError(
                f"`{name}` of a {type(self.get_base_layer()).__qualname__} is under a LoTRA adapter, whose update "
                "belongs to the present coefficients: call `merge_and_unload()` or `unload()` on the model first"
            )
        else:
            setattr(self.base_layer, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay on the wrapper. accelerate and torch use such names for the state of a module.
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        value = getattr(self.base_layer, name)
        if any(path.startswith(f"{name}.") for path in self._paths) and self._active_updates():
            raise RuntimeError(
                f"`{name}` of a {type(self.get_base_layer()).__qualname__} holds its adapted coefficients "
                f"`{self.spec.parameter}`, and would show those of the base, without the update: call the layer "
                f"itself, adapt `{name}` instead of it, or read `base_layer.{name}` if the base is meant"
            )
        if name in (self.spec.parameter, *self.spec.parts) and (updates := self._active_updates()):
            adapted = adapted_coefficients(self.get_base_layer(), self.spec, updates)
            return read_only(adapted[self.spec.parts.index(name)] if self.spec.parts else adapted)
        if name == self.spec.scale and self._active_updates():
            return read_only(torch.ones_like(value))
        if not ismethod(value):
            return value

        @wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            if name.startswith(_REWRITING):
                raise RuntimeError(
                    f"`{name}` would rewrite coefficients under a LoTRA adapter, whose update belongs to the old "
                    "ones: call `merge_and_unload()` or `unload()` on the model first, then rewrite and adapt again, "
                    "or leave it out, as pykan's `fit(dataset, update_grid=False)` does"
                )
            with self._adapted_for_methods():
                return value(*args, **kwargs)

        return method
