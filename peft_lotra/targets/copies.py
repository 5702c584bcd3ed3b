"""Layers whose class is not registered but has the name and the parameters of a registered class."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from ..coefficients import copy_of
from ..coefficients.registry import contradiction, qualified_name
from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig


def copies(layers: Mapping[str, nn.Module], known: Collection[str]) -> Iterator[Target]:
    """The tensors of copies of registered classes, except copies inside or around a module of `known`."""
    taken = set(known)
    around = {outer for module in taken for outer in _upwards(module)}
    for module, layer in layers.items():
        copied = copy_of(layer)
        if copied is None or module in around or not taken.isdisjoint(_upwards(module)):
            continue
        for spec in copied.coefficients:
            yield Target(module, spec, copy_of=(qualified_name(type(layer)), copied.original))
            taken.add(module)
            around.update(_upwards(module))


def _upwards(module: str) -> list[str]:
    """The names of a module and of those around it: `"a.b"` -> `["", "a", "a.b"]`."""
    parts = module.split(".") if module else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def warn_of_layouts(model: nn.Module, config: LoTRAConfig, targets: list[Target]) -> None:
    """Warn of each class that is taken for a copy, or whose attributes contradict its layout."""
    if config.is_self_contained:  # the layouts are from the file
        return
    told = set()
    for target in targets:
        layer = model.get_submodule(target.module)
        if type(layer) not in told and (text := contradiction(layer, [target.spec])):
            told.add(type(layer))
            warnings.warn(
                f"the layout that is declared for {target.module}, a {qualified_name(type(layer))}, contradicts its "
                f"attributes: {text}. With a wrong layout an adapter trains, but its ranks lie on other modes; "
                "`peft_lotra.verify_coefficients(model, *sample)` tells",
                stacklevel=2,
            )
    for pair in dict.fromkeys(target.copy_of for target in targets):
        if pair is None:
            continue
        own, original = pair
        layouts = {t.spec.parameter: t.spec.layout.pattern for t in targets if t.copy_of == pair}
        count = len({t.module for t in targets if t.copy_of == pair})
        warnings.warn(
            f"{own}, the class of {count} layer(s), is not registered. It has the name and the parameters of "
            f"{original}, and is taken for a copy with the same layouts, {layouts}. "
            "`peft_lotra.verify_coefficients(model, *sample)` checks them on the base model; "
            f"`peft_lotra.register_kan_layer({own!r}, {original!r})` says that they are right",
            stacklevel=2,
        )


def misfits(layers: Mapping[str, nn.Module]) -> str:
    """Why layers are no copies of the registered classes whose names they have, as text for an error."""
    found = {}
    for layer in layers.values():
        copied = copy_of(layer)
        if copied is not None and not copied.coefficients:
            found[qualified_name(type(layer))] = f"{copied.original}, but {copied.problem}"
    return "".join(f". {own} has the name of {problem}" for own, problem in found.items())
