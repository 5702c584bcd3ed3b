"""The step of Gauss–Newton with Levenberg–Marquardt damping, from blocks of rows of J and the residuals r, in fp64.

JᵀJ and Jᵀr are half the (generalised Gauss–Newton) Hessian and half the gradient of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from .lower_triangle import LowerTriangle
from .processes import Processes

# How many numbers of J are converted to fp64 at one time: 16 MiB.
COLUMN_NUMBERS = 2**21
# D = diag(JᵀJ + cI) + _FLOOR · (mean of diag(JᵀJ)) · I
_FLOOR = 1e-2
Inverse = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
        missing: what the last δ leaves over on the right side; zero in exact forms.
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
        self.gradient = self.processes.sum(gradient) + self.rest
        self.scale = self.processes.sum(squares).mean()
        self.squares, self.missing = squares + self.decay, torch.zeros_like(self.rest)
        # While a core is zero, its factors have zero derivatives. The second term damps them all the same.
        self.diagonal = self.squares + _FLOOR * self.scale

    @abstractmethod
    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        """Keep what the step needs of these rows of J."""

    @abstractmethod
    def step(self, damping: float) -> torch.Tensor:
        """δ, shape (P,). It may be any vector, such as 0, if the matrix is not positive definite in floating point."""

    def cosine(self, loss: torch.Tensor) -> torch.Tensor:
        """The largest |cosine| between a column of J and r. The loss is ‖r‖², or takes its place."""
        cosines = self.gradient.abs() / (self.squares * loss.abs()).sqrt()
        return cosines.nan_to_num(0.0).max()  # 0 for a zero column

    def predicted_gain(self, step: torch.Tensor, damping: float, rate: float = 1.0) -> torch.Tensor:
        """‖r‖² − ‖r + αJδ‖² for the rate α and the last δ, with the gains of the prior and of v.

        This is −(2α − α²)·gᵀδ + α²(λDδ + m)ᵀδ, for the gradient g and what is missing, m.
        """
        linear = -(2 * rate - rate**2) * self.gradient
        return (linear + rate**2 * (damping * self.diagonal * step + self.missing)) @ step


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
                return torch.empty_like(self.gradient)  # the first process's is taken
            return -self.matrix.factor(damping * self.diagonal + self.decay).solved(self.gradient)

        return self.processes.of_first(self.processes.agreed(solved))


class Rows:
    """Rows of J, shape (R, P), in the dtype of the model. Products with them are in fp64."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self._gram: LowerTriangle | None = None

    def _columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of columns in fp64. All columns in fp64 may be twice as large as J itself."""
        width = max(1, COLUMN_NUMBERS // len(self.matrix))
        for start in range(0, self.matrix.shape[1], width):
            yield slice(start, start + width), self.matrix[:, start : start + width].double()

    def inverse(self, diagonal: torch.Tensor, damping: float, decay: float) -> Inverse:
        """(r, v) ↦ (JᵀJ + E)⁻¹(Jᵀr + v) = E⁻¹(v + λJᵀ(λJE⁻¹Jᵀ + λI)⁻¹(r − JE⁻¹v)) for E = λD + cI; E⁻¹v if that fails.

        D and c are the same in all calls.
        """
        if self._gram is None or decay:
            self._gram, roots = LowerTriangle(len(self.matrix), diagonal), (diagonal + decay / damping).rsqrt()
            for columns, block in self._columns():
                self._gram.add_products((block * roots[columns]).T)
        factor, shift = self._gram.factor(diagonal.new_full((len(self.matrix),), damping)), damping * diagonal + decay

        def inverse(residuals: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            right, scaled = residuals.clone(), rest / shift
            for columns, block in self._columns():
                right.addmv_(block, scaled[columns], alpha=-1)
            weights = factor.solved(right)
            return (rest + damping * torch.cat([block.T @ weights for _, block in self._columns()])) / shift

        return inverse


class ResidualSpace(DampedSystem):
    """The same δ by `Rows.inverse` of all rows, in one process. It holds J, and R² numbers for JE⁻¹Jᵀ and its factor.

    If c is zero, v should be zero, too: where λ is small, r − JE⁻¹v would be a difference of large numbers.
    """

    def __init__(self, equation: Equation) -> None:
        residuals, rest = equation.residuals, equation.rest
        self.rows = Rows(residuals.new_empty(len(residuals), len(rest), dtype=equation.dtype))
        super().__init__(equation)

    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        self.rows.matrix[rows] = block

    def step(self, damping: float) -> torch.Tensor:
        return -self.rows.inverse(self.diagonal, damping, self.decay)(self.residuals, self.rest)
