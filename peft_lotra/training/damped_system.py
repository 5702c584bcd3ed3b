"""The step of Gauss–Newton with Levenberg–Marquardt damping, from blocks of rows of J and the residuals r, in fp64.

JᵀJ and Jᵀr are half the (generalised Gauss–Newton) Hessian and half the gradient of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from .lower_triangle import LowerTriangle
from .processes import Processes

# How many numbers of J are converted to fp64 at one time: 16 MiB.
COLUMN_NUMBERS = 2**21
# D = diag(JᵀJ) + _FLOOR · (mean of diag(JᵀJ)) · I
_FLOOR = 1e-3


class Prior(NamedTuple):
    """c‖θ − θ₀‖², a further term of the loss; `away` is θ − θ₀, shape (P,)."""

    decay: float
    away: torch.Tensor


class DampedSystem(ABC):
    """(JᵀJ + cI + λD) δ = −(Jᵀr + c(θ − θ₀) + h) with D = diag(JᵀJ + cI) + 10⁻³ · (mean of diag(JᵀJ)) · I.

    h is the part of half the gradient that Jᵀr and the prior do not give.

    Attributes:
        scale: the mean of diag(JᵀJ).
        gradient: the negative of the right side, half the gradient of the loss.
        cosine: the largest |cosine| between a column of J and r.
    """

    def _measure(
        self,
        gradient: torch.Tensor,
        squares: torch.Tensor,
        norm: float,
        prior: Prior | None,
        further: torch.Tensor | None = None,
    ) -> None:
        """Set the attributes, from Jᵀr, diag(JᵀJ), √loss, the prior and h."""
        self.scale, self.decay = squares.mean().item(), 0.0
        # While a core is zero, its factors have zero derivatives. The second term damps them all the same.
        self.diagonal = squares + _FLOOR * self.scale
        if further is not None:
            gradient = gradient + further
        if prior is not None:
            self.decay, self.pull = prior.decay, prior.decay * prior.away.double()
            gradient, squares, self.diagonal = gradient + self.pull, squares + self.decay, self.diagonal + self.decay
        self.gradient = gradient
        self.cosine = (gradient.abs() / (squares.sqrt() * norm)).nan_to_num(0.0).max().item()  # 0 for a zero column

    @abstractmethod
    def step(self, damping: float) -> torch.Tensor:
        """δ; zero if the matrix is not positive definite in floating point. shape: (P,)"""

    def predicted_gain(self, step: torch.Tensor, damping: float, rate: float = 1.0) -> float:
        """‖r‖² − ‖r + αJδ‖² = −(2α − α²)·rᵀJδ + α²λ·δᵀDδ, for the rate α and the δ that solves the equation. The gains
        of the prior and of h are included."""
        linear, quadratic = -self.gradient @ step, damping * (self.diagonal @ step.square())
        return ((2 * rate - rate**2) * linear + rate**2 * quadratic).item()


class NormalEquations(DampedSystem):
    """The equation as it stands. It holds P² numbers for JᵀJ and its factor, and one block of J at a time.

    Args:
        blocks: blocks of rows of J, in the order of the residuals.
        residuals: r, shape (R,).
        size: P.
        prior: c and θ − θ₀; None without a prior.
        further: h, shape (P,); None if it is zero.
        norm: √loss; None if it is ‖r‖.
        processes: the processes. Each has its own rows of J and residuals; `further` and `norm` are of all processes.
    """

    def __init__(
        self,
        blocks: Iterable[torch.Tensor],
        residuals: torch.Tensor,
        size: int,
        prior: Prior | None = None,
        further: torch.Tensor | None = None,
        norm: float | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes(False)
        self.matrix = LowerTriangle(size, residuals)
        gradient, done = residuals.new_zeros(size), 0
        for block in blocks:
            block = block.double()
            self.matrix.add_products(block)
            gradient.addmv_(block.T, residuals[done : done + len(block)])
            done += len(block)
        for part in (*self.matrix.blocks, gradient):
            self.processes.sum(part)
        norm = norm_of(residuals, self.processes) if norm is None else norm
        self._measure(gradient, self.matrix.diagonal(), norm, prior, further)
        self.matrix.add_to_diagonal(self.decay)

    def step(self, damping: float) -> torch.Tensor:
        step = torch.zeros_like(self.gradient)
        if self.processes.is_first:
            factor = self.matrix.factor(damping * self.diagonal)
            step = step if factor is None else -factor.solved(self.gradient)
        return self.processes.of_first(step)


class Rows:
    """Rows of J, shape (R, P), in the dtype of the model. Products with them are in fp64."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of columns in fp64. All columns in fp64 may be twice as large as J itself."""
        width = max(1, COLUMN_NUMBERS // len(self.matrix))
        for start in range(0, self.matrix.shape[1], width):
            yield slice(start, start + width), self.matrix[:, start : start + width].double()

    def gram(self, diagonal: torch.Tensor) -> LowerTriangle:
        """JE⁻¹Jᵀ for a diagonal E > 0. shape: (R, R)"""
        found, roots = LowerTriangle(len(self.matrix), diagonal), diagonal.rsqrt()
        for columns, block in self.columns():
            found.add_products((block * roots[columns]).T)
        return found

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
    """δ = −D⁻¹Jᵀ(JD⁻¹Jᵀ + λI)⁻¹r, the same δ if h = 0. It holds J, and R² numbers for JD⁻¹Jᵀ and its factor.

    With a prior, δ = −E⁻¹(v + Jᵀ(JE⁻¹Jᵀ + I)⁻¹(r − JE⁻¹v)), where E = λD + cI and v = c(θ − θ₀).
    """

    def __init__(
        self,
        blocks: Iterable[torch.Tensor],
        residuals: torch.Tensor,
        size: int,
        prior: Prior | None = None,
        norm: float | None = None,
    ) -> None:
        jacobian, done = torch.empty(0), 0
        for block in blocks:
            if not done:
                jacobian = block.new_empty(len(residuals), size)
            jacobian[done : done + len(block)] = block
            done += len(block)
        self.rows, self.residuals = Rows(jacobian), residuals
        gradient, squares = residuals.new_empty(size), residuals.new_empty(size)
        for columns, block in self.rows.columns():
            torch.mv(block.T, residuals, out=gradient[columns])
            torch.sum(block.square(), dim=0, out=squares[columns])
        self._measure(gradient, squares, norm_of(residuals) if norm is None else norm, prior)
        if prior is None and self.scale > 0:
            self.matrix = self.rows.gram(self.diagonal)

    def step(self, damping: float) -> torch.Tensor:
        if self.decay:
            diagonal = damping * self.diagonal + self.decay
            right = self.residuals - self.rows.times(self.pull / diagonal)
            factor = self.rows.gram(diagonal).factor(torch.ones_like(right))
            if factor is None:
                return torch.zeros_like(self.gradient)
            return -(self.pull + self.rows.transposed_times(factor.solved(right))) / diagonal
        factor = self.matrix.factor(torch.full_like(self.residuals, damping))
        if factor is None:
            return torch.zeros_like(self.gradient)
        return -self.rows.transposed_times(factor.solved(self.residuals)) / self.diagonal


def norm_of(residuals: torch.Tensor, processes: Processes | None = None) -> float:
    """‖r‖ over the residuals of all processes."""
    square = residuals.square().sum().item()
    return float((square if processes is None else processes.totals([square])[0]) ** 0.5)
