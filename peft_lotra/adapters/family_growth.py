"""Makes families from adapters for single tasks, and gives families further tasks or other ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..combination import container_of_codes, update_of
from ..config.lotra_config import LoTRAConfig
from ..families.family import Family, shortened
from ..layers.lotra import adapted_tensors
from ..model import LoTRAModel, lotra_model
from ..placement.sharded import check_not_sharded
from ..tucker.decomposition import decompose, mode_product
from ..tucker.ranks import mode_sizes
from .beside_calls import beside_calls
from .extraction import fill


@torch.no_grad()
@beside_calls
def family_from(
    model: nn.Module, adapters: Mapping[str, Any], adapter_name: str, config: LoTRAConfig
) -> dict[str, float]:
    """Add a family whose updates at some tasks approximate those of adapters that were trained for these tasks.

    min Σ_j ‖Δ_j − G ×₁ U1 ×₂ U2 ×₃ U3 ×₅ c(task_j)‖² in two steps: common factors by HOSVD and HOOI of the stacked
    updates, then the core by least squares over the tasks. If the tasks do not determine the core, it is the core of
    least norm. The result is a start for a fit to the whole family, by `at_task`.

    >>> config = LoTRAConfig(r=6, family={"lam": (1.0, 1.6)})
    >>> errors = family_from(model, {"low": 1.0, "middle": 1.3, "high": 1.6}, "family", config)

    Args:
        model: a PeftModel with the adapters.
        adapters: a mapping from the name of each adapter to its task: a number, a mapping from the family's parameters
            to numbers, or the name of a task.
        adapter_name: the name of the new family, which becomes active.
        config: the config of the new family. It needs `family`.

    Returns:
        sqrt(Σ_j ‖Δ_j − Δ(task_j)‖² / Σ_j ‖Δ_j‖²) by full parameter name.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The model is then as it was before.

    Source: ours.
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise TypeError(f"`adapters` should map names of adapters to tasks, at least one, but is {adapters!r}")
    tuner = lotra_model(model, next(iter(adapters)))
    if (kind := config.kind) is None:
        raise ValueError("`config` has no `family`: give ranges of parameters, or names of tasks")
    if kind.code:
        raise ValueError(f"`config` has `family_code` {kind.code}: no codes are known of these adapters; leave it out")
    if config.alpha == 0 or 0 in config.alpha_pattern.values():
        raise ValueError("`config` has an `alpha` of 0: a family of this scaling holds no update of the adapters")
    for name in adapters:
        if tuner.peft_config[name].family is not None:
            raise ValueError(f"`adapters` has {name!r}, which is for a family itself")
    c = torch.stack([kind.weights(kind.named(task)) for task in adapters.values()])  # shape: (adapters, P)
    tuner.check_new(adapter_name)
    given = {
        (parameter, name): update_of(layer, name, parameter)
        for parameter, layer in adapted_tensors(tuner.model).items()
        for name in adapters
        if name in layer.lotra_core
    }
    model.add_adapter(adapter_name, config)  # type: ignore[operator]
    factors, errors = {}, {}
    for parameter, layer in adapted_tensors(tuner.model, adapter_name).items():
        zero = torch.zeros(mode_sizes(layer.spec.layout.canonical_shape), dtype=torch.float64)
        dense = [given[parameter, name].dense() if (parameter, name) in given else zero for name in adapters]
        updates = torch.stack(dense, dim=-1)  # shape: (n, m, n_d, K, adapters)
        joint = decompose(updates, layer.r[adapter_name])
        factors[parameter] = joint._replace(core=joint.core @ torch.linalg.pinv(c).mT)
        miss = mode_product(factors[parameter].dense(), c, -1) - updates
        errors[parameter] = (miss.norm() / updates.norm()).nan_to_num().item()
    fill(model, adapter_name, factors)
    model.set_adapter(adapter_name)  # type: ignore[operator]
    return errors


@torch.no_grad()
@beside_calls
def add_task(
    model: nn.Module,
    task: str,
    *,
    family: str = "default",
    core_from: str | None = None,
    code: torch.Tensor | None = None,
) -> None:
    """Add a task to a family of named tasks: the core gets one more slice, G[..., P], and everything else stays.

    In a family with codes, the codes get one more row instead. If an optimizer holds what has grown, make a new
    optimizer afterwards.

    Args:
        model: a PeftModel with the family.
        task: the new task's name.
        family: the name of the family adapter.
        core_from: the task whose core, or code, the new task starts from. With None, the new task starts from the
            mean of all tasks.
        code: the code of the new task, shape (k,), in place of `core_from`.

    Raises:
        ValueError: if the family's tasks have no names, a name does not fit, or the model is sharded. Nothing is
            changed then.

    Source: ours.
    """
    tuner, kind = _named(model, family, **{} if core_from is None else {"core_from": core_from})
    names = list(kind.tasks)
    if not isinstance(task, str) or task in names:
        raise ValueError(f"`task` should be a new name but the value passed is {task!r}; there are {shortened(names)}")
    if code is not None and (not kind.code or tuple(code.shape) != (kind.code,) or core_from is not None):
        raise ValueError(f"`code` should have {kind.code} numbers, without `core_from`, but is {tuple(code.shape)}")

    def grown(held: torch.Tensor, axis: int) -> torch.Tensor:
        start = held.mean(axis, keepdim=True) if core_from is None else held.narrow(axis, names.index(core_from), 1)
        return torch.cat([held, start if code is None else code.to(held)[None]], axis)

    _replace_tasks(tuner, family, kind, "add the task", [*names, task], grown)


