"""One run of a method on a task, and the base that it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from compared_methods import FROM_SCRATCH, apply_method, count_coefficients, trainable
from experiments import Run, digest
from jobs import Line, environment
from reporting import write_atomically
from torch import nn
from training import Course, measured, train_by_lbfgs, train_by_lm, train_by_steps
from version import modules_of, version

BASE_SEED = 7_000  # added for the points of a base, so that they are not those of the target


def perform(run: Run, bases: Path) -> Line:
    """The result of a run, and a base below `bases` if it is not there yet."""
    device, task = torch.device("cpu"), run.make_task()
    objective, method, fresh = task.objective("target", run.seed, device), run.method, task.build(run.seed)
    coefficients = count_coefficients(fresh, task)
    if "width" in method:
        fresh = replace(task, width=method["width"]).build(run.seed)
    scratch = method["method"] in FROM_SCRATCH
    model = (fresh if scratch else trained_base(run, bases, device)).to(device)
    zero_shot = None if scratch else measured(model, objective)
    course = Course(objective, run.steps)
    model = apply_method(model, method, task, objective, run.seed + 1)
    course.add(model, 0)
    if method.get("optimizer") == "lm":
        train_by_lm(model, course, method)
    elif method.get("optimizer") == "lbfgs":
        train_by_lbfgs(model, course)
    else:
        train_by_steps(model, course, method, method["lr"])
    return {
        "version": version(*modules_of(run.task)),
        "metric": task.metric,
        "zero_shot": rounded(zero_shot),
        "coefficients": coefficients,
        "trainable": trainable(model),
        "marks": [(step, round(seconds, 4), rounded(metric)) for step, seconds, metric in course.marks],
        "environment": environment(),
    }


def rounded(metric: float | None) -> float | None:
    return None if metric is None else float(f"{metric:.8g}")


def base_path(run: Run, bases: Path) -> Path:
    """Named by all that the base depends on: its settings and the code."""
    task = run.make_task()
    settings = [run.task, task.base_settings(), 0 if task.one_base else run.seed, version(*modules_of(run.task))]
    return bases / f"{run.task}-{digest(settings)}.pt"


def trained_base(run: Run, bases: Path, device: torch.device) -> nn.Module:
    """The base that a run needs, from its file; trained first if that is not there."""
    task, path = run.make_task(), base_path(run, bases)
    seed = 0 if task.one_base else run.seed
    model = task.build(seed).to(device)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model
    course = Course(task.objective("base", seed + BASE_SEED, device), task.base_steps)
    train_by_steps(model, course, {"method": "full"}, task.base_lr)
    if course.marks[-1].metric is None:
        raise ValueError(f"the base of {run.settings} has diverged: lower `base_lr`, {task.base_lr}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: torch.save(model.state_dict(), partial))
    return model
