"""Selects the known coefficient tensors that a config means, by the names of their modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..coefficients.registry import qualified_name
from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig
from ..config.patterns import entries_for, index_of
from ..families.family import shortened
from .copies import misfits
from .linear import layout_of

_HOW_TO_DECLARE = (
    "declare the layer with `register_kan_layer(Layer, {'<parameter>': '<layout>'})` "
    "or `LoTRAConfig(coefficients={'<parameter>': '<layout>'})`, with a layout such as 'i o d' or 'o (i d)' "
    "(i input, o output, d basis)"
)


def select(layers: Mapping[str, nn.Module], known: list[Target], config: LoTRAConfig) -> list[Target]:
    """The targets that remain after the selection by the fields of a config.

    Raises:
        NoMatchingPeftModuleError: if no target remains, or an entry of a field means none.
    """
    if not known:
        classes = dict.fromkeys(qualified_name(type(layer)) for layer in layers.values())
        own = sorted(classes, key=lambda name: name.startswith("torch.nn."))
        named = f", nor are {sorted(config.coefficients)} tensors of it" if config.coefficients else ""
        raise NoMatchingPeftModuleError(
            f"no KAN layer found{misfits(layers)}. "
            "Let `coefficients = peft_lotra.infer_coefficients(model, *sample)` find the layouts on a sample, and "
            f"pass them as `LoTRAConfig(coefficients=coefficients)`.\nOr {_HOW_TO_DECLARE}, and check it by "
            "`verify_coefficients(model, *sample, coefficients=...)`. Linear layers and convolutions, KAN or not, are "
            'adapted by `target_modules="all-linear"`.\n'
            f"No class of this model is registered{named}: {shortened(own, 5)}"
        )
    kan_layers = chosen = list(dict.fromkeys(target.module for target in known))
    if config.target_modules is not None and not config.is_all_linear:
        chosen = [module for module in kan_layers if entries_for(module, config.target_modules)]
        _check_target_modules(config.target_modules, kan_layers, layers)
    given_indices = config.layers_to_transform
    wanted = [given_indices] if isinstance(given_indices, int) else given_indices
    indices = {module: index_of(module, config.layers_pattern) for module in chosen if not is_excluded(config, module)}
    chosen = [module for module, index in indices.items() if wanted is None or index in wanted]
    if not chosen:
        fields = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        given = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
        raise NoMatchingPeftModuleError(f"no KAN layer is left by {given}; the model's KAN layers are {kan_layers}")
    missing = sorted(set(wanted or ()).difference(indices.values()))
    if missing:
        raise NoMatchingPeftModuleError(
            f"`layers_to_transform` names {missing}, but no KAN layer that the other fields leave has such an index; "
            f"there are {sorted({index for index in indices.values() if index is not None})}, of {list(indices)}"
        )
    # `exclude_modules` may also name a module inside a KAN layer that holds one of its tensors.
    kept = set(chosen)
    left = [t for t in known if t.module in kept and not is_excluded(config, t.parameter.rpartition(".")[0])]
    if not left:
        raise NoMatchingPeftModuleError(
            f"`exclude_modules` {config.exclude_modules!r} leaves out every tensor of the layers {chosen}"
        )
    return left


def _check_target_modules(
    target_modules: Collection[str] | str, kan_layers: list[str], layers: Mapping[str, nn.Module]
) -> None:
    """Raise if an entry means no KAN layer. An entry may also mean modules without coefficients; they are skipped."""
    entries = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    used = {entry for module in kan_layers for entry in entries_for(module, target_modules)}
    for entry in sorted(entries - used):
        pattern = target_modules if isinstance(target_modules, str) else [entry]
        others = [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if entries_for(name, pattern)]
        what = f"matches only modules without known coefficients: {others}" if others else "matches no module"
        for name, layer in layers.items():
            found = layout_of(layer) if entries_for(name, pattern) else None
            if found is not None:
                how = {f"{name if entry == target_modules else entry}.weight": {"layout": found[0], "sizes": found[1]}}
                what += '; `target_modules="all-linear"` adapts every linear layer and convolution, and '
                what += f"`coefficients={how}` makes this one known"
                break
        if entry.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            what = 'is no name of a module; write `target_modules="all-linear"`, as a str, for all linear layers'
        raise NoMatchingPeftModuleError(
            f"`target_modules` entry {entry!r} {what}. The model's KAN layers are {kan_layers}; {_HOW_TO_DECLARE}"
        )


def is_excluded(config: LoTRAConfig, module: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keeps adapters off this module."""
    if config.exclude_modules and entries_for(module, config.exclude_modules):
        return True
    return any(f".{name}." in f".{module}." for name in config.modules_to_save or [])
