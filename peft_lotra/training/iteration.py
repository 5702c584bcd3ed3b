"""One iteration of Gauss–Newton with Levenberg–Marquardt damping."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .choice import damped_system
from .damped_system import Prior
from .problem import Evaluation, Problem

# Bounds of λ. Above them the step is negligible, below them the fp64 factorisation fails.
_LEAST_DAMPING, _MOST_DAMPING = 1e-14, 1e10


class DampingRule(NamedTuple):
    """How λ changes, the gradient at which θ stays, the c of the prior, and the α of θ + αδ."""

    increase: float = 5.0
    decrease: float = 4.0
    gradient_tolerance: float = 1e-8
    weight_decay: float = 0.0
    rate: float = 1.0


class Iteration(NamedTuple):
    """The result of one iteration.

    Attributes:
        theta: θ + αδ, or the old θ if there is a `reason`.
        damping: λ for the next iteration.
        before, loss: the loss at the old θ and at `theta`, with the prior, on the batch of the iteration.
        evaluation: the Evaluation of `theta`.
        reason: why θ stays: "gradient" or "damping". None if θ has changed.
    """

    theta: torch.Tensor
    damping: float
    before: float
    loss: float
    evaluation: Evaluation
    reason: str | None = None


def total_loss(evaluation: Evaluation, theta: torch.Tensor, start: torch.Tensor, decay: float) -> float:
    """The loss at θ with the prior c‖θ − θ₀‖²."""
    return evaluation.loss + (decay * (theta.double() - start.double()).square().sum().item() if decay else 0.0)


def iterate(
    problem: Problem,
    theta: torch.Tensor,
    batch: Any,
    evaluation: Evaluation,
    damping: float,
    rule: DampingRule,
    start: torch.Tensor,
    first: bool,
) -> Iteration:
    """θ + αδ with the first λ whose δ reduces the loss on the batch. The model is not changed.

    Args:
        evaluation: the Evaluation of θ on the batch.
        start: θ₀ of the prior.
        first: whether to make the checks that one iteration makes for all.

    Raises:
        ValueError: naming `residual_fn` or `loss`.
    """
    decay = rule.weight_decay
    before = total_loss(evaluation, theta, start, decay)
    prior = Prior(decay, theta.double() - start.double()) if decay else None
    norm = None if problem.is_least_squares and not decay else abs(before) ** 0.5
    system = damped_system(problem, theta, batch, evaluation, prior, norm)
    if not math.isfinite(system.scale):
        raise ValueError("`residual_fn` has derivatives that are not finite at the present parameters of `model`")
    if first and not system.scale and not decay and system.gradient.any():
        raise ValueError(
            "`loss` has no curvature at any sample, so there is no second-order step: use a loss with curvature, or "
            "give `weight_decay`"
        )
    if first and not system.scale and not system.gradient.any():
        raise ValueError(
            "`residual_fn` does not depend on the trainable parameters of `model`: every derivative is zero. "
            "Does it call `net`? Is the trainable adapter active, enabled and not merged?"
        )
    if system.cosine <= rule.gradient_tolerance:
        return Iteration(theta, damping, before, before, evaluation, "gradient")
    tried = damping
    while tried <= _MOST_DAMPING:
        step = system.step(tried)
        candidate = theta + rule.rate * step.to(theta)
        found = problem.evaluate(candidate, batch)
        gain = before - total_loss(found, candidate, start, decay)
        if gain > 0:  # false for NaN
            if gain > system.predicted_gain(step, tried, rule.rate) / 4:
                tried = max(tried / rule.decrease, _LEAST_DAMPING)
            return Iteration(candidate, tried, before, before - gain, found)
        tried = max(tried, _LEAST_DAMPING) * rule.increase
    return Iteration(theta, damping, before, before, evaluation, "damping")
