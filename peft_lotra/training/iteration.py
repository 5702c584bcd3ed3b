"""One iteration of Gauss–Newton with Levenberg–Marquardt damping, by the form of the equation that has room."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

import torch

from .conjugate_gradients import ConjugateGradients
from .damped_system import COLUMN_NUMBERS, DampedSystem, Equation, NormalEquations, ResidualSpace
from .losses import Given
from .lower_triangle import LowerTriangle
from .problem import Evaluation, Problem

# Bounds of λ. Above them the step is negligible, below them the fp64 factorisation fails.
_LEAST_DAMPING, _MOST_DAMPING = 1e-14, 1e10
# The factor on λ after a step that did not reduce the loss, and its divisor after a good step.
_INCREASE, _DECREASE = 5.0, 4.0
# How many fp64 vectors of P numbers, and of R numbers, are held at one time.
_OF_PARAMETERS, _OF_RESIDUALS = 16, 6


class Iteration(NamedTuple):
    """What an iteration has found.

    Attributes:
        point: the Evaluation of θ + αδ, or the last that was looked at, if θ stays.
        before, after: the loss of θ and that of `point`.
        damping: λ for the next iteration.
        reason: why θ stays: "gradient", "damping" (no λ reduces the loss), or "not finite" (derivatives at θ, or
            residuals after each step). None if it does not.
    """

    point: Evaluation
    before: float
    after: float
    damping: float
    reason: str | None


def iterate(
    problem: Problem, point: Evaluation, damping: float, first: bool, rate: float = 1.0, tolerance: float = 0.0
) -> Iteration:
    """θ + αδ with the first λ whose δ reduces the loss on the batch of `point`. The model is not changed.

    On an accelerator, the host waits for values once, and once for each λ that is tried by an exact form.

    Args:
        point: the Evaluation of θ.
        damping: the first λ that is tried.
        first: whether to make the checks that one iteration makes for all.
        rate: α.
        tolerance: the cosine between a column of J and r at which θ stays.
    """
    system = damped_system(problem, point)
    before, scale, cosine = torch.stack([point.total, system.scale, system.cosine(point.total)]).tolist()
    if first:
        _check(system, scale)
    if not math.isfinite(before + scale):
        return Iteration(point, before, before, damping, "not finite")
    if cosine <= tolerance:
        return Iteration(point, before, before, damping, "gradient")
    tried, found, any_finite = damping, point, False
    while tried <= _MOST_DAMPING:
        step = system.step(tried)
        found = problem.evaluate(point.theta + rate * step.to(point.theta), point.batch)
        after, predicted = torch.stack([found.total, system.predicted_gain(step, tried, rate)]).tolist()
        if after < before:  # false for NaN
            good = before - after > predicted / 4
            return Iteration(found, before, after, max(tried / _DECREASE, _LEAST_DAMPING) if good else tried, None)
        any_finite = any_finite or math.isfinite(after)
        tried = max(tried, _LEAST_DAMPING) * _INCREASE
    point, reason = (point, "damping") if any_finite else (found, "not finite")
    return Iteration(point, before, before, damping, reason)


def _check(system: DampedSystem, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError("`residual_fn` has derivatives that are not finite at the present parameters of `model`")
    if not scale and not system.gradient.any():
        raise ValueError(
            "`residual_fn` does not depend on the trainable parameters of `model`: every derivative is zero. "
            "Does it call `net`? Is the trainable adapter active, enabled and not merged?"
        )
    if not scale and not system.decay:
        raise ValueError(
            "`loss` has no curvature at any sample, so there is no second-order step: use a loss with curvature, or "
            "give `weight_decay`"
        )


def damped_system(problem: Problem, point: Evaluation) -> DampedSystem:
    """`ResidualSpace` if R < P, `NormalEquations` otherwise, and `ConjugateGradients` if neither fits into the memory.

    Conjugate gradients are for lack of memory alone, although a product with JᵀJ costs less than its share of JᵀJ if P
    is large. How many products they take depends on λ, which falls during a fit. For values of a KAN with P = 5,184 at
    5,000 points, they take 21 products and 0.7 × the time of an exact step at λ = 0.3. At λ = 10⁻⁴, 200 products and
    4 × the time are not enough, and the step raises the loss. (`examples/benchmarks/gauss_newton_cost.py --parts
    steps`, on a busy machine.)

    `ResidualSpace` is for one process, and for losses whose gradient is 2Jᵀr.

    Raises:
        ValueError: if `max_memory` is less than every form needs.
    """
    size, count, dtype, processes = len(point.theta), len(point.residuals), point.theta.dtype, problem.processes
    rows, rest = processes.agreed(problem.rows, point), problem.rest(point)
    equation = Equation(rows, point.residuals, rest, problem.weight_decay, dtype, processes)
    vectors = 8 * (_OF_PARAMETERS * size + _OF_RESIDUALS * count)
    room = problem.max_memory - vectors - max(problem.chunks.budget, problem.chunks.of_one)

    def fits(form: int) -> bool:
        return not any(processes.any(form > room))

    def needed(form: int) -> int:
        besides = form + vectors
        return max(besides + problem.chunks.of_one, 4 * (besides - 1) // 3 + 1)  # a chunk has a quarter, or one sample

    def product(vector: torch.Tensor) -> torch.Tensor:
        try:
            return processes.agreed(problem.product, point, vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # residuals and their gradients have been computed before
            raise ValueError(
                f"`max_memory` of {problem.max_memory} bytes has room for conjugate gradients only, and `model` has "
                f"no forward derivative for them ({error}): give {needed(_normal_equations_bytes(size))} bytes"
            ) from error

    given = any(isinstance(loss, Given) for loss in problem.losses.values())
    if count < size and not processes.several and not given and fits(_residual_space_bytes(size, dtype, count)):
        return ResidualSpace(equation)
    if fits(_normal_equations_bytes(size)):
        return NormalEquations(equation)
    numbers = range(1, min(size, count) + 1)
    drawn = bisect_right(numbers, room, key=lambda rows: _residual_space_bytes(size, dtype, rows))
    if any(processes.any(drawn < 1)):
        raise ValueError(
            f"`max_memory` should be at least {needed(_residual_space_bytes(size, dtype, 1))} bytes for {size} "
            f"trained numbers and {count} residuals, and {needed(_normal_equations_bytes(size))} for steps without "
            f"conjugate gradients, but the value passed is {problem.max_memory}: give more, or take fewer of either"
        )
    return ConjugateGradients(equation, product, drawn, [number for _, number in point.kinds])


def _normal_equations_bytes(size: int) -> int:
    """The bytes of the P × P matrix and its factor, P = `size`."""
    return 2 * 8 * LowerTriangle.numbers(size)


def _residual_space_bytes(size: int, dtype: torch.dtype, rows: int) -> int:
    """The bytes of J, of the matrix and its factor, and of two blocks of columns in fp64."""
    columns = 2 * 8 * min(rows * size, max(rows, COLUMN_NUMBERS))
    return rows * size * dtype.itemsize + 2 * 8 * LowerTriangle.numbers(rows) + columns
