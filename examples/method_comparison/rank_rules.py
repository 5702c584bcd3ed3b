"""Rules that share a budget out to the modes and layers of a KAN, as ranks by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from objectives import Objective
from tasks import Task
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.analysis import effective_coefficients, suggest_ranks
from peft_lotra.standin import adapted_coefficients, replaced
from peft_lotra.targets.resolve import resolve_targets
from peft_lotra.tucker.decomposition import Ranks, parameter_count
from peft_lotra.tucker.ranks import clipped, equal_ranks, ranks_for_budget

BATCHES = 8  # whose gradients a rule looks at


def _basis(shape: Sequence[int], r: int) -> Ranks:
    """The basis whole, one rank for inputs and outputs, which are whole where that takes no more numbers."""
    return _least(shape, r, "d")


def _lora(shape: Sequence[int], r: int) -> Ranks:
    """Inputs and basis whole: LoRA of the flattened coefficients."""
    return _least(shape, r, "id")


def _least(shape: Sequence[int], r: int, whole: str) -> Ranks:
    """Rank r in the modes that are not `whole`, but those whole too where that takes no more numbers."""
    choices = [clipped(tuple([None if mode in whole else r for mode in "iod"]), shape)]
    for ranks in choices:
        for mode in range(3):
            if ranks[mode] is not None:
                choices.append((*ranks[:mode], None, *ranks[mode + 1 :]))
    return min(reversed(choices), key=lambda ranks: parameter_count(shape, ranks))


def _positions(shape: Sequence[int], r: int) -> Ranks:
    """Equal ranks, and of a kernel's positions a third."""
    ranks = equal_ranks(shape, r)
    return (*ranks, max(1, math.prod(shape[3:]) // 3)) if len(shape) > 3 else ranks


RULES: dict[str, Callable[[Sequence[int], int], Ranks]] = {
    "equal": equal_ranks,
    "basis": _basis,
    "lora": _lora,
    "positions": _positions,
}
NAMES = (*RULES, "gradients")


def ranks_by_rule(rule: str, model: nn.Module, task: Task, objective: Objective, ratio: float) -> dict[str, Ranks]:
    """Ranks by parameter name, whose adapters have at most `ratio` of the coefficients."""
    coefficients = effective_coefficients(model, task.coefficients(model))
    shapes = {name: A.shape for name, A in coefficients.items()}
    budget = int(ratio * sum(A.numel() for A in coefficients.values()))
    if rule == "gradients":
        return suggest_ranks(_gradients(model, task, objective), budget=budget)
    return dict(zip(shapes, ranks_for_budget(list(shapes.values()), budget, RULES[rule]), strict=True))


def _gradients(model: nn.Module, task: Task, objective: Objective) -> dict[str, torch.Tensor]:
    """∂L/∂A of several batches side by side, by parameter name; shape (n, m, n_d, ..., batches)."""
    targets = resolve_targets(model, LoTRAConfig(r=1, coefficients=task.coefficients(model)))
    found: dict[str, list[torch.Tensor]] = {target.parameter: [] for target in targets}
    for step in range(BATCHES):
        for target in targets:
            layer = model.get_submodule(target.module)
            stored = adapted_coefficients(layer, target.spec, ()).detach().requires_grad_()
            with replaced(layer, target.spec, stored):
                (gradient,) = torch.autograd.grad(objective.loss(model, step), stored)
            found[target.parameter].append(target.spec.to_canonical(gradient))
    return {name: torch.stack(gradients, dim=-1) for name, gradients in found.items()}
