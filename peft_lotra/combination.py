"""Weighted combinations of adapters, for `LoTRAModel.add_weighted_adapter`; what adapters hold, read and copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper, merge_utils
from torch import nn

from .coefficients.target import Target
from .config.lotra_config import LoTRAConfig
from .layers.lotra import LoTRALayer, adapted_tensors
from .placement.offloaded import tensors_in_place
from .placement.sharded import full_tensor
from .preserved import is_number
from .tucker.decomposition import MODES, Ranks, Tucker, compress, weighted_sum
from .tucker.ranks import by_mode, check_ranks, choose_ranks

_SUMS = ("cat", "svd", "linear")
_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def combine_adapters(
    model: nn.Module,
    configs: Mapping[str, LoTRAConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: Any,
    density: float | None,
    majority_sign_method: str,
) -> tuple[LoTRAConfig, dict[str, Tucker], dict[str, float]]:
    """The config, the factors and the relative errors of `LoTRAModel.add_weighted_adapter`. `model` is not changed."""
    _check_adapters(model, configs, adapters, weights)
    rule = _checked_rule(combination_type, density, majority_sign_method)
    if rule == "cat" and svd_rank is not None:
        raise ValueError(
            f"`svd_rank` {svd_rank!r} with `combination_type` 'cat', where the ranks add up: use 'svd' to choose ranks"
        )
    layers = adapted_tensors(model)
    layers = {key: layer for key, layer in layers.items() if not layer.lotra_core.keys().isdisjoint(adapters)}
    ranks = {} if rule == "cat" else _ranks(layers, adapters, svd_rank)
    factors, errors = {}, {}
    for parameter, layer in layers.items():
        own = [(weight, name) for weight, name in zip(weights, adapters, strict=True) if name in layer.lotra_core]
        terms = [(float(weight), update_of(layer, name, parameter)) for weight, name in own]
        total = weighted_sum(terms) if rule in _SUMS else _pruned_sum(rule, terms, density, majority_sign_method)
        factors[parameter], errors[parameter] = (total, 0.0) if rule == "cat" else compress(total, ranks[parameter])
    return _config([configs[name] for name in adapters], layers, factors), factors, errors


def container_of_codes(layers: Iterable[LoTRALayer], adapter: str) -> nn.ParameterDict:
    """The container that has the codes of an adapter, shape (tasks, k): that of one layer, for all of them."""
    return next(layer.lotra_codes for layer in layers if adapter in layer.lotra_codes)


@torch.no_grad()
def whole_tucker(layer: LoTRALayer, adapter: str) -> Tucker:
    """The adapter's G and factors, with the parts of all processes if they are sharded."""
    with tensors_in_place(layer):
        return layer.tucker(adapter).map(lambda factor: full_tensor(factor.detach()))


@torch.no_grad()
def update_of(layer: LoTRALayer, adapter: str, parameter: str) -> Tucker:
    """s · Δ in fp64 on the CPU, in memory of its own. G has one axis of positions, of size 1 if there are none."""
    update = whole_tucker(layer, adapter).map(lambda factor: factor.to("cpu", torch.float64, copy=True))
    check_finite(update.tensors(), adapter, parameter)
    return update._replace(core=layer.scaling[adapter] * update.core.reshape(*update.core.shape[:3], -1))


def check_finite(tensors: Iterable[torch.Tensor], adapter: str, parameter: str) -> None:
    """Raise ValueError if something of an adapter is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"the adapter {adapter!r} has NaN or infinity at {parameter}: it is broken")


@torch.no_grad()
def copy_trained(model: nn.Module, adapters: Sequence[str], to: str) -> None:
    """Copy the trained copies of modules and the token rows of `adapters` to the adapter `to`."""
    for wrapper, owners in _trained_copies(model, adapters):
        held, places = wrapper.state_dict(), wrapper.adapter_state_dict_load_map(to)
        for owner in owners:
            for key, source in wrapper.adapter_state_dict_load_map(owner).items():
                held[places[key]].copy_(held[source])


def _trained_copies(model: nn.Module, adapters: Sequence[str]) -> list[tuple[Any, list[str]]]:
    """Every module that can have trained copies or rows, with those of `adapters` that have a copy or rows of it."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return [(w, [name for name in dict.fromkeys(adapters) if name in w._get_available_adapters()]) for w in wrappers]


