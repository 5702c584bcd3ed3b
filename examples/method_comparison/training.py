"""Training by first-order steps, or Gauss–Newton with Levenberg–Marquardt damping, and the course of the metric."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from compared_methods import optimizer_of
from objectives import Objective
from torch import nn

from peft_lotra import fit_gauss_newton

MARKS = 20  # points of a course, its start among them


class Mark(NamedTuple):
    """The metric after so many steps and seconds; None if it is not finite."""

    step: int
    seconds: float
    metric: float | None


class Stopwatch:
    """Seconds while it runs: the process's own work on the CPU, which others on the machine hardly change, and those
    of the wall on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()


def measured(model: nn.Module, objective: Objective) -> float | None:
    """The metric, on a model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        value = objective.metric(model)
    finally:
        model.train(training)
    return value if math.isfinite(value) else None


def train_by_steps(
    model: nn.Module, objective: Objective, settings: Mapping[str, Any], lr: float, steps: int, watch: Stopwatch
) -> list[Mark]:
    """First-order steps whose rate decays to zero by a cosine. Ends early if the metric is not finite any more."""
    with watch:
        optimizer = optimizer_of(model, settings, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    marks = [Mark(0, watch.seconds, measured(model, objective))]
    ends = {math.ceil(steps * k / (MARKS - 1)) for k in range(1, MARKS)}

    def goes_on(step: int) -> bool:
        if step not in ends:
            return True
        watch.__exit__()
        marks.append(Mark(step, watch.seconds, measured(model, objective)))
        watch.__enter__()
        return marks[-1].metric is not None

    with watch:
        objective.train(model, optimizer, schedule, steps, goes_on)
    return marks


def train_by_lm(
    model: nn.Module, objective: Objective, settings: Mapping[str, Any], steps: int, watch: Stopwatch
) -> list[Mark]:
    """Levenberg–Marquardt on what is trainable; `steps` iterations unless no step reduces the loss any more."""
    options = objective.second_order() | {"weight_decay": settings.get("weight_decay", 0.0)}
    marks = [Mark(0, watch.seconds, measured(model, objective))]
    ends = {math.ceil(steps * k / (MARKS - 1)) for k in range(1, MARKS)}

    def mark(result: Any) -> None:
        watch.__exit__()
        if result.iterations in ends:
            marks.append(Mark(result.iterations, watch.seconds, measured(model, objective)))
        watch.__enter__()

    with watch:
        result = fit_gauss_newton(
            model, iterations=steps, loss_tolerance=0, progressbar=False, callback=mark, **options
        )
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    if result.iterations > marks[-1].step:
        marks.append(Mark(result.iterations, watch.seconds, measured(model, objective)))
    return marks
