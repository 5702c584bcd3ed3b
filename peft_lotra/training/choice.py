"""Chooses a form of the damped system that fits into `max_memory`."""

from __future__ import annotations

from bisect import bisect_right

import torch

from .conjugate_gradients import ConjugateGradients
from .damped_system import COLUMN_NUMBERS, DampedSystem, NormalEquations, ResidualSpace
from .losses import Given
from .lower_triangle import LowerTriangle
from .problem import Evaluation, Problem

# How many fp64 vectors of P numbers, and of R numbers, are held at one time.
_OF_PARAMETERS, _OF_RESIDUALS = 16, 6


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
    equation = problem.rows(point), point.residuals, problem.rest(point), problem.weight_decay
    vectors = 8 * (_OF_PARAMETERS * size + _OF_RESIDUALS * count)
    held = problem.chunks.bytes + vectors

    def fits(form: int) -> bool:
        return not any(processes.any(held + form > problem.max_memory))

    def needed(form: int) -> int:
        besides = form + vectors
        return max(besides + problem.chunks.of_one, 4 * (besides - 1) // 3 + 1)  # a chunk has a quarter, or one sample

    def product(vector: torch.Tensor) -> torch.Tensor:
        try:
            return problem.product(point, vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # residuals and their gradients have been computed before
            raise ValueError(
                f"`max_memory` of {problem.max_memory} bytes has room for conjugate gradients only, and `model` has "
                f"no forward derivative for them ({error}): give {needed(_normal_equations_bytes(size))} bytes"
            ) from error

    given = any(isinstance(loss, Given) for loss in problem.losses.values())
    if count < size and not processes.several and not given and fits(_residual_space_bytes(size, dtype, count)):
        return ResidualSpace(*equation, dtype)
    if fits(_normal_equations_bytes(size)):
        return NormalEquations(*equation, processes)
    most, room = min(size, count), problem.max_memory - held
    drawn = bisect_right(range(1, most + 1), room, key=lambda rows: _residual_space_bytes(size, dtype, rows))
    if any(processes.any(drawn < 1)):
        raise ValueError(
            f"`max_memory` should be at least {needed(_residual_space_bytes(size, dtype, 1))} bytes for {size} "
            f"trained numbers and {count} residuals, and {needed(_normal_equations_bytes(size))} for steps without "
            f"conjugate gradients, but the value passed is {problem.max_memory}: give more, or take fewer of either"
        )
    return ConjugateGradients(*equation, product, drawn, point.kinds, dtype, processes)


def _normal_equations_bytes(size: int) -> int:
    """The bytes of the P × P matrix and its factor, P = `size`."""
    return 2 * 8 * LowerTriangle.numbers(size)


def _residual_space_bytes(size: int, dtype: torch.dtype, rows: int) -> int:
    """The bytes of J, of the matrix and its factor, and of two blocks of columns in fp64."""
    columns = 2 * 8 * min(rows * size, max(rows, COLUMN_NUMBERS))
    return rows * size * dtype.itemsize + 2 * 8 * LowerTriangle.numbers(rows) + columns