def _check_adapters(
    model: nn.Module, configs: Mapping[str, LoTRAConfig], adapters: Sequence[str], weights: Sequence[float]
) -> None:
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"`adapters` should be a list of at least one adapter name but is {adapters!r}")
    if unknown := [name for name in adapters if name not in configs]:
        raise ValueError(f"`adapters` names {unknown}, which do not exist: the model has {list(configs)}")
    if len(weights) != len(adapters):
        raise ValueError(f"`weights` should be one number for each of {list(adapters)}, but {weights!r} is passed")
    if wrong := [w for w in weights if not is_number(w)]:
        raise ValueError(f"`weights` should be finite numbers but {wrong} is among the values passed")
    if of_families := [name for name in adapters if configs[name].family is not None]:
        raise ValueError(f"`adapters` {of_families} are for families of tasks: combine those of `adapter_at`")
    if biased := [name for name in adapters if configs[name].bias != "none"]:
        raise ValueError(
            f"`adapters` {biased} have trained biases (`bias`), and only one adapter of a model may have them: merge "
            "it by `merge_and_unload` first, and combine others on top of it"
        )
    if shared := [owners for _, owners in _trained_copies(model, adapters) if len(owners) > 1]:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save: trained copies are not "
            f"combined, and at most one of {shared[0]} may have one"
        )
    if len(tokens := [name for name in adapters if configs[name].trainable_token_indices is not None]) > 1:
        raise ValueError(f"`adapters` {tokens} have `trainable_token_indices`: at most one may have trained rows")


def _checked_rule(combination_type: str, density: float | None, majority_sign_method: str) -> str:
    """`combination_type` without LoRA's "_svd"."""
    rule = combination_type.removesuffix("_svd") if isinstance(combination_type, str) else combination_type
    if rule not in (rules := (*_SUMS, *_PRUNED)):
        raise ValueError(f"`combination_type` should be one of {rules} but the value passed is {combination_type!r}")
    if rule in _SUMS and density is not None:
        raise ValueError(f"`density` {density!r} with `combination_type` {rule!r}, which prunes nothing: leave it out")
    if rule in _PRUNED and not (is_number(density) and 0 < density <= 1):
        raise ValueError(f"`density` should be a number in (0, 1] for `combination_type` {rule!r} but is {density!r}")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(
            f"`majority_sign_method` should be 'total' or 'frequency' but the value passed is {majority_sign_method!r}"
        )
    return rule


def _ranks(layers: Mapping[str, LoTRALayer], adapters: Sequence[str], svd_rank: Any) -> dict[str, Ranks]:
    shapes = {parameter: layer.spec.layout.canonical_shape for parameter, layer in layers.items()}
    if svd_rank is not None and not isinstance(svd_rank, Mapping):
        return choose_ranks(shapes, {}, check_ranks(svd_rank, "svd_rank"), None)
    given = {key: check_ranks(r, f"svd_rank[{key!r}]") for key, r in (svd_rank or {}).items()}
    if unknown := sorted(given.keys() - shapes.keys()):
        raise ValueError(f"`svd_rank` names {unknown}, but the adapted parameters are {list(shapes)}")
    for parameter in layers.keys() - given.keys():
        held = [(*layers[parameter].r[name], None)[:4] for name in adapters if name in layers[parameter].r]
        given[parameter] = by_mode([None if None in r else max(r) for r in zip(*held, strict=True)])
    return choose_ranks(shapes, given, None, None)


def _pruned_sum(
    rule: str, terms: Sequence[tuple[float, Tucker]], density: float | None, majority_sign_method: str
) -> Tucker:
    """The rule's result for the dense updates, as a core with whole modes."""
    updates = [one.dense() for _, one in terms]
    weights = torch.tensor([weight for weight, _ in terms], dtype=updates[0].dtype)
    method = {"majority_sign_method": majority_sign_method} if rule.endswith("ties") else {}
    return Tucker(getattr(merge_utils, rule)(updates, weights, density, **method))


def _config(
    configs: Sequence[LoTRAConfig], layers: Mapping[str, LoTRALayer], factors: Mapping[str, Tucker]
) -> LoTRAConfig:
    """The first config, but with the layout and ranks of every tensor by name."""
    targets = []
    for parameter, layer in layers.items():
        held = factors[parameter].factors
        ranks = by_mode([held[mode].shape[1] if mode in held else None for mode in MODES])
        targets.append(Target(parameter.removesuffix(f".{layer.spec.parameter}"), layer.spec, ranks))
    tokens = [config.trainable_token_indices for config in configs]
    return replace(
        configs[0],
        r=None,
        compression_ratio=None,
        alpha=1.0,
        alpha_pattern={},
        modules_to_save=sorted({entry for config in configs for entry in config.modules_to_save or ()}) or None,
        trainable_token_indices=next((indices for indices in tokens if indices is not None), None),
    ).self_contained(targets)
