"""The step of Gauss–Newton with Levenberg–Marquardt damping, from blocks of rows of J and the residuals r, in fp64.

JᵀJ and Jᵀr are half the (generalised Gauss–Newton) Hessian and half the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

# Numbers that are held in fp64 besides J: 32 MiB.
_COLUMN_NUMBERS = 2**22
# D = diag(JᵀJ) + this · its mean · I
_FLOOR = 1e-3


class Prior(NamedTuple):
    """c‖θ − θ₀‖², a further term of the loss; `away` is θ − θ₀, shape (P,)."""

    decay: float
    away: torch.Tensor


class NormalEquations:
    """(JᵀJ + cI + λD) δ = −(Jᵀr + c(θ − θ₀) + h), which needs P² numbers and a block of J at a time.

    Args:
        blocks: of rows of J, in the order of the residuals.
        residuals: r, shape (R,).
        size: P.
        prior: c and θ − θ₀; none if there is no such term.
        further: h, what else there is of half the gradient, shape (P,).
        norm: √loss, if that is not ‖r‖.
    """

    def __init__(
        self,
        blocks: Iterable[torch.Tensor],
        residuals: torch.Tensor,
        size: int,
        prior: Prior | None = None,
        further: torch.Tensor | None = None,
        norm: float | None = None,
    ) -> None:
        self.matrix = residuals.new_zeros(size, size)
        gradient, done = residuals.new_zeros(size), 0
        for block in blocks:
            block = block.double()
            self.matrix.addmm_(block.T, block)
            gradient.addmv_(block.T, residuals[done : done + len(block)])
            done += len(block)
        if further is not None:
            gradient += further
        self._measure(gradient, self.matrix.diagonal().clone(), residuals, prior, norm)
        self.matrix.diagonal().add_(self.decay)

    def _measure(
        self,
        gradient: torch.Tensor,
        squares: torch.Tensor,
        residuals: torch.Tensor,
        prior: Prior | None,
        norm: float | None,
    ) -> None:
        self.scale, self.decay = squares.mean().item(), 0.0
        # A factor has derivative zero while its core is zero: the second term gives it a damping all the same.
        self.diagonal = squares + _FLOOR * self.scale
        if prior is not None:
            self.decay, self.pull = prior.decay, prior.decay * prior.away.double()
            gradient, squares, self.diagonal = gradient + self.pull, squares + self.decay, self.diagonal + self.decay
        self.gradient = gradient  # half that of the loss
        cosines = gradient.abs() / (squares.sqrt() * (torch.linalg.vector_norm(residuals) if norm is None else norm))
        self.cosine = cosines.nan_to_num(0.0).max().item()  # zero where a norm is

    def step(self, damping: float) -> torch.Tensor:
        return -_solve(self.matrix, damping * self.diagonal, self.gradient)

    def predicted_gain(self, step: torch.Tensor, damping: float, rate: float = 1.0) -> float:
        """‖r‖² − ‖r + αJδ‖² = −(2α − α²)·rᵀJδ + α²λ·δᵀDδ for the δ that solves the equation; of the prior and h the
        same. α is the rate."""
        linear, quadratic = -self.gradient @ step, damping * (self.diagonal @ step.square())
        return ((2 * rate - rate**2) * linear + rate**2 * quadratic).item()


class ResidualSpace(NormalEquations):
    """δ = −D⁻¹Jᵀ(JD⁻¹Jᵀ + λI)⁻¹r, the same δ where h is zero, which needs J and R² numbers.

    With a prior, δ = −E⁻¹(v + Jᵀ(JE⁻¹Jᵀ + I)⁻¹(r − JE⁻¹v)) with E = λD + cI and v = c(θ − θ₀).
    """

    def __init__(
        self,
        blocks: Iterable[torch.Tensor],
        residuals: torch.Tensor,
        size: int,
        prior: Prior | None = None,
        norm: float | None = None,
    ) -> None:
        self.jacobian, done = torch.empty(0), 0
        for block in blocks:
            if not done:
                self.jacobian = block.new_empty(len(residuals), size)
            self.jacobian[done : done + len(block)] = block
            done += len(block)
        self.residuals = residuals
        gradient, squares = residuals.new_empty(size), residuals.new_empty(size)
        for columns, block in self._columns():
            torch.mv(block.T, residuals, out=gradient[columns])
            torch.sum(block.square(), dim=0, out=squares[columns])
        self._measure(gradient, squares, residuals, prior, norm)
        if prior is None:
            self.matrix = self._gram(self.diagonal)

    def _columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """J in fp64, some columns at a time: all of it may be twice as large as J itself."""
        width = max(1, _COLUMN_NUMBERS // len(self.jacobian))
        for start in range(0, self.jacobian.shape[1], width):
            yield slice(start, start + width), self.jacobian[:, start : start + width].double()

    def _gram(self, diagonal: torch.Tensor) -> torch.Tensor:
        """JE⁻¹Jᵀ. shape: (R, R)"""
        matrix = self.residuals.new_zeros(len(self.residuals), len(self.residuals))
        for columns, block in self._columns():
            matrix.addmm_(block / diagonal[columns], block.T)
        return matrix

    def step(self, damping: float) -> torch.Tensor:
        if self.decay:
            diagonal, right = damping * self.diagonal + self.decay, self.residuals.clone()
            for columns, block in self._columns():
                right -= block @ (self.pull[columns] / diagonal[columns])
            weights = _solve(self._gram(diagonal), torch.ones_like(right), right)
            return -(self.pull + self._transposed(weights)) / diagonal
        weights = _solve(self.matrix, torch.full_like(self.residuals, damping), self.residuals)
        return -self._transposed(weights) / self.diagonal

    def _transposed(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([block.T @ weights for _, block in self._columns()])


def linear_system(
    blocks: Iterable[torch.Tensor],
    residuals: torch.Tensor,
    size: int,
    prior: Prior | None = None,
    further: torch.Tensor | None = None,
    norm: float | None = None,
) -> NormalEquations:
    """The cheaper of the two forms, if both are exact; see `NormalEquations`."""
    if len(residuals) < size and further is None:
        return ResidualSpace(blocks, residuals, size, prior, norm)
    return NormalEquations(blocks, residuals, size, prior, further, norm)


def _solve(matrix: torch.Tensor, shift: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(M + diag(shift))⁻¹ b; zero, which is no step, where this is not positive definite in floating point."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return torch.zeros_like(right) if failed else torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
