"""Training by first-order steps, or Gauss–Newton with Levenberg–Marquardt damping, and the course of the metric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from compared_methods import optimizer_of
from objectives import Objective
from torch import Tensor, nn

from peft_lotra import fit_gauss_newton

LBFGS_BATCHES = 4
MARKS = 20  # points of a course, its start among them


class Mark(NamedTuple):
    """The metric after so many steps and seconds; None if it is not finite."""

    step: int
    seconds: float
    metric: float | None


class Stopwatch:
    """Seconds while it runs, of the process's own work on the CPU, which others on the machine hardly change."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.process_time()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._start


def measured(model: nn.Module, objective: Objective) -> float | None:
    """The metric, on a model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        value = objective.metric(model)
    finally:
        model.train(training)
    return value if math.isfinite(value) else None


class _Course:
    """The marks of a run, and its clock, which stands still while the metric is measured."""

    def __init__(self, model: nn.Module, objective: Objective, steps: int, watch: Stopwatch) -> None:
        self.model, self.objective, self.watch = model, objective, watch
        self.marks = [Mark(0, watch.seconds, measured(model, objective))]
        self.ends = {math.ceil(steps * k / (MARKS - 1)) for k in range(1, MARKS)}

    def goes_on(self, step: int) -> bool:
        """Whether the metric is finite, if it is measured after this step."""
        if step not in self.ends:
            return True
        self.watch.__exit__()
        self.add(step)
        self.watch.__enter__()
        return self.marks[-1].metric is not None

    def add(self, step: int) -> None:
        self.marks.append(Mark(step, self.watch.seconds, measured(self.model, self.objective)))


def train_by_steps(
    model: nn.Module, objective: Objective, settings: Mapping[str, Any], lr: float, steps: int, watch: Stopwatch
) -> list[Mark]:
    """First-order steps whose rate decays to zero by a cosine. Ends early if the metric is not finite any more."""
    with watch:
        optimizer = optimizer_of(model, settings, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    course = _Course(model, objective, steps, watch)
    with watch:
        for step in range(steps):
            optimizer.zero_grad()
            objective.loss(model, step).backward()
            optimizer.step()
            schedule.step()
            if not course.goes_on(step + 1):
                break
    return course.marks


def train_by_lm(
    model: nn.Module, objective: Objective, settings: Mapping[str, Any], steps: int, watch: Stopwatch
) -> list[Mark]:
    """Levenberg–Marquardt on what is trainable; `steps` iterations unless no step reduces the loss any more."""
    options = objective.second_order() | {"weight_decay": settings.get("weight_decay", 0.0), "loss_tolerance": 0}
    course = _Course(model, objective, steps, watch)

    def mark(result: Any) -> None:
        course.goes_on(result.iterations)

    with watch:
        result = fit_gauss_newton(model, iterations=steps, progressbar=False, callback=mark, **options)
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    if result.iterations > course.marks[-1].step:
        course.add(result.iterations)
    return course.marks


def train_by_lbfgs(model: nn.Module, objective: Objective, steps: int, watch: Stopwatch) -> list[Mark]:
    """L-BFGS with a strong Wolfe line search on what is trainable, on fixed data: those of LM's first iterations, as
    many as make up for that they stay the same. `steps` times up to 20 iterations."""
    options, course = objective.second_order(), _Course(model, objective, steps, watch)
    with watch:
        batches = [options["data"](k) for k in range(LBFGS_BATCHES)]
        data = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(trained, max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(options["residual_fn"][name](model, part).square().mean() for name, part in data.items())
            loss.backward()
            return loss

        for step in range(steps):
            optimizer.step(closure)
            if not course.goes_on(step + 1):
                break
    return course.marks


def train_by_adam(
    model: nn.Module, loss: Callable[[int], Tensor], rate: float, steps: float = math.inf, seconds: float = math.inf
) -> None:
    """Adam on what is trainable, at a rate that falls to zero by a cosine over the steps, or over the CPU seconds."""
    optimizer, start, step = (
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad]),
        time.process_time(),
        0,
    )
    while (part := max(step / steps, (time.process_time() - start) / seconds)) < 1:
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * part)) / 2
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        step += 1
