"""Uses an adapter for a family of tasks: sets the task of a forward pass, and makes adapters for single tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..call_arguments import tasks_for
from ..calls.context import entered
from ..calls.exclusion import changing
from ..calls.samples import checked_axis
from ..combination import container_of_codes, copy_trained, whole_tucker
from ..config.lotra_config import LoTRAConfig
from ..families.family import Family
from ..files.adapter_file import Slot, check_weights, digest, naming
from ..layers.lotra import adapted_tensors
from ..model import LoTRAModel, lotra_model
from ..placement.sharded import full_tensor
from ..tucker.decomposition import CORE
from .beside_calls import beside_calls
from .family_growth import add_task


@contextmanager
def at_task(model: nn.Module, *, batch_axis: int = 0, **task: Any) -> Iterator[None]:
    """While this is entered, the family adapters of `model` are at a task: Δ = alpha · G ×₁ U1 ×₂ U2 ×₃ U3 ×₅ c(task).

    >>> model = get_peft_model(kan, LoTRAConfig(r=6, family={"lam": (1.0, 1.6)}))
    >>> with at_task(model, lam=1.3):                           # or a tensor of one λ for each sample
    ...     y = model(x)

    With one task, the core is contracted with c first, and the pass is that of an ordinary adapter. With a task for
    each sample, all P terms are computed side by side, weighted by c and summed, in one pass of the base. If a layer's
    samples cannot be told apart, the layer makes a pass for each distinct task, or for each sample if somebody may
    differentiate by the tasks. Derivatives by the task are exact, in forward and reverse mode. The task may be a value
    of `torch.func.vmap`, so that the residual of each point has its own task.

    `model(x, lotra_task={"lam": 1.3})` does the same for one call. `lotra_task` may also be a name, a list of names,
    or the value of a family's only parameter. It is an error if no adapter uses the task. With transformers'
    Trainer, put the tasks into a column `lotra_task` of the data set and set `remove_unused_columns=False`. Names and
    mappings also need `data_collator=torch.utils.data.default_collate`, because transformers' own collator drops names
    and fails on mappings. `model.generate` repeats tasks in the same way as samples, by `num_beams` and
    `num_return_sequences`. Call a pipeline inside this context.

    The task is in the context of the running code (`contextvars`): other threads and tasks of asyncio do not see it,
    and those that Python gives a copy of the context (`asyncio.to_thread`, `create_task`) keep it. A generator that
    yields inside this context leaves its caller at the task until it goes on. If a backward pass repeats a forward
    pass, it does so at the task of that pass, wherever it runs, if torch's `checkpoint(use_reentrant=False)` is used,
    with torch 2.8 or newer. Other checkpoints have to enter the context in the function that they repeat, or else the
    backward pass raises RuntimeError. A merge inside this context merges the update at this task.

    Args:
        model: a PeftModel with LoTRA adapters, or what `torch.compile`, DDP or DeepSpeed makes of it.
        batch_axis: the axis of each adapted layer's first tensor that has the samples, if each has a task of its own.
        task: a number, or a tensor of the shape (), (batch,) or (batch, 1), for each parameter of the family; or
            `task=` a name, a list with a name for each sample, or a tensor of their places in the family's list. In a
            family with codes, `code=` may stand in its place: a tensor, shape (k,) or (batch, k). For a value outside
            the family's range the adapter extrapolates, with a warning (except under `vmap`, in compiled code, and
            for tensors on an accelerator, whose values nobody waits for: NaN raises no error there, either).

    Raises:
        TypeError, ValueError: if the task does not fit any family adapter of the model, or those that it fits are not
            active, or merged.

    Source: ours.
    """
    while not isinstance(model, PeftModel) and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner  # in DDP, or DeepSpeed's engine
    tuner = lotra_model(model)
    kinds = {name: config.kind for name, config in tuner.peft_config.items() if config.kind is not None}
    if not kinds:
        raise ValueError("`model` has no adapter for a family of tasks (`LoTRAConfig(family=...)`)")
    axis = checked_axis(batch_axis)
    with entered(tasks_for(tuner.model, tuner.peft_config, kinds, task, axis, "at_task")):
        yield


@beside_calls
def adapter_at(
    model: nn.Module, adapter_name: str, *, family: str = "default", train: str = "core", **task: Any
) -> None:
    """Add an ordinary adapter with a family's factors and its core at one task: G(task) = G ×₅ c(task), exactly.

    >>> adapter_at(model, "new", lam=1.35)
    >>> fit_gauss_newton(model, residual, data, iterations=5)      # trains this core alone

    The new adapter becomes active, and the family becomes inactive. The new adapter is saved, merged, swapped and
    served like any other. It has its own copies of the family's `modules_to_save` and token rows.

    Args:
        model: a PeftModel with a family adapter.
        adapter_name: the new adapter's name.
        family: the name of the family adapter.
        train: "core": only the core is trained, and the factors stay those of the family. "all": both are trained.
        task: one task, in the form that `at_task` takes. Without a task, the core is a mean over the family: the
            constant term for continuous parameters, the mean of the cores for named tasks, the core at the mean code
            for tasks with codes alone.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. Nothing is changed then.

    Source: ours.
    """
    tuner, config, kind = _family(model, family)
    if train not in ("core", "all"):
        raise ValueError(f"`train` should be 'core' or 'all' but the value passed is {train!r}")
    c = _weights(tuner, family, kind, task)
    if c.dim() > 1:
        raise ValueError(f"an adapter is for one task, but a task for each of {len(c)} samples is passed")
    tuner.check_new(adapter_name)
    if config.bias != "none":
        raise ValueError(f"`family` {family!r} has `bias` {config.bias!r}, and only one adapter may have biases")
    own = replace(config, family=None, family_code=None, freeze_factors=train == "core", init_weights=True)
    model.add_adapter(adapter_name, own)  # type: ignore[operator]
    copy_trained(tuner.model, [family], adapter_name)
    for layer in adapted_tensors(tuner.model, adapter_name).values():
        layer.set_tucker(adapter_name, whole_tucker(layer, family).at(c))
        layer.scaling[adapter_name] = layer.scaling[family]
    model.set_adapter(adapter_name)  # type: ignore[operator]


def save_task(
    path: str | os.PathLike,
    model: nn.Module,
    name: str,
    *,
    family: str = "default",
    covariance: torch.Tensor | None = None,
) -> None:
    """Write one task: the cores of an adapter from `adapter_at`, or the code of a task of the family, in a small file.

    A digest of the family goes with it: of its factors, and for a code of its cores as well. If the model is sharded,
    all processes must call this, each with its own path.

    Args:
        path: the file to write.
        model: a PeftModel with the family and the task.
        name: an adapter for one task whose factors are still those of the family; or a task of a family with codes.
        family: the name of the family adapter.
        covariance: that of the code, as `fit_task` finds it, shape (k, k); it is written beside the code.

    Raises:
        ValueError: if the adapter's factors are not those of the family, or `covariance` is for no code.
    """
    tuner, _, kind = _family(model, family)
    is_code = name not in tuner.peft_config and kind.code > 0 and name in kind.tasks
    if covariance is not None and not is_code:
        raise ValueError(f"`covariance` is for the code of a task of {family!r}, and {name!r} is none")
    if covariance is not None and tuple(covariance.shape) != (kind.code, kind.code):
        raise ValueError(
            f"`covariance` should have the shape {(kind.code, kind.code)} but has {tuple(covariance.shape)}"
        )
    meant = _digest(tuner, family, with_cores=is_code)
    if is_code:
        tensors = {"code": _codes(tuner, family)[kind.tasks.index(name)]}
        tensors |= {} if covariance is None else {"covariance": covariance.detach()}
    elif meant == _digest(tuner, name):
        layers = adapted_tensors(tuner.model, name)
        tensors = {f"{tensor}.{CORE}": whole_tucker(layer, name).core for tensor, layer in layers.items()}
    else:
        raise ValueError(
            f"`name` {name!r} has other factors than {family!r}, so its core is not enough: use `save_pretrained`"
        )
    tensors = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(tensors, path, metadata={"family": meant})


def load_task(path: str | os.PathLike, model: nn.Module, name: str, *, family: str = "default") -> torch.Tensor | None:
    """Add what `save_task` has written: an adapter with the factors of its family, which becomes active; or a task.

    Returns:
        The covariance of the code, if the file has one.

    Raises:
        ValueError: if the file is for another family, is damaged, or does not fit. Nothing is changed then.
    """
    tuner, _, kind = _family(model, family)
    origin = f"the task file {os.fspath(path)}"
    with naming(origin), safe_open(path, "pt") as file:
        meant, tensors = (file.metadata() or {}).get("family"), {key: file.get_tensor(key) for key in file.keys()}
    if meant != _digest(tuner, family, with_cores="code" in tensors):
        raise ValueError(
            f"{origin} is for another state of {family!r}, or another family: load the one that it was made from"
        )
    if "code" in tensors:
        covariance = tensors.pop("covariance", None)
        check_weights({"code": Slot((kind.code,))}, tensors, origin)
        add_task(model, name, family=family, code=tensors["code"])
        return covariance
    layers = adapted_tensors(tuner.model, family)
    slots = {f"{tensor}.{CORE}": Slot(layer.tucker(family).core.shape[:-1]) for tensor, layer in layers.items()}
    check_weights(slots, tensors, origin)
    with changing(tuner.model):
        adapter_at(model, name, family=family)
        for tensor, layer in layers.items():
            layer.set_tucker(name, layer.tucker(name)._replace(core=tensors[f"{tensor}.{CORE}"]))
    return None


def _codes(tuner: LoTRAModel, family: str) -> torch.Tensor:
    return full_tensor(container_of_codes(adapted_tensors(tuner.model, family).values(), family)[family]).detach()


def _weights(tuner: LoTRAModel, family: str, kind: Family, task: dict[str, Any]) -> torch.Tensor:
    """c of the task, or, without one, of the mean over the family."""
    codes = _codes(tuner, family) if kind.code else None
    if task:
        return kind.weights(task, codes)
    if codes is not None and not kind.ranges:
        return kind.at_code({}, codes.mean(0))
    if kind.tasks and codes is None:
        return torch.full((kind.size,), 1 / kind.size, dtype=torch.float64)
    return torch.eye(kind.size, dtype=torch.float64)[0]  # the constant term


def _family(model: nn.Module, name: str) -> tuple[LoTRAModel, LoTRAConfig, Family]:
    tuner = lotra_model(model, name)
    config = tuner.peft_config[name]
    if config.kind is None:
        raise ValueError(f"`family` {name!r} is an adapter for one task: name one with `LoTRAConfig(family=...)`")
    return tuner, config, config.kind


def _digest(tuner: LoTRAModel, adapter: str, with_cores: bool = False) -> str:
    """The sha256 of an adapter's factors (and cores), in fp32, and of its scaling in every layer."""
    layers, tensors = adapted_tensors(tuner.model, adapter), dict[str, torch.Tensor]()
    for name, layer in layers.items():
        core, factors = whole_tucker(layer, adapter)
        held = {**factors, CORE: core} if with_cores else factors
        tensors |= {f"{name}.{key}": tensor.float() for key, tensor in held.items()}
    return digest(tensors, {"scaling": {name: layer.scaling[adapter] for name, layer in layers.items()}})
