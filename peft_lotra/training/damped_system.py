"""The step of Levenberg–Marquardt, from blocks of rows of J and the residuals r, in fp64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

# Numbers that are held in fp64 besides J: 32 MiB.
_COLUMN_NUMBERS = 2**22
# D = diag(JᵀJ) + this · its mean · I
_FLOOR = 1e-3


class NormalEquations:
    """(JᵀJ + λD) δ = −Jᵀr, which needs P² numbers and a block of J at a time."""

    def __init__(self, blocks: Iterable[torch.Tensor], residuals: torch.Tensor, size: int) -> None:
        self.matrix = residuals.new_zeros(size, size)
        gradient, done = residuals.new_zeros(size), 0
        for block in blocks:
            block = block.double()
            self.matrix.addmm_(block.T, block)
            gradient.addmv_(block.T, residuals[done : done + len(block)])
            done += len(block)
        self._measure(gradient, self.matrix.diagonal().clone(), residuals)

    def _measure(self, gradient: torch.Tensor, squares: torch.Tensor, residuals: torch.Tensor) -> None:
        self.gradient = gradient  # Jᵀr
        self.scale = squares.mean().item()
        # A factor has derivative zero while its core is zero: the second term gives it a damping all the same.
        self.diagonal = squares + _FLOOR * self.scale
        cosines = gradient.abs() / (squares.sqrt() * torch.linalg.vector_norm(residuals))
        self.cosine = cosines.nan_to_num(0.0).max().item()  # zero where a norm is

    def step(self, damping: float) -> torch.Tensor:
        return -_solve(self.matrix, damping * self.diagonal, self.gradient)

    def predicted_gain(self, step: torch.Tensor, damping: float) -> float:
        """‖r‖² − ‖r + Jδ‖² = −rᵀJδ + λ·δᵀDδ for the δ that solves the equation."""
        return (damping * (self.diagonal @ step.square()) - self.gradient @ step).item()


class ResidualSpace(NormalEquations):
    """δ = −D⁻¹Jᵀ(JD⁻¹Jᵀ + λI)⁻¹r, the same δ, which needs J and R² numbers."""

    def __init__(self, blocks: Iterable[torch.Tensor], residuals: torch.Tensor, size: int) -> None:
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
        self._measure(gradient, squares, residuals)
        self.matrix = residuals.new_zeros(len(residuals), len(residuals))
        for columns, block in self._columns():
            self.matrix.addmm_(block / self.diagonal[columns], block.T)

    def _columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """J in fp64, some columns at a time: all of it may be twice as large as J itself."""
        width = max(1, _COLUMN_NUMBERS // len(self.jacobian))
        for start in range(0, self.jacobian.shape[1], width):
            yield slice(start, start + width), self.jacobian[:, start : start + width].double()

    def step(self, damping: float) -> torch.Tensor:
        weights = _solve(self.matrix, torch.full_like(self.residuals, damping), self.residuals)
        return -torch.cat([block.T @ weights for _, block in self._columns()]) / self.diagonal


def linear_system(blocks: Iterable[torch.Tensor], residuals: torch.Tensor, size: int) -> NormalEquations:
    """The cheaper of the two forms."""
    return (ResidualSpace if len(residuals) < size else NormalEquations)(blocks, residuals, size)


def _solve(matrix: torch.Tensor, shift: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(M + diag(shift))⁻¹ b; zero, which is no step, where this is not positive definite in floating point."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return torch.zeros_like(right) if failed else torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
