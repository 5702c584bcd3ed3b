"""Resolves a config for a model: which coefficient tensors are adapted, with which ranks and `alpha`."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import _get_input_embeddings_name, get_pattern_key
from torch import nn

from ..coefficients import CoefficientSpec, known_coefficients
from ..coefficients.spec import is_stacked, numbered, owner_of, tensor_at
from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig
from ..config.patterns import ENDING, check_expressions, means, pattern_value
from ..families.family import shortened
from ..layers.lotra import LoTRALayer, adapted_tensors
from ..tucker.decomposition import CONTAINERS, core_count, parameter_count
from ..tucker.ranks import DEFAULT_COMPRESSION_RATIO, by_mode, choose_ranks
from .base_model import BaseModel, around, naming_layer
from .copies import copies
from .linear import layout_of, linear_targets
from .selection import select

# Modules that have no forward and hold parameters for the module around them.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# The names that PEFT adds to `modules_to_save` for a task type, whether the model has them or not. It adds those of
# TOKEN_CLS for SEQ_CLS, too.
HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
NAMES_OF_HEADS = sum(HEADS.values(), ())


def resolve_targets(model: nn.Module, config: LoTRAConfig) -> list[Target]:
    """The coefficient tensors of `model` that `config` selects, with ranks and `alpha`; nothing is changed.

    They are in the order of the modules, and within one module in the order of nesting.

    Args:
        model: a base model, which may have adapters already.
        config: the config.

    Raises:
        NoMatchingPeftModuleError: naming what was looked for and not found.
        ValueError: naming the layer and the field that do not fit the model or its adapters.
    """
    base = BaseModel.of(model)
    _check_task(model, config)
    _check_modules_to_save(config, base.layers)
    known = _known_targets(base, config)
    if config.is_all_linear:
        known = _in_order(base, known + linear_targets(model, base, known, config))
    if config.is_self_contained:
        selected = [target for target in known if target.parameter in config.coefficients]
    else:
        selected = select(base.layers, known, config)
    _check_tensors(model, base.layers, selected)
    targets = _with_ranks(selected, config)
    _check_tokens(model, base.layers, config)
    adapted = adapted_tensors(model)
    for target in targets:
        _check_inside(config, target, [name for name, _ in base.layers[target.module].named_children()])
        _check_earlier(target, adapted.get(target.parameter))
    return targets


def _known_targets(base: BaseModel, config: LoTRAConfig) -> list[Target]:
    """Every coefficient tensor that is registered or given in `config.coefficients`. The config takes precedence.

    For a self-contained config, only `coefficients` count, so it means the same on every machine.
    """
    layers = base.layers
    targets: dict[str, Target] = {}  # by full parameter name
    for module, layer in () if config.is_self_contained else layers.items():
        with naming_layer(module):
            for spec in known_coefficients(layer):
                target = Target(module, spec)
                targets[target.parameter] = target
    registered = {target.module for target in targets.values()}
    for parameter, key in _given_parameters(base.parameters, config):
        description = config.coefficients[key]
        given = description.get("layer") if isinstance(description, Mapping) else None
        own = _linear_layer_of(parameter, description, layers, registered)
        literal = re.escape(key) if is_stacked(description) else key
        module = (own or _layer_of(parameter, literal, layers)) if given is None else given
        if module not in layers or not parameter.startswith(f"{module}." if module else ""):
            raise ValueError(
                f"`coefficients[{key!r}]` gives the layer {module!r}, which is not a module around {parameter} "
                "that can be adapted"
            )
        with naming_layer(module):
            spec = CoefficientSpec.resolve(layers[module], parameter.removeprefix(f"{module}."), description)
        targets[parameter] = Target(module, spec)
    modules = {target.module for target in targets.values()}
    for target in [] if config.is_self_contained else copies(layers, modules):
        targets[target.parameter] = target
        modules.add(target.module)
    if "" in modules:
        raise ValueError(
            "the model itself is a KAN layer, and PEFT adapts modules inside a model: "
            "wrap it, as in nn.Sequential(layer)"
        )
    for inner in modules:
        outer = next((name for name in around(inner) if name in modules), None)
        if outer is not None:
            raise ValueError(
                f"the KAN layer {inner} lies inside the KAN layer {outer}, and both cannot be wrapped: "
                "give `coefficients` for one of them only"
            )
    return _in_order(base, list(targets.values()))


def _in_order(base: BaseModel, targets: list[Target]) -> list[Target]:
    """The targets in the order of the modules, and within one module in the order of nesting."""
    order = {module: position for position, module in enumerate(base.layers)}
    return sorted(targets, key=lambda target: (order[target.module], target.spec.nesting))


def _given_parameters(parameters: list[str], config: LoTRAConfig) -> list[tuple[str, str]]:
    """Each parameter that `config.coefficients` means, with its key: the full name, or else the first pattern."""
    stacks = [key for key, description in config.coefficients.items() if is_stacked(description)]
    full_names = set(config.coefficients) & set(parameters)
    patterns = [key for key in config.coefficients if key not in full_names.union(stacks)]
    patterns = [] if config.is_self_contained else patterns
    check_expressions("coefficients", patterns, ENDING)
    given = []
    for key in stacks:
        matches = [match for parameter in parameters if (match := numbered(key).fullmatch(parameter))]
        matches = [match for match in matches if match[1] is None] or matches  # a full name means one stack
        found = [key if match[1] is None else f"{match[1]}.{key}" for match in matches]
        stacked = {match[0] for match in matches}
        parameters = [parameter for parameter in parameters if parameter not in stacked]
        given += [(stack, key) for stack in dict.fromkeys(found)]
    for parameter in parameters:
        key = parameter if parameter in full_names else get_pattern_key(patterns, parameter)
        if key in config.coefficients:
            given.append((parameter, key))
    unmatched = sorted(set(config.coefficients) - {key for _, key in given})
    for key in unmatched:
        taken = {parameter: other for parameter, other in given if means(key, parameter)}
        if taken:
            raise ValueError(
                f"`coefficients` key {key!r} means only parameters that other keys take, {taken}: a full name takes "
                "precedence over a pattern, and a pattern over those after it; put the narrower pattern first, or "
                "leave this key out"
            )
    if unmatched:
        raise ValueError(
            f"`coefficients` names {unmatched}, which match no parameter of this model; it has "
            f"{shortened(parameters)}. Is the adapter meant for another base model?"
        )
    return given


def _linear_layer_of(
    parameter: str, description: Any, layers: Mapping[str, nn.Module], registered: Collection[str]
) -> str | None:
    """The linear layer or convolution whose own `weight` is described, unless it lies in a registered KAN layer."""
    module = parameter.rpartition(".")[0]
    sizes = description.get("sizes") if isinstance(description, Mapping) else None
    if (sizes or {}).get("d") != 1 or module not in layers or layout_of(layers[module]) is None:
        return None
    return None if any(name in registered for name in around(module)) else module


def _layer_of(parameter: str, key: str, layers: Mapping[str, nn.Module]) -> str:
    """The module that a `coefficients` key means: the part of the name before the key, or the parameter's owner."""
    if parameter != key:
        found = means(key, parameter)
        if found is not None and found[1] is not None:
            return found[1].removesuffix(".")
    module = parameter.rpartition(".")[0]
    while isinstance(layers.get(module), _CONTAINERS) or ("*" in module and module not in layers):
        module = module.rpartition(".")[0]
    return module


