"""Replaces the weights of an adapter in place by those of a saved adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn

from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig
from ..files.adapter_file import PREFIX, Slot, check_tensor, check_weights, is_adapter_key
from ..layers.lotra import adapted_tensors
from ..layers.slim import SlimLayer
from ..model import LoTRAModel, lotra_model
from ..targets.resolve import resolve_targets
from ..tucker.decomposition import CONTAINERS, MODES, Tucker
from ..tucker.ranks import mode_sizes


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """G, U1, U2, U3 ← those of a saved adapter, in the same memory, so a compiled model is not compiled again.

    >>> slot = PeftModel.from_pretrained(kan, "task-a")  # or get_peft_model, with the largest ranks that will come
    >>> compiled = torch.compile(slot)
    >>> y_a = compiled(x)
    >>> hotswap_adapter(compiled, "task-b")
    >>> y_b = compiled(x)

    The adapter that is overwritten is called the slot. The new adapter must be for the same base and layouts. It must
    not adapt layers that the slot does not adapt, and its ranks must not be above those of the
    slot. If a rank is smaller, the rest of the slot becomes zero. If the new adapter does not adapt a layer of the
    slot, the update of that layer becomes zero. Zeros get no gradients, so training goes on with the new adapter's
    ranks. (The state of an optimizer is not reset.) If the slot has a whole mode, the new factor is multiplied into
    the core, and training goes on in the whole mode. Trained copies of modules (`modules_to_save`), trained token rows
    and biases are replaced, too.

    The slot keeps its config, ranks, `alpha`, dtype, device and flags. A new `alpha` is multiplied into the core,
    G ← G · alpha_new / alpha_slot, because a compiled model holds `alpha` as a constant. The update is that of the
    saved adapter, also after `save_pretrained`. A factor that `set_scale` has set applies to it as before.

    Args:
        model: a PeftModel with LoTRA adapters, or what `torch.compile` makes of it.
        model_name_or_path: the directory of the saved adapter, or its name on the Hub.
        adapter_name: the adapter to overwrite. It keeps its name.
        torch_device: the device that the file is read to, by default the CPU. The slot stays on its own device.
        kwargs: `subfolder`, `revision`, `token` and other arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        TypeError, ValueError: naming what does not fit: the kind of adapter or model, the base, layers, layouts,
            ranks, other trained tensors, a damaged file, or a merged or offloaded slot. Nothing is changed then.
    """
    unknown = sorted(kwargs.keys() - signature(hf_hub_download).parameters)
    if unknown:
        raise TypeError(f"{unknown} are not arguments of this function or of `huggingface_hub.hf_hub_download`")
    lotra_model(model, adapter_name)
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(config, LoTRAConfig):
        raise ValueError(
            f"`model_name_or_path` {model_name_or_path!r} is a {config.peft_type.value} adapter: only LoTRA adapters "
            "can be swapped in here"
        )
    config = LoTRAConfig.from_pretrained(model_name_or_path, **kwargs)
    weights = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    hotswap_adapter_from_state_dict(model, weights, adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: LoTRAConfig
) -> None:
    """`hotswap_adapter` from memory.

    Args:
        model: as for `hotswap_adapter`.
        state_dict: the result of `peft.get_peft_model_state_dict` for the new adapter, or the contents of its file.
        adapter_name: as for `hotswap_adapter`.
        config: the config of the new adapter, as in the `peft_config` of a model that has this adapter.
    """
    tuner = lotra_model(model, adapter_name)
    targets = resolve_targets(tuner.model, config)
    config = config.self_contained(targets)
    factors = {key: tensor for key, tensor in state_dict.items() if is_adapter_key(key)}
    check_weights(config.saved_slots(), factors, "`state_dict`")
    _check_slot(tuner, adapter_name, config, targets)
    model = getattr(model, "_orig_mod", model)
    slot = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    offloaded = sorted(key for key, own in slot.items() if own.is_meta)
    if offloaded:
        raise ValueError(f"{offloaded} of {adapter_name!r} are offloaded (on the meta device): swap before offloading")
    new = [*_factors(tuner, state_dict, adapter_name, config, targets), *_others(slot, state_dict, adapter_name)]
    for own, values in new:
        own.copy_(values)


def _check_slot(tuner: LoTRAModel, adapter_name: str, config: LoTRAConfig, targets: list[Target]) -> None:
    if any(adapter_name in m.merged_adapters for m in tuner.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(f"`adapter_name` {adapter_name!r} is merged into the base: call `unmerge_adapter()` first")
    own_config = tuner.peft_config[adapter_name]
    ours, theirs = ((c.family, c.family and c.family_degree) for c in (own_config, config))
    if ours != theirs:
        raise ValueError(
            f"the new adapter has `family` {theirs[0]}, {adapter_name!r} has {ours[0]}: only the same family can be "
            "swapped; use `load_adapter`"
        )
    tokens, own_tokens = config.trainable_token_indices, tuner.peft_config[adapter_name].trainable_token_indices
    if tokens != own_tokens:
        raise ValueError(
            f"the new adapter has `trainable_token_indices` {tokens}, {adapter_name!r} has {own_tokens}: only rows of "
            "the same tokens can be swapped; use `load_adapter`"
        )
    layers = adapted_tensors(tuner.model, adapter_name)
    missing = [target.parameter for target in targets if target.parameter not in layers]
    if missing:
        raise ValueError(
            f"the new adapter adapts {missing}, which {adapter_name!r} does not: use `load_adapter`, or make a slot "
            "that adapts every layer that will come"
        )
    for target in targets:
        layer = layers[target.parameter]
        ranks, alpha = layer.r[adapter_name], layer.alpha[adapter_name]
        sizes = mode_sizes(target.spec.layout.canonical_shape)
        by_mode = zip((*target.ranks, None), (*ranks, None), sizes, strict=False)  # None: the mode is whole
        if any(own is not None and (size if r is None else r) > own for r, own, size in by_mode):
            raise ValueError(
                f"the new adapter has ranks {target.ranks} for {target.parameter}, above the {ranks} of "
                f"{adapter_name!r}: use `load_adapter`, or make a slot of the largest ranks that will come"
            )
        if alpha == 0 != target.alpha:
            raise ValueError(
                f"{adapter_name!r} has `alpha` 0 for {target.parameter}, so that it holds no update of `alpha` "
                f"{target.alpha}; use `load_adapter`"
            )
    adapted = {target.parameter for target in targets}
    empty = [name for name, layer in layers.items() if isinstance(layer, SlimLayer) and name not in adapted]
    if empty:
        raise ValueError(
            f"the new adapter does not adapt {empty}, which in a Slim KAN have no coefficients without an adapter: "
            "load it onto a dense model"
        )


def _factors(
    tuner: LoTRAModel,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoTRAConfig,
    targets: list[Target],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every factor of the slot, and its new values."""
    keys = {target.parameter: f"{PREFIX}{key}" for key, target in config.saved_targets()}
    alphas = {target.parameter: target.alpha for target in targets}
    for parameter, layer in adapted_tensors(tuner.model, adapter_name).items():
        alpha, own_alpha = alphas.get(parameter, 0.0), layer.alpha[adapter_name]
        slot, new = layer.tucker(adapter_name), {}
        if parameter in keys:
            given = Tucker.of({name: state_dict.get(f"{keys[parameter]}.{name}") for name in CONTAINERS})
            if alpha != own_alpha:
                given = given._replace(core=given.core.to("cpu", torch.float64)).times(alpha / own_alpha)
            new = _as_slot(given, slot, layer.spec.layout.canonical_shape, layer.terms[adapter_name] > 0).named()
        for container, own in slot.named().items():
            values = torch.zeros_like(own)
            if container in new:
                values[tuple(map(slice, new[container].shape))] = new[container].to(values)
                dtype = layer.dtype_in_use(adapter_name)
                if not values.to(dtype).isfinite().all():
                    raise ValueError(
                        f"{container} of {parameter} is too large for {dtype} (with `alpha` {own_alpha} of the "
                        "slot): use `load_adapter`"
                    )
            yield own, values