@torch.no_grad()
@beside_calls
def remove_task(model: nn.Module, task: str, *, family: str = "default") -> None:
    """Remove a task from a family of named tasks, with its slice of the core, or its code.

    If an optimizer holds what was changed, make a new optimizer afterwards.

    Raises:
        ValueError: if there is no such task, the family would have no task left, or fewer than a code has numbers, or
            the model is sharded or offloaded. Nothing is changed then.
    """
    tuner, kind = _named(model, family, task=task)
    kept = [k for k, name in enumerate(kind.tasks) if name != task]
    if len(kept) < max(kind.code, 1):
        raise ValueError(f"`task` {task!r} is needed: a family has at least as many tasks as a code has numbers")
    names, rows = [kind.tasks[k] for k in kept], torch.tensor(kept)
    _replace_tasks(
        tuner, family, kind, "remove the task", names, lambda held, axis: held.index_select(axis, rows.to(held.device))
    )


@beside_calls
def rename_task(model: nn.Module, task: str, name: str, *, family: str = "default") -> None:
    """Give a task of a family another name. Its core, or code, stays.

    Raises:
        ValueError: if there is no such task, or the name is taken. Nothing is changed then.
    """
    tuner, kind = _named(model, family, task=task)
    if not isinstance(name, str) or name in kind.tasks:
        raise ValueError(f"`name` should be a new name but the value passed is {name!r}")
    tasks = tuple([name if one == task else one for one in kind.tasks])
    _replace(tuner, family, "rename the task", family=replace(kind, tasks=tasks).plain)


def _named(model: nn.Module, family: str, **tasks: str) -> tuple[LoTRAModel, Family]:
    """The tuner, and a family whose tasks have names, these among them; otherwise raise ValueError."""
    tuner = lotra_model(model, family)
    kind = tuner.peft_config[family].kind
    if kind is None or not kind.tasks:
        raise ValueError(f"`family` {family!r} is not a family of named tasks (`LoTRAConfig(family=[...])`)")
    for argument, task in tasks.items():
        if task not in kind.tasks:
            raise ValueError(f"`{argument}` {task!r} is not one of the family's tasks {shortened(list(kind.tasks))}")
    return tuner, kind


@torch.no_grad()
@beside_calls
def change_range(
    model: nn.Module,
    ranges: Mapping[str, tuple[float, float]],
    *,
    family: str = "default",
    family_degree: int | None = None,
) -> None:
    """The same family on other ranges of its parameters, and of a higher degree: G ← G ×₅ Mᵀ, where c = M · c'.

    A polynomial of total degree d in the parameters is a polynomial of that degree on any range. So the update at
    every parameter stays as it was, and a fit to the new range starts from there. Widen a range in small steps:
    polynomials extrapolate badly, and far outside of the old range the old update is no better start than none.

    >>> change_range(model, {"lam": (0.8, 2.0)}, family_degree=6)

    Make a new optimizer afterwards, because the old one holds the old core.

    Args:
        model: a PeftModel with the family.
        ranges: a mapping from names of parameters to new ranges. The other parameters keep their ranges.
        family: the name of the family adapter.
        family_degree: the new degree of the polynomials, at least the present one. With None it stays.

    Raises:
        TypeError, ValueError: if the family is not one of continuous parameters, a range or the degree does not fit,
            or the model is sharded or offloaded. Nothing is changed then.

    Source: ours.
    """
    tuner = lotra_model(model, family)
    config = tuner.peft_config[family]
    if config.kind is None or config.kind.tasks:
        raise ValueError(f"`family` {family!r} is not a family of continuous parameters, which alone has ranges")
    if not isinstance(ranges, Mapping) or ranges.keys() - config.family.keys():
        raise ValueError(f"`ranges` should map some of {list(config.family)} to new ranges, but is {ranges!r}")
    old = config.kind
    degree = config.family_degree if family_degree is None else family_degree
    new = Family.of({**config.family, **ranges}, degree, field="ranges")
    if new.degree < old.degree:
        raise ValueError(
            f"`family_degree` {family_degree} is below the family's degree {old.degree}, so it cannot hold it: give "
            "at least that degree, or make a new family by `family_from`"
        )
    M, ends = old.in_terms_of(new), dict(new.ranges)
    new_core = partial(_changed, M)
    _replace(tuner, family, "change the range", new_core, family=ends, family_degree=new.degree)


