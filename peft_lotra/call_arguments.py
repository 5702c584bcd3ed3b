"""What a call says to the adapters by `adapter_names`, `lotra_task` and `batch_axis`, which PEFT removes."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._pytree import tree_leaves

from .calls.context import BASE, Batch, Entry, Shares, Tasks, entered, fields_of_family, now
from .calls.samples import check_known, checked_axis
from .combination import container_of_codes
from .config.lotra_config import LoTRAConfig
from .families import family as families
from .layers.lotra import LoTRALayer, adapted_tensors
from .placement.constants import constant
from .placement.sharded import full_tensor, is_released
from .registration import AXIS, TASK


def in_context(
    model: nn.Module, configs: Mapping[str, LoTRAConfig], active: Sequence[str], arguments: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """A context in which the adapted layers of a base model have the arguments of the call, which are checked."""
    names, task, axis = arguments.get("adapter_names"), arguments.get(TASK), arguments.get(AXIS)
    if axis is not None and names is None and task is None:
        raise ValueError(
            f"`{AXIS}`={axis!r} without `adapter_names` or `{TASK}`: leave it out, or give it to the `at_task` around"
        )
    context = now()
    entries: list[Entry] = []
    if names is None and (not context.known or any([isinstance(entry, Batch | Shares) for entry in context.entries])):
        entries.append(Batch())  # names of a call around this one are not for this one
    if names is None and task is None:
        return entered(*entries)
    axis = 0 if axis is None else checked_axis(axis)
    # Generation repeats every sample, but not for the encoder of an encoder-decoder model.
    repeats = max(arguments.get("num_beams") or 1, arguments.get("num_return_sequences") or 1)
    encoder = _encoder(model, repeats)
    if names is not None:
        entries.append(_batch(model, names, repeats, encoder, axis))
    if task is not None:
        used = active if names is None else dict.fromkeys(names)
        kinds = {name: kind for name in used if name in configs and (kind := configs[name].kind) is not None}
        if not kinds:
            raise ValueError(
                f"`{TASK}` {task!r}: none of the adapters {list(used)} is for a family of tasks "
                "(`LoTRAConfig(family=...)`); leave it out, or call `set_adapter` with a family's adapter"
            )
        tasks = tasks_for(model, configs, kinds, task, axis, TASK if names is None else None)
        repeated = {name: _repeated(c, repeats) for name, c in tasks.weights.items()}
        entries.append(Tasks(tasks.layers, repeated, axis, configs, tasks.families))
        if encoder:
            entries.append(Tasks(encoder, tasks.weights, axis, configs, tasks.families))
    for module in {module for entry in entries if isinstance(entry, Batch) for module in entry.modules or ()}:
        if isinstance(module, AuxiliaryTrainingWrapper):
            _tell(module)
    return entered(*entries)


def tasks_for(
    model: nn.Module,
    configs: Mapping[str, LoTRAConfig],
    kinds: Mapping[str, families.Family],
    task: Any,
    axis: int,
    argument: str | None,
) -> Tasks:
    """What `model` is to have in its context at a task, in a form that `Family.named` takes.

    `kinds` are the families that may be meant, by adapter, `configs` those of all adapters. If only active adapters
    use the task, `argument` names it, and it is an error if none does.
    """
    found = list(adapted_tensors(model).values())

    def codes(name: str) -> Callable[[], torch.Tensor]:
        held: Any = container_of_codes(found, name)

        def table() -> torch.Tensor:
            codes = held._parameters[name]
            if is_released(codes):
                raise RuntimeError(
                    f"ZeRO-3 keeps the codes of {name!r} in parts outside of forward: give the task to the call, "
                    f"as in `model(x, lotra_task={task!r})`, where they are gathered"
                )
            return full_tensor(codes)

        return table

    alike: dict[str, torch.Tensor] = {}  # a core of each family whose cores are alike
    for name in kinds:
        cores = [layer.lotra_core[name] for layer in found if name in layer.lotra_core]
        if len({(core.dtype, core.device) for core in cores}) == 1 and not cores[0].is_meta:
            alike[name] = cores[0]
    weights = families.weights_of(kinds, task, codes, {name: core.device for name, core in alike.items()})
    active = {name for layer in found for name in layer.active_adapters if name in layer.lotra_core}
    used = {name for layer in found for name in active if name in layer.lotra_core.keys() - layer.merged_adapters}
    if argument is not None and not weights.keys() & used:
        merged = [name for name in weights if name in active]
        instead = f"call `set_adapter` first, or pass the task as `{TASK}`, beside `adapter_names`, to the call"
        said = [f"`{TASK}` {task!r}"] if argument == TASK else [f"`{k}`={reprlib.repr(v)}" for k, v in task.items()]
        raise ValueError(
            f"{', '.join(said)} is for {merged or list(weights)}, "
            + ("merged at another task: call `unmerge_adapter()` first" if merged else f"not active: {instead}")
        )
    of_numbers = not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(task))
    for name, c in weights.items():  # once for all layers
        if name in alike and isinstance(c, torch.Tensor):
            like = alike[name]
            known = c.dim() == 1 and c.device != like.device and families.is_readable(c) and of_numbers
            of_task = constant(tuple(c.tolist()), like.device, like.dtype) if known else c
            weights[name] = of_task.to(like.device, like.dtype)
    meant = {name: fields_of_family(configs[name]) for name in weights}
    return Tasks(set(found), weights, axis, configs, meant)


def _repeated(c: Any, repeats: int) -> Any:
    """c, or what gives it, with that of each sample several times."""
    if not isinstance(c, torch.Tensor):
        return lambda: _repeated(c(), repeats)
    return c if c.dim() == 1 else c.repeat_interleave(repeats, dim=0)


def _batch(model: nn.Module, names: Sequence[str], repeats: int, encoder: set[nn.Module], axis: int) -> Batch:
    if not isinstance(names, list | tuple) or not all([isinstance(name, str) for name in names]):
        raise TypeError(f"`adapter_names` should be a list with a name for each sample, but {names!r} is passed")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    modules = set(model.modules())
    held = [module.lotra_core for module in modules if isinstance(module, LoTRALayer)]
    unknown = {name for name in {*names} - {BASE} if not any([name in cores for cores in held])}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    if axis != 0 and any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules):
        raise ValueError(f"`{AXIS}`={axis} with `modules_to_save` or token rows, which take samples on the first axis")
    repeated = tuple([name for name in names for _ in range(repeats)])
    return Batch(repeated, modules, axis, tuple(names), encoder)


def _encoder(model: Any, repeats: int) -> set[nn.Module]:
    """The modules of the encoder, which sees each sample once while other modules see repeated samples."""
    encoder = model.get_encoder() if repeats > 1 and hasattr(model, "get_encoder") else model
    return set() if encoder in (None, model) else set(encoder.modules())  # models without one may return themselves


# PEFT's own modules take the names as an argument --------------------------------------------------------------------

_lock = threading.Lock()


def _tell(module: nn.Module) -> None:
    """From now on, pass the names of each running call to one of PEFT's own modules."""
    with _lock:
        if _pass_names_on not in module._forward_pre_hooks.values():
            module._had_names = True  # type: ignore[assignment]
            module.register_forward_pre_hook(_pass_names_on, with_kwargs=True)
            module.register_forward_hook(_use_copies, with_kwargs=True)


def _pass_names_on(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    context = now()
    batch = context.batch(module)
    if batch is None:
        check_known(context, module)
    if not isinstance(batch, Batch) or not batch.names or module.disable_adapters:
        return None  # PEFT's modules fail on a batch without samples, and on names while adapters are disabled
    names = [name if name in module._adapters else BASE for name in batch.names_for(module) or ()]
    return args, kwargs | {"adapter_names": names}


def _use_copies(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Without this, PEFT's modules ignore the names if the active adapter has no copy."""
    if "adapter_names" not in kwargs or module._adapters.issuperset(module.active_adapters):
        return output
    return module._mixed_batch_forward(*args, **kwargs)
