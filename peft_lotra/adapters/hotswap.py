"""Replaces the weights of an adapter in place by those of a saved adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..calls.exclusion import changing
from ..coefficients.spec import owner_of
from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig
from ..files.adapter_file import PREFIX, Slot, check_tensor, check_weights, is_tucker_key
from ..files.slots import slots_of
from ..layers.lotra import LoTRALayer, adapted_tensors
from ..model import LoTRAModel, lotra_model
from ..placement.sharded import any_sharded
from ..targets.resolve import resolve_targets
from ..tucker.decomposition import CONTAINERS, Tucker


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
    if unknown := sorted(kwargs.keys() - signature(hf_hub_download).parameters):
        raise TypeError(f"{unknown} are not arguments of this function or of `huggingface_hub.hf_hub_download`")
    lotra_model(model, adapter_name)
    config = LoTRAConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(config, LoTRAConfig):
        raise ValueError(
            f"`model_name_or_path` {model_name_or_path!r} is a {config.peft_type.value} adapter: only LoTRA adapters "
            "can be swapped in here"
        )
    if config._saved is None:
        raise ValueError(f"`model_name_or_path` {model_name_or_path!r} has no adapter file")
    weights = {key: tensor.to(torch_device or "cpu") for key, tensor in config._saved.weights.items()}
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
    layers = adapted_tensors(tuner.model, adapter_name)
    _check_slot(tuner, adapter_name, layers, config, {target.parameter for target in targets})
    places = slots_of(tuner.model, adapter_name, config.bias)
    held = {name: _tensor_at(tuner.model, name) for name, _ in places.values()}
    if any_sharded(held.values()):
        raise ValueError(
            f"{adapter_name!r} is sharded (FSDP2): each process has a part of its tensors, and none can be swapped in "
            "alone; load the new adapter into the model before `fully_shard`, or by `set_model_state_dict`"
        )
    if offloaded := sorted(key for key, (name, _) in places.items() if held[name].is_meta):
        raise ValueError(f"{offloaded} of {adapter_name!r} are offloaded (on the meta device): swap before offloading")
    others = {f"{PREFIX}{key}": place for key, place in places.items() if not is_tucker_key(key)}
    check_weights(config.saved_slots() | {key: slot for key, (_, slot) in others.items()}, state_dict, "`state_dict`")
    new = [(held[name], state_dict[key]) for key, (name, _) in others.items()]
    keys = {target.parameter: f"{PREFIX}{key}" for key, target in config.saved_targets()}
    for target in targets:
        key, layer = keys[target.parameter], layers.pop(target.parameter)
        update = Tucker.of({name: state_dict.get(f"{key}.{name}") for name in CONTAINERS})
        origin = f"the new adapter, with the `alpha` {layer.alpha[adapter_name]} of {adapter_name!r},"
        for name, own, values in _values(layer, adapter_name, target, update):
            check_tensor(f"{key}.{name}", values, Slot(own.shape, layer.dtype_in_use(adapter_name)), origin)
            new.append((own, values))
    for layer in layers.values():  # which the new adapter does not adapt
        new += [(own, torch.zeros(())) for own in layer.tucker(adapter_name).tensors()]
    with changing(tuner.model):
        for own, values in new:
            own.copy_(values)


def _tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    """The tensor of this name in the model's state dict, which would also collect those of all other adapters."""
    owner, key = owner_of(model, name)
    held: Mapping[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    return held[key]  # type: ignore[no-any-return]


def _check_slot(
    tuner: LoTRAModel, adapter_name: str, layers: Mapping[str, LoTRALayer], config: LoTRAConfig, adapted: set[str]
) -> None:
    """Raise ValueError if the slot is merged, is of another kind than the new adapter, or has other layers."""
    if any(adapter_name in m.merged_adapters for m in tuner.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(f"`adapter_name` {adapter_name!r} is merged into the base: call `unmerge_adapter()` first")
    own = tuner.peft_config[adapter_name]
    fields = ["family", "modules_to_save", "trainable_token_indices", "bias"]
    for name in fields if config.family is None else [*fields, "family_degree", "family_code"]:
        ours, theirs = getattr(own, name), getattr(config, name)
        if name == "modules_to_save":
            ours, theirs = set(ours or ()), set(theirs or ())
        if ours != theirs:
            raise ValueError(
                f"the new adapter has `{name}` {theirs}, {adapter_name!r} has {ours}: only adapters with the same "
                f"`{name}` can be swapped; use `load_adapter`"
            )
    if missing := sorted(adapted - layers.keys()):
        raise ValueError(
            f"the new adapter adapts {missing}, which {adapter_name!r} does not: use `load_adapter`, or make a slot "
            "that adapts every layer that will come"
        )


def _values(
    layer: LoTRALayer, adapter_name: str, target: Target, update: Tucker
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The name of G and of every factor of the slot, the tensor itself, and its values for the new adapter's update.

    Factors that the slot does not have are multiplied into the core, and those that the update does not have are
    identities. Above the update's ranks, the values are zero.
    """
    slot, alpha = layer.tucker(adapter_name), layer.alpha[adapter_name]
    if alpha == 0 != target.alpha:
        raise ValueError(
            f"{adapter_name!r} has `alpha` 0 for {target.parameter}, so that it holds no update of `alpha` "
            f"{target.alpha}; use `load_adapter`"
        )
    ratio = target.alpha / alpha if alpha else 1.0
    surplus = [mode for mode in update.factors if mode not in slot.factors]
    if surplus or ratio != 1:
        update = update.map(lambda factor: factor.to("cpu", torch.float64)).times(ratio)
    # With the positions as one axis, in both cores, they are a mode like the others.
    terms = slot.core.shape[slot.core.dim() - (layer.terms[adapter_name] > 0) :]
    update, room = (one._replace(core=one.core.reshape(*one.core.shape[:3], -1, *terms)) for one in (update, slot))
    core, factors = update.absorb(surplus)
    if any(size > own for size, own in zip(core.shape, room.core.shape, strict=True)):
        raise ValueError(
            f"the new adapter has ranks {target.ranks} for {target.parameter}, above the {layer.r[adapter_name]} of "
            f"{adapter_name!r}: use `load_adapter`, or make a slot of the largest ranks that will come"
        )
    given = [core, *[factors.get(mode, torch.eye(len(U))) for mode, U in slot.factors.items()]]
    for (name, own), place, part in zip(slot.named().items(), room.tensors(), given, strict=True):
        values = part.new_zeros(place.shape)
        values[tuple(map(slice, part.shape))] = part
        yield name, own, values.reshape(own.shape)