@torch.no_grad()
@beside_calls
def normalize_codes(model: nn.Module, *, family: str = "default") -> None:
    """Give the codes of a family's tasks mean 0 and covariance 1; the cores change so that the model stays the same.

    With z = B z' + m, c(z) = M c(z'), since an affine map keeps the total degree of polynomials: G' = G ×₅ Mᵀ. Of the
    maps B with that covariance, this is the one after which the numbers of a code act on different entries of the
    cores, the first one most: Σ_layers ‖∂G'/∂z'_j‖² falls with j, and mixed products are 0. So codes can be compared
    and drawn. If an optimizer holds the codes and cores, make a new one.

    Raises:
        ValueError: if the family has no codes, or not more tasks than numbers in a code, or the model is sharded or
            offloaded. Nothing is changed then.

    Source: ours.
    """
    tuner = lotra_model(model, family)
    kind = tuner.peft_config[family].kind
    if kind is None or not kind.code:
        raise ValueError(f"`family` {family!r} has no codes (`LoTRAConfig(family=[...], family_code=...)`)")
    layers = list(adapted_tensors(tuner.model, family).values())
    check_not_sharded(tuner.model, "`model`", "normalise the codes before it is sharded")
    codes = container_of_codes(layers, family)[family]
    z, k = codes.double().cpu(), kind.code
    if codes.is_meta or len(z) <= k or torch.linalg.matrix_rank(z - z.mean(0)) < k:
        raise ValueError(f"`family` {family!r}: there should be more tasks than numbers of a code, trained, in memory")
    mean, L = z.mean(0), torch.linalg.cholesky(torch.cov(z.mT))
    middle = {name: (a + b) / 2 for name, (a, b) in kind.ranges.items()}
    slopes = torch.func.jacfwd(lambda y: kind.at_code(middle, mean + L @ y))(torch.zeros(k).double())
    effects = [layer.scaling[family] * (layer.lotra_core[family].double().cpu() @ slopes) for layer in layers]
    _, axes = torch.linalg.eigh(sum([torch.einsum("...j,...l->jl", effect, effect) for effect in effects]))
    B = L @ axes.flip(1)
    new = torch.linalg.solve(B, (z - mean).mT).mT
    # An axis has no direction: the largest numbers are > 0.
    signs = new.gather(0, new.abs().argmax(0, keepdim=True)).sign()
    new, M = new * signs, kind.in_terms_of(kind, B * signs, mean)
    _replace(tuner, family, "normalise the codes", partial(_changed, M), new.to)


def _changed(M: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """G ×₅ Mᵀ."""
    return core.double() @ M.to(core.device)


def _replace_tasks(
    tuner: LoTRAModel,
    family: str,
    kind: Family,
    what: str,
    names: list[str],
    change: Callable[[torch.Tensor, int], torch.Tensor],
) -> None:
    """Replace what each task has of its own, along that axis: its code, or its slice of the cores."""
    of_codes, of_core = (lambda held: change(held, 0)), (lambda held: change(held, -1))
    changes = (None, of_codes) if kind.code else (of_core, None)
    _replace(tuner, family, what, *changes, family=replace(kind, tasks=tuple(names)).plain)


def _replace(
    tuner: LoTRAModel,
    name: str,
    what: str,
    core: Callable[[torch.Tensor], torch.Tensor] | None = None,
    codes: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **fields: Any,
) -> None:
    """Replace a family's cores, codes and fields, or raise ValueError if what it replaces is sharded or offloaded."""
    layers = adapted_tensors(tuner.model, name)
    changes = [(parameter, layer.lotra_core, core) for parameter, layer in layers.items() if core]
    changes += [(p, layer.lotra_codes, codes) for p, layer in layers.items() if codes and name in layer.lotra_codes]
    if changes:
        check_not_sharded(tuner.model, "`model`", f"{what} before it is sharded")
    if offloaded := [parameter for parameter, held, _ in changes if held[name].is_meta]:
        raise ValueError(f"`family` {name!r} is offloaded at {offloaded}: {what} before offloading")
    for _, held, change in changes:
        old = held[name]
        held[name] = nn.Parameter(change(old).to(old), requires_grad=old.requires_grad)
    for layer in layers.values():
        layer.terms[name] = layer.lotra_core[name].shape[-1]
    config = replace(tuner.peft_config[name], **fields)
    config._copies = tuner.peft_config[name]._copies
    tuner.peft_config[name] = config
