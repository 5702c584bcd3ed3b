"""One run of a method on a task, and the base that it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compared_methods import (
    FROM_SCRATCH,
    apply_method,
    count_coefficients,
    optimizer_of,
    stored,
    trainable,
)
from experiments import Run, digest
from jobs import Line, environment
from measuring import peak_bytes
from objectives import Objective
from reporting import write_atomically
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from training import Stopwatch, measured, train_by_lbfgs, train_by_lm, train_by_steps
from version import modules_of, version

from peft_lotra import fit_gauss_newton

MEASURED_SEED = 0  # whose run also measures the memory of a step
BASE_SEED = 7_000  # added for the points of a base, so that they are not those of the target


def perform(run: Run, bases: Path) -> Line:
    """The result of a run, and a base below `bases` if it is not there yet."""
    device, task = torch.device("cpu"), run.make_task()
    objective, watch = task.objective("target", run.seed, device), Stopwatch()
    method, fresh = run.method, task.build(run.seed)
    coefficients = count_coefficients(fresh, task, method)
    if "width" in method:
        fresh = replace(task, width=method["width"]).build(run.seed)
    scratch = method["method"] in FROM_SCRATCH
    model = (fresh if scratch else trained_base(run, bases, device)).to(device)
    zero_shot = None if scratch else measured(model, objective)
    with watch:
        model = apply_method(model, method, task, objective, run.seed + 1)
    if method.get("optimizer") == "lm":
        marks = train_by_lm(model, objective, method, run.steps, watch)
    elif method.get("optimizer") == "lbfgs":
        marks = train_by_lbfgs(model, objective, run.steps, watch)
    else:
        marks = train_by_steps(model, objective, method, method["lr"], run.steps, watch)
    result = {
        "version": version(*modules_of(run.task)),
        "metric": task.metric,
        "zero_shot": rounded(zero_shot),
        "coefficients": coefficients,
        "trainable": trainable(model),
        "stored": stored(model),
        "marks": [(step, round(seconds, 4), rounded(metric)) for step, seconds, metric in marks],
        "environment": environment(),
    }
    if run.seed == MEASURED_SEED and method.get("optimizer") != "lbfgs":
        result["step_bytes"] = bytes_of_a_step(model, objective, method)
    return result


def bytes_of_a_step(model: nn.Module, objective: Objective, method: dict[str, Any]) -> int:
    """The most memory in tensors during a step, or an iteration of LM: weights, optimizer, activations, Jacobian."""
    device, held = next(model.parameters()).device, [*model.parameters(), *model.buffers()]
    if method.get("optimizer") == "lm":
        options = objective.second_order() | {"iterations": 1, "progressbar": False}
        return peak_bytes(lambda: fit_gauss_newton(model, **options), held, device)
    optimizer = optimizer_of(model, method, method["lr"])

    def step() -> None:
        optimizer.zero_grad()
        objective.loss(model, 0).backward()
        optimizer.step()

    step()  # then the optimizer has its state
    state = [value for value in tree_leaves(dict(optimizer.state)) if isinstance(value, Tensor)]
    return peak_bytes(step, [*held, *state], device)


def rounded(metric: float | None) -> float | None:
    return None if metric is None else float(f"{metric:.8g}")


def seed_of_base(run: Run) -> int:
    return 0 if run.make_task().one_base else run.seed


def base_path(run: Run, bases: Path) -> Path:
    """Named by all that the base depends on: its settings and the code."""
    settings = [run.task, run.make_task().base_settings(), seed_of_base(run), version(*modules_of(run.task))]
    return bases / f"{run.task}-{digest(settings)}.pt"


def trained_base(run: Run, bases: Path, device: torch.device) -> nn.Module:
    """The base that a run needs, from its file; trained first if that is not there."""
    task, path = run.make_task(), base_path(run, bases)
    model, seed = task.build(seed_of_base(run)).to(device), seed_of_base(run)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model
    objective, watch = task.objective("base", seed + BASE_SEED, device), Stopwatch()
    *_, last = train_by_steps(model, objective, {"method": "full"}, task.base_lr, task.base_steps, watch)
    if last.metric is None:
        raise ValueError(f"the base of {run.settings} has diverged: lower `base_lr`, {task.base_lr}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: torch.save(model.state_dict(), partial))
    return model
