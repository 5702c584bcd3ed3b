"""The step of Gauss–Newton with Levenberg–Marquardt damping, from blocks of rows of J and the residuals r, in fp64.

JᵀJ and Jᵀr are half the (generalised Gauss–Newton) Hessian and half the gradient of the loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from .lower_triangle import LowerTriangle
from .processes import Processes

# How many numbers of J are converted to fp64 at one time: 16 MiB.
COLUMN_NUMBERS = 2**21
# D = diag(JᵀJ + cI) + _FLOOR · (mean of diag(JᵀJ)) · I
_FLOOR = 1e-2


class Equation(NamedTuple):
    """(JᵀJ + cI) δ = −(Jᵀr + v), before it is damped.

    Attributes:
        blocks: blocks of rows of J in fp64, in the order of the residuals.
        residuals: r, shape (R,).
        rest: v, the part of half the gradient that Jᵀr does not give, shape (P,).
        decay: c of the prior c‖θ − θ₀‖². Its half gradient, c(θ − θ₀), is in v.
        dtype: the dtype of the model, in which J is held.
        processes: the processes. Each has its own rows of J and residuals; `rest` is of all processes.
    """

    blocks: Iterable[torch.Tensor]
    residuals: torch.Tensor
    rest: torch.Tensor
    decay: float = 0.0
    dtype: torch.dtype = torch.float64
    processes: Processes = Processes(False)


class DampedSystem(ABC):
    """(JᵀJ + cI + λD) δ = −(Jᵀr + v) with D = diag(JᵀJ + cI) + 10⁻² · (mean of diag(JᵀJ)) · I.

    Attributes:
        scale: the mean of diag(JᵀJ).
        gradient: Jᵀr + v, half the gradient of the loss.
    """

    def __init__(self, equation: Equation) -> None:
        blocks, self.residuals, self.rest, self.decay, _, self.processes = equation
        gradient, squares = torch.zeros_like(self.rest), torch.zeros_like(self.rest)

        def read() -> None:
            done = 0
            for block in blocks:
                rows = slice(done, done + len(block))
                gradient.addmv_(block.T, self.residuals[rows])
                for part in block.split(64):  # a few rows: squares of a block would take as much memory as the block
                    squares.add_(part.square().sum(dim=0))
                self._keep(block, rows)
                done = rows.stop

        self.processes.agreed(read)
        self.processes.sum(gradient)
        mean = self.processes.sum(squares).mean()
        self.gradient, self.squares = gradient + self.rest, squares + self.decay
        cosines = (self.gradient.abs() / self.squares.sqrt()).nan_to_num(0.0)  # 0 for a zero column
        self.scale, self._cosine = torch.stack([mean, cosines.max()]).tolist()  # in one wait
        # While a core is zero, its factors have zero derivatives. The second term damps them all the same.
        self.diagonal = self.squares + _FLOOR * self.scale

    @abstractmethod
    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        """Keep what the step needs of these rows of J."""

    @abstractmethod
    def step(self, damping: float) -> torch.Tensor:
        """δ; zero if the matrix is not positive definite in floating point. shape: (P,)"""

    def cosine(self, loss: float) -> float:
        """The largest |cosine| between a column of J and r. The loss is ‖r‖², or takes its place."""
        return self._cosine / abs(loss) ** 0.5 if loss else math.inf if self._cosine else 0.0

    def predicted_gain(self, step: torch.Tensor, damping: float, rate: float = 1.0) -> torch.Tensor:
        """‖r‖² − ‖r + αJδ‖² = −(2α − α²)·rᵀJδ + α²λ·δᵀDδ, for the rate α and the δ that solves the equation. The gains
        of the prior and of v are included."""
        linear, quadratic = -self.gradient @ step, damping * (self.diagonal @ step.square())
        return (2 * rate - rate**2) * linear + rate**2 * quadratic


class NormalEquations(DampedSystem):
    """The equation as it stands. It holds P² numbers for JᵀJ and its factor, and one block of J at a time."""

    def __init__(self, equation: Equation) -> None:
        self.matrix = LowerTriangle(len(equation.rest), equation.rest)
        super().__init__(equation)
        for part in self.matrix.blocks:
            self.processes.sum(part)

    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        self.matrix.add_products(block)

    def step(self, damping: float) -> torch.Tensor:
        def solved() -> torch.Tensor:
            if not self.processes.is_first:
                return torch.zeros_like(self.gradient)
            factor = self.matrix.factor(damping * self.diagonal + self.decay)
            return torch.where(factor.failed, 0, -factor.solved(self.gradient))

        return self.processes.of_first(self.processes.agreed(solved))


class Rows:
    """Rows of J, shape (R, P), in the dtype of the model. Products with them are in fp64."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self._gram: LowerTriangle | None = None

    def columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of columns in fp64. All columns in fp64 may be twice as large as J itself."""
        width = max(1, COLUMN_NUMBERS // len(self.matrix))
        for start in range(0, self.matrix.shape[1], width):
            yield slice(start, start + width), self.matrix[:, start : start + width].double()

    def factor(self, diagonal: torch.Tensor, damping: float, decay: float) -> LowerTriangle:
        """L with LLᵀ = λ(JE⁻¹Jᵀ + I) for E = λD + cI, as `LowerTriangle.factor` gives it. D and c never change."""
        if self._gram is None or decay:
            self._gram, roots = LowerTriangle(len(self.matrix), diagonal), (diagonal + decay / damping).rsqrt()
            for columns, block in self.columns():
                self._gram.add_products((block * roots[columns]).T)
        return self._gram.factor(diagonal.new_full((len(self.matrix),), damping))

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """J v. shape: (R,)"""
        found = vector.new_zeros(len(self.matrix))
        for columns, block in self.columns():
            found.addmv_(block, vector[columns])
        return found

    def transposed_times(self, vector: torch.Tensor) -> torch.Tensor:
        """Jᵀw. shape: (P,)"""
        return torch.cat([block.T @ vector for _, block in self.columns()])


class ResidualSpace(DampedSystem):
    """δ = −E⁻¹(v + λJᵀ(λJE⁻¹Jᵀ + λI)⁻¹(r − JE⁻¹v)) with E = λD + cI: the same δ, in one process.

    It holds J, and R² numbers for JE⁻¹Jᵀ and its factor. If c is zero, v should be zero, too: where λ is small,
    r − JE⁻¹v would be a difference of large numbers.
    """

    def __init__(self, equation: Equation) -> None:
        residuals, rest = equation.residuals, equation.rest
        self.rows = Rows(residuals.new_empty(len(residuals), len(rest), dtype=equation.dtype))
        super().__init__(equation)

    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        self.rows.matrix[rows] = block

    def step(self, damping: float) -> torch.Tensor:
        factor, shift = self.rows.factor(self.diagonal, damping, self.decay), damping * self.diagonal + self.decay
        weights = factor.solved(self.residuals - self.rows.times(self.rest / shift))
        step = -(self.rest + damping * self.rows.transposed_times(weights)) / shift
        return torch.where(factor.failed, 0, step)
