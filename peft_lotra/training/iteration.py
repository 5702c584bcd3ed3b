"""One iteration of Gauss–Newton with Levenberg–Marquardt damping."""

from __future__ import annotations

import math
from typing import NamedTuple

from .choice import damped_system
from .damped_system import DampedSystem
from .problem import Evaluation, Problem

# Bounds of λ. Above them the step is negligible, below them the fp64 factorisation fails.
_LEAST_DAMPING, _MOST_DAMPING = 1e-14, 1e10


class DampingRule(NamedTuple):
    """How λ changes, the gradient at which θ stays, and the α of θ + αδ."""

    increase: float = 5.0
    decrease: float = 4.0
    gradient_tolerance: float = 1e-8
    rate: float = 1.0


class Iteration(NamedTuple):
    """The result of one iteration.

    Attributes:
        evaluation: the Evaluation of θ + αδ, or of the old θ if there is a `reason`.
        damping: λ for the next iteration.
        reason: why θ stays: "gradient" or "damping". None if θ has changed.
    """

    evaluation: Evaluation
    damping: float
    reason: str | None = None


def iterate(problem: Problem, point: Evaluation, damping: float, rule: DampingRule, first: bool) -> Iteration:
    """θ + αδ with the first λ whose δ reduces the loss on the batch. The model is not changed.

    Args:
        point: the Evaluation of θ on the batch.
        first: whether to make the checks that one iteration makes for all.

    Raises:
        ValueError: naming `residual_fn` or `loss`.
    """
    system = damped_system(problem, point)
    _check(system, first)
    if system.cosine(point.total) <= rule.gradient_tolerance:
        return Iteration(point, damping, "gradient")
    tried = damping
    while tried <= _MOST_DAMPING:
        step = system.step(tried)
        found = problem.evaluate(point.theta + rule.rate * step.to(point.theta), point.batch)
        gain = point.total - found.total
        if gain > 0:  # false for NaN
            if gain > system.predicted_gain(step, tried, rule.rate) / 4:
                tried = max(tried / rule.decrease, _LEAST_DAMPING)
            return Iteration(found, tried)
        tried = max(tried, _LEAST_DAMPING) * rule.increase
    return Iteration(point, damping, "damping")


def _check(system: DampedSystem, first: bool) -> None:
    if not math.isfinite(system.scale):
        raise ValueError("`residual_fn` has derivatives that are not finite at the present parameters of `model`")
    if not first or system.scale:
        return
    if not system.gradient.any():
        raise ValueError(
            "`residual_fn` does not depend on the trainable parameters of `model`: every derivative is zero. "
            "Does it call `net`? Is the trainable adapter active, enabled and not merged?"
        )
    if not system.decay:
        raise ValueError(
            "`loss` has no curvature at any sample, so there is no second-order step: use a loss with curvature, or "
            "give `weight_decay`"
        )
