"""A symmetric matrix held as its lower triangle, in half of the memory and little more than half of the time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Rows of a block. With fewer, matrix products are slow. With more, more of the upper triangle is computed.
_ROWS = 256


class LowerTriangle:
    """M, shape (n, n) with n = `size`, zero at first, in the dtype and on the device of `like`.

    It is in `blocks` of rows. A block holds the columns up to the end of its square on the diagonal. `failed` is true
    for a factor of a matrix that is not positive definite in floating point.
    """

    def __init__(self, size: int, like: torch.Tensor) -> None:
        starts = range(0, size, _ROWS)
        self.blocks = [like.new_zeros(min(_ROWS, size - start), min(start + _ROWS, size)) for start in starts]
        self.failed = torch.zeros((), dtype=torch.bool, device=like.device)

    @staticmethod
    def numbers(size: int) -> int:
        """How many numbers the blocks of an n × n matrix hold, n = `size`."""
        return sum((min(start + _ROWS, size) - start) * min(start + _ROWS, size) for start in range(0, size, _ROWS))

    def _rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        return ((slice(part.shape[1] - len(part), part.shape[1]), part) for part in self.blocks)

    def add_products(self, block: torch.Tensor) -> None:
        """M ← M + BᵀB. shape of B: (k, n)"""
        for rows, part in self._rows():
            part.addmm_(block[:, rows].T, block[:, : rows.stop])

    def factor(self, shift: torch.Tensor) -> LowerTriangle:
        """L with LLᵀ = M + diag(shift)."""
        found, failures = LowerTriangle(0, shift), [torch.zeros_like(self.failed)]
        for rows, part in self._rows():
            above = found._forward(part[:, : rows.start].T)
            square = torch.addmm(part[:, rows], above.T, above, alpha=-1)
            square.diagonal().add_(shift[rows])
            square, failed = torch.linalg.cholesky_ex(square)
            found.blocks.append(torch.cat([above.T, square], dim=1))
            failures.append(failed > 0)
        found.failed = torch.stack(failures).any()  # nobody looks: on an accelerator, each look waits for it
        return found

    def _forward(self, right: torch.Tensor) -> torch.Tensor:
        """L⁻¹ b. shape: (n, k)"""
        x = right.clone()
        for rows, part in self._rows():
            x[rows].addmm_(part[:, : rows.start], x[: rows.start], alpha=-1)
            x[rows] = torch.linalg.solve_triangular(part[:, rows], x[rows], upper=False)
        return x

    def solved(self, right: torch.Tensor) -> torch.Tensor:
        """(LLᵀ)⁻¹ b, where L is this matrix; zero if it has failed. shape: (n,)"""
        x = self._forward(right.unsqueeze(1))
        for rows, part in reversed([*self._rows()]):
            x[rows] = torch.linalg.solve_triangular(part[:, rows].T, x[rows], upper=True)
            x[: rows.start].addmm_(part[:, : rows.start].T, x[rows], alpha=-1)
        return torch.where(self.failed, 0.0, x.squeeze(1))
