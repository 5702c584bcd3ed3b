"""What a fit measures after every iteration, besides the loss that it reduces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from .checks import check_callable
from .problem import Problem


class Validation:
    """The loss on other data, or a metric of the model; lower is better. Without both, nothing is measured.

    Raises:
        ValueError, TypeError: if the arguments do not fit together.
    """

    def __init__(self, data: Any, metric: Callable[[nn.Module], Any] | None, patience: int | None) -> None:
        if data is not None and metric is not None:
            raise ValueError("`validation` and `validation_metric` are both given: give only one of them")
        if metric is not None:
            check_callable("validation_metric", metric, "a function of one model", "a model")
        self.data, self.metric, self.patience = data, metric, patience
        self.given = data is not None or metric is not None
        if patience is not None and not self.given:
            raise ValueError(f"`patience` is {patience!r}, but there is no `validation` to wait for: give it, too")

    def measured(self, problem: Problem, theta: torch.Tensor) -> tuple[float, ...]:
        """The loss or metric at θ as a tuple of one number; () without validation. A metric finds θ in the model."""
        if self.metric is None:
            return (problem.evaluate(theta, self.data, "validation").loss,) if self.given else ()
        problem.write(theta)
        return (problem.processes.mean(problem.processes.agreed(_number, self.metric, problem.model)),)

    def at_start(self, problem: Problem, theta: torch.Tensor) -> tuple[float, ...]:
        """`measured`, which must be finite."""
        if self.data is not None:
            return (problem.checked(theta, self.data, first=False, argument="validation").loss,)
        values = self.measured(problem, theta)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"`validation_metric` should be finite at the start but it gave {values[0]}")
        return values

    def is_over(self, losses: Sequence[float]) -> bool:
        """Whether the least value is at least `patience` iterations old."""
        return self.patience is not None and len(losses) - 1 - losses.index(min(losses)) >= self.patience


def _number(metric: Callable[[nn.Module], Any], model: nn.Module) -> float:
    value = metric(model)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"`validation_metric` should return one number (lower is better), but it gave {value!r}")
    return float(value)