def _check_tensors(model: nn.Module, layers: Mapping[str, nn.Module], targets: list[Target]) -> None:
    """Refuse a tensor that its module computes, which no stand-in could replace, or that the model uses twice."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    of_adapters: set[nn.Module] = set()  # of which a model may hold thousands
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
        if isinstance(module, LoTRALayer):
            of_adapters.update(module.containers())
        if module not in of_adapters:
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                names[id(tensor)].append(f"{name}.{key}".removeprefix("."))
    for target in targets:
        layer, spec = layers[target.module], target.spec
        for path in spec.paths:
            owner, name = owner_of(layer, path)
            if name not in owner._parameters and name not in owner._buffers:
                raise ValueError(
                    f"`{path}` of the KAN layer {target.module} ({type(owner).__qualname__}) is computed from other "
                    "tensors, by a parametrization, pruning or another adapter, and cannot be adapted: make it a "
                    f"parameter first (torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}), "
                    f"torch.nn.utils.prune.remove(module, {name!r}), torch.nn.utils.remove_weight_norm, or "
                    "merge_and_unload), or leave the layer out by `exclude_modules`"
                )
        for thing in (layer, *[tensor_at(layer, path) for path in spec.parameters]):
            if len(names[id(thing)]) > 1:
                raise ValueError(
                    f"{target.parameter} cannot be adapted: the model has the same object under the names "
                    f"{names[id(thing)]}; untie them (copy.deepcopy) or leave them out by `exclude_modules`"
                )


def _check_task(model: nn.Module, config: LoTRAConfig) -> None:
    task = config.task_type
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type` {task!r} is for models that generate, by `prepare_inputs_for_generation`, which a "
            f"{type(model).__name__} does not have: leave `task_type` out"
        )


def _check_modules_to_save(config: LoTRAConfig, layers: Mapping[str, nn.Module]) -> None:
    for entry in config.modules_to_save or ():
        container = next((name for name in CONTAINERS if name.endswith(entry)), None)
        if container is not None:
            raise ValueError(
                f"`modules_to_save` entry {entry!r}: PEFT compares endings, and the adapter's own {container} has "
                "this one too; give a longer part of the module's name, or rename the module"
            )
        # With a task type, PEFT adds all names that a head may have. The model needs only one of them.
        added = config.task_type is not None and entry in NAMES_OF_HEADS
        added = added and any(name.endswith(NAMES_OF_HEADS) for name in layers)
        if not added and not any(name.endswith(entry) for name in layers):
            raise ValueError(
                f"`modules_to_save` entry {entry!r} matches no module; the model has "
                f"{shortened([name for name in layers if name])}"
            )


def _check_inside(config: LoTRAConfig, target: Target, children: list[str]) -> None:
    """Refuse modules to save in an adapted layer."""
    for child in children:  # PEFT also refuses them, but only after it has put adapters into the model
        entry = next((e for e in config.modules_to_save or () if f"{target.module}.{child}".endswith(e)), None)
        if entry is not None:
            raise ValueError(
                f"`modules_to_save` entry {entry!r} means {target.module}.{child}, inside an adapted layer, "
                "where PEFT saves no module: leave it frozen, or name the layer, which is then trained in full"
            )


def _check_tokens(model: nn.Module, layers: Mapping[str, nn.Module], config: LoTRAConfig) -> None:
    # PEFT also refuses them, but only after it has put adapters into the model.
    tokens = config.trainable_token_indices
    if tokens is not None and not isinstance(tokens, Mapping):
        tokens = {_get_input_embeddings_name(model, "embed_tokens") or "": tokens}
    for name, indices in (tokens or {}).items():
        embedding = next((layer for key, layer in layers.items() if key.endswith(name)), None)
        rows = getattr(embedding, "weight", torch.empty(0)).shape[0]
        if any(not 0 <= index < rows for index in indices) or not rows:
            raise ValueError(
                f"`trainable_token_indices` gives the rows {indices} of {name!r}, which has {rows} rows in this "
                "model: give rows that exist, by the name of an embedding"
            )


def _check_earlier(target: Target, layer: LoTRALayer | None) -> None:
    """Refuse an adapter beside one of the same tensor that is described in another way."""
    if layer is not None and layer.spec != target.spec:
        raise ValueError(
            f"{target.parameter} is adapted already with {layer.spec.describe()}; a further adapter must "
            f"describe it in the same way, got {target.spec.describe()}"
        )


def warn_of_no_effect(config: LoTRAConfig, targets: list[Target]) -> None:
    """Warn of fields without effect: `alpha` 0, and keys of patterns for which earlier keys take everything.

    Also warn of an adapter that saves little, because the KAN is small.
    """
    if config.r is None and config.compression_ratio is None and not config.rank_pattern:
        shapes = {target.parameter: target.spec.layout.canonical_shape for target in targets}
        count = core_count if config.freeze_factors else parameter_count
        trained = sum(count(shapes[target.parameter], target.ranks, config.terms) for target in targets)
        total = sum(map(math.prod, shapes.values()))
        if trained > 2 * DEFAULT_COMPRESSION_RATIO * total:
            warnings.warn(
                f"the adapter has {trained} numbers, {trained / total:.0%} of the {total} coefficients of these "
                f"{len(targets)} tensors: with less than the ranks (4, 4, whole), small layers learn little. Give `r` "
                "or `compression_ratio` for another size; such a small KAN may also be trained as a whole, by "
                "`fit_gauss_newton` on the KAN itself",
                stacklevel=2,
            )
    idle = [target.parameter for target in targets if target.alpha == 0]
    if idle:
        warnings.warn(f"`alpha` is 0 for {idle}: the adapter changes nothing there and gets no gradient", stacklevel=2)
    modules, parameters = list(dict.fromkeys(t.module for t in targets)), {t.parameter for t in targets}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name)
        keys = [key for key in pattern if key not in parameters]
        unnamed = [module for module in modules if module not in pattern]
        first = {get_pattern_key(keys, module) for module in unnamed}  # the key that counts
        for key in keys:
            meant = [module for module in unnamed if means(key, module)]
            if meant and key not in first:
                warnings.warn(
                    f"`{name}` key {key!r} has no effect: the first key that fits counts, and earlier keys take all "
                    f"that this one means, {meant}; put the narrower key first",
                    stacklevel=2,
                )
        paths = {path for value in pattern.values() if isinstance(value, Mapping) for path in value}
        unknown = sorted(paths.difference(target.spec.parameter for target in targets))
        if unknown:
            warnings.warn(f"`{name}` names {unknown}, of which no adapted layer has coefficients", stacklevel=2)


def _with_ranks(targets: list[Target], config: LoTRAConfig) -> list[Target]:
    """The targets with their ranks and alpha."""
    given = _given_by_pattern(targets, config, "rank_pattern")
    alphas = _given_by_pattern(targets, config, "alpha_pattern")
    shapes = {target.parameter: target.spec.layout.canonical_shape for target in targets}
    ranks = choose_ranks(shapes, given, config.r, config.compression_ratio, config.freeze_factors, config.terms)
    if config.is_self_contained:  # a factor of full size in the file stays a factor
        ranks = {parameter: by_mode(r) for parameter, r in given.items()}
    return [
        replace(target, ranks=ranks[target.parameter], alpha=alphas.get(target.parameter, config.alpha))
        for target in targets
    ]


def _given_by_pattern(targets: list[Target], config: LoTRAConfig, field: str) -> dict[str, Any]:
    """The value that a pattern of the config gives for each parameter. Parameters without a value are left out."""
    pattern: Mapping[str, Any] = getattr(config, field)
    parameters = {target.parameter for target in targets}
    others = {key: value for key, value in pattern.items() if key not in parameters}
    if not config.is_self_contained:
        check_expressions(field, others, ENDING)
    found = {}
    for target in targets:
        by_module = pattern_value(others, target.module, target.spec.parameter)
        found[target.parameter] = pattern.get(target.parameter, by_module)
    return {parameter: value for parameter, value in found.items() if value is not None}