def _as_slot(new: Tucker, slot: Tucker, shape: tuple[int, ...], is_family: bool) -> Tucker:
    """The same tensor with the factors of the slot: multiplied into the core, or an identity, where they differ."""
    core, terms = new.core, new.core.shape[new.core.dim() - is_family :]  # P
    if "k" in slot.factors and "k" not in new.factors:
        core = core.reshape(*core.shape[:3], math.prod(shape[3:]), *terms)
    if surplus := [mode for mode in new.factors if mode not in slot.factors]:
        core = new._replace(core=core).map(lambda f: f.to("cpu", torch.float64)).absorb(surplus).core
    sizes = dict(zip(MODES, mode_sizes(shape), strict=True))
    factors = {mode: new.factors.get(mode, torch.eye(sizes[mode])) for mode in slot.factors}
    if "k" not in slot.factors:
        core = core.reshape(*core.shape[:3], *shape[3:], *terms)
    return Tucker(core, factors)


def _others(
    slot: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor], adapter_name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every tensor of a trained copy of a module, of token rows and of biases, and its new values."""
    own, new = ({k: v for k, v in tensors.items() if not is_adapter_key(k)} for tensors in (slot, state_dict))
    for key in sorted(own.keys() | new.keys()):
        shapes = [tuple(tensors[key].shape) if key in tensors else None for tensors in (new, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the new adapter has {key} of shape {shapes[0]}, {adapter_name!r} has {shapes[1]}: trained copies "
                "(`modules_to_save`, `trainable_token_indices`) and biases can be swapped for those of the same "
                "modules only; use `load_adapter` instead"
            )
        check_tensor(key, new[key], Slot(own[key].shape, own[key].dtype), "the new adapter")
        yield own[key], new[key].to(own[key])
