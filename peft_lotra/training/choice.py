"""Chooses a form of the damped system that fits into `max_memory`."""

from __future__ import annotations

from typing import Any

import torch

from .conjugate_gradients import ConjugateGradients
from .damped_system import COLUMN_NUMBERS, DampedSystem, NormalEquations, Prior, ResidualSpace
from .lower_triangle import LowerTriangle
from .problem import Evaluation, Problem

# How many fp64 vectors of P numbers, and of R numbers, are held at one time.
_OF_PARAMETERS, _OF_RESIDUALS = 16, 6


def damped_system(
    problem: Problem,
    theta: torch.Tensor,
    batch: Any,
    evaluation: Evaluation,
    prior: Prior | None = None,
    norm: float | None = None,
) -> DampedSystem:
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
    rows = problem.rows(theta, batch, evaluation.counts)
    further = problem.gradient(theta, batch, evaluation.counts)
    residuals, size, processes = evaluation.residuals, len(theta), problem.processes
    held = problem.chunks.bytes + 8 * (_OF_PARAMETERS * size + _OF_RESIDUALS * len(residuals))

    def fits(needed: int) -> bool:
        return not any(processes.any(held + needed > problem.max_memory))

    exact = not processes.several and further is None and len(residuals) < size
    if exact and fits(_residual_space_bytes(theta, len(residuals))):
        return ResidualSpace(rows, residuals, size, prior, norm)
    if fits(normal_equations_bytes(size)):
        return NormalEquations(rows, residuals, size, prior, further, norm, processes)

    def product(vector: torch.Tensor) -> torch.Tensor:
        try:
            return problem.product(theta, batch, evaluation.counts, vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # residuals and their gradients have been computed before
            raise ValueError(
                f"`max_memory` of {problem.max_memory} bytes has room for conjugate gradients only, and `model` has "
                f"no forward derivative for them ({error}): give {needed(normal_equations_bytes(size))} bytes"
            ) from error

    def needed(form: int) -> int:
        besides = form + 8 * (_OF_PARAMETERS * size + _OF_RESIDUALS * len(residuals))
        return max(besides + problem.chunks.of_one, 4 * (besides - 1) // 3 + 1)  # a chunk has a quarter, or one sample

    drawn = _rows_that_fit(theta, min(size, len(residuals)), problem.max_memory - held)
    if any(processes.any(drawn < 1)):
        raise ValueError(
            f"`max_memory` should be at least {needed(_residual_space_bytes(theta, 1))} bytes for {size} trained "
            f"numbers and {len(residuals)} residuals, and {needed(normal_equations_bytes(size))} for steps without "
            f"conjugate gradients, but the value passed is {problem.max_memory}: give more, or take fewer of either"
        )
    return ConjugateGradients(rows, residuals, size, product, drawn, evaluation.kinds, prior, further, norm, processes)


def normal_equations_bytes(size: int) -> int:
    """The bytes of the P × P matrix and its factor, P = `size`."""
    return 2 * 8 * LowerTriangle.numbers(size)


def _residual_space_bytes(theta: torch.Tensor, rows: int) -> int:
    """The bytes of J, of the matrix and its factor, and of two blocks of columns in fp64."""
    columns = 2 * 8 * min(rows * len(theta), max(rows, COLUMN_NUMBERS))
    return rows * len(theta) * theta.element_size() + 2 * 8 * LowerTriangle.numbers(rows) + columns


def _rows_that_fit(theta: torch.Tensor, most: int, room: int) -> int:
    """The largest number of rows, up to `most`, that take at most `room` bytes."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if _residual_space_bytes(theta, middle) <= room:
            least = middle
        else:
            most = middle - 1
    return least
