"""Training by first-order steps, or Gauss–Newton with Levenberg–Marquardt damping, and the course of the metric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
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


def measured(model: nn.Module, objective: Objective) -> float | None:
    """The metric, on a model in evaluation mode."""
    value = objective.metric(model.eval())
    model.train()
    return value if math.isfinite(value) else None


class Course:
    """The marks of a run of `steps`. Its clock begins now, and stands still while the metric is measured.

    Seconds are those of the process's own work on the CPU, which others on the machine hardly change.
    """

    def __init__(self, objective: Objective, steps: int) -> None:
        self.objective, self.steps, self.marks = objective, steps, []
        self.ends = {math.ceil(steps * k / (MARKS - 1)) for k in range(MARKS)}
        self.start = time.process_time()

    def goes_on(self, model: nn.Module, step: int) -> bool:
        """Whether the metric is finite, if it is measured after this step."""
        return step not in self.ends or self.add(model, step)

    def add(self, model: nn.Module, step: int) -> bool:
        seconds = time.process_time() - self.start
        self.marks.append(Mark(step, seconds, measured(model, self.objective)))
        self.start = time.process_time() - seconds
        return self.marks[-1].metric is not None


def train_by_steps(model: nn.Module, course: Course, settings: Mapping[str, Any], lr: float) -> None:
    """First-order steps whose rate decays to zero by a cosine. Ends early if the metric is not finite any more."""
    optimizer = optimizer_of(model, settings, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps)
    for step in range(course.steps):
        optimizer.zero_grad()
        course.objective.loss(model, step).backward()
        optimizer.step()
        schedule.step()
        if not course.goes_on(model, step + 1):
            break


def train_by_lm(model: nn.Module, course: Course, settings: Mapping[str, Any]) -> None:
    """Levenberg–Marquardt on what is trainable; as many iterations unless no step reduces the loss any more."""
    result = fit_gauss_newton(
        model,
        **course.objective.second_order(),
        iterations=course.steps,
        weight_decay=settings.get("weight_decay", 0.0),
        loss_tolerance=0,
        progressbar=False,
        callback=lambda result: not course.goes_on(model, result.iterations),
    )
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    if result.iterations > course.marks[-1].step:
        course.add(model, result.iterations)


def train_by_lbfgs(model: nn.Module, course: Course) -> None:
    """L-BFGS with a strong Wolfe line search on what is trainable, on fixed data: those of LM's first iterations, as
    many as make up for that they stay the same. As many steps, of up to 20 iterations each."""
    options = course.objective.second_order()
    batches = [options["data"](k) for k in range(LBFGS_BATCHES)]
    data = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    step_on = lbfgs_on(model, options["residual_fn"], data)
    for step in range(course.steps):
        step_on()
        if not course.goes_on(model, step + 1):
            break


def lbfgs_on(model: nn.Module, residuals: Mapping[str, Callable[..., Tensor]], data: Mapping[str, Any]) -> Any:
    """Does up to 20 iterations of L-BFGS on the sum of the mean squares of all residuals."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(residuals[name](model, part).square().mean() for name, part in data.items())
        loss.backward()
        return loss

    return partial(optimizer.step, closure)


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
