"""One iteration of Gauss–Newton with Levenberg–Marquardt damping, by the form of the equation that has room."""

from __future__ import annotations

import math
from bisect import bisect_right

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


def iterate(
    problem: Problem, point: Evaluation, damping: float, first: bool, rate: float = 1.0, tolerance: float = 0.0
) -> tuple[Evaluation, float, str | None]:
    """θ + αδ with the first λ whose δ reduces the loss on the batch of `point`. The model is not changed.

    Args:
        point: the Evaluation of θ.
        damping: the first λ that is tried.
        first: whether to make the checks that one iteration makes for all.
        rate: α.
        tolerance: the cosine between a column of J and r at which θ stays.

    Returns:
        The Evaluation of θ + αδ, λ for the next iteration, and None; or an Evaluation, λ, and why θ stays: "gradient",
        "damping" (no λ reduces the loss), or "not finite" (derivatives at θ, or residuals after each step).
    """
    if not math.isfinite(point.total):
        return point, damping, "not finite"
    system = damped_system(problem, point)
    if first:
        _check(system)
    if not math.isfinite(system.scale):
        return point, damping, "not finite"
    if system.cosine(point.total) <= tolerance:
        return point, damping, "gradient"
    tried, found, any_finite = damping, point, False
    while tried <= _MOST_DAMPING:
        step = system.step(tried)
        predicted = system.predicted_gain(step, tried, rate)
        found = problem.evaluate(point.theta + rate * step.to(point.theta), point.batch, beside=(predicted,))
        gain = point.total - found.total
        any_finite = any_finite or math.isfinite(gain)
        if gain > 0:  # false for NaN
            if gain > found.beside[0] / 4:
                tried = max(tried / _DECREASE, _LEAST_DAMPING)
            return found, tried, None
        tried = max(tried, _LEAST_DAMPING) * _INCREASE
    return (point, damping, "damping") if any_finite else (found, damping, "not finite")


def _check(system: DampedSystem) -> None:
    if not math.isfinite(system.scale):
        raise ValueError("`residual_fn` has derivatives that are not finite at the present parameters of `model`")
    if system.scale:
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


def damped_system(problem: Problem, point: Evaluation) -> DampedSystem:
    """`ResidualSpace` if R < P, `NormalEquations` otherwise, and `ConjugateGradients` if neither fits into the memory.

    Normal equations take P² operations for each residual. Conjugate gradients take 15 to 60 passes over the data.
    For 10⁵ residuals on one core, J and JᵀJ take 50 s if the residuals are values of a KAN with P = 5,184, and 64 s
    if they are its Laplacian; a pass takes 2.6 and 19 s. With P = 20,384, J and JᵀJ take 590 and 630 s, a pass 4.2
    and 39 s. So conjugate gradients are cheaper from P ≈ 5,000 on for values, and from 20,000 on for the Laplacian.
    (`examples/benchmarks/gauss_newton_cost.py --parts passes`, on a busy machine.)

    `ResidualSpace` is for one process, and for losses whose gradient is 2Jᵀr.

    Raises:
        ValueError: if `max_memory` is less than every form needs.
    """
    size, count, dtype, processes = len(point.theta), len(point.residuals), point.theta.dtype, problem.processes
    rows, rest = processes.agreed(problem.rows, point), problem.rest(point)
    equation = Equation(rows, point.residuals, rest, problem.weight_decay, dtype, processes)
    vectors = 8 * (_OF_PARAMETERS * size + _OF_RESIDUALS * count)
    held = vectors + max(problem.chunks.budget, problem.chunks.of_one)

    def fits(form: int) -> bool:
        return not any(processes.any(held + form > problem.max_memory))

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
    most, room = min(size, count), problem.max_memory - held
    drawn = bisect_right(range(1, most + 1), room, key=lambda rows: _residual_space_bytes(size, dtype, rows))
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
