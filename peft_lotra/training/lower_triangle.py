"""A symmetric matrix held as its lower triangle, in half of the memory and little more than half of the time."""

from __future__ import annotations

import torch

# Rows of a block. With fewer, matrix products are slow. With more, more of the upper triangle is computed.
_ROWS = 256


class LowerTriangle:
    """M, shape (n, n) with n = `size`, zero at first, in the dtype and on the device of `like`.

    It is in `blocks` of rows. A block holds the columns up to the end of its square on the diagonal.
    """

    failed: torch.Tensor  # of a factor: whether there is none, shape (). On an accelerator, a look at it would wait.

    def __init__(self, size: int, like: torch.Tensor) -> None:
        self.size = size
        self.blocks = [like.new_zeros(len(rows), rows.stop) for rows in self._ranges()]

    @staticmethod
    def numbers(size: int) -> int:
        """How many numbers the blocks of an n × n matrix hold, n = `size`."""
        return sum((min(start + _ROWS, size) - start) * min(start + _ROWS, size) for start in range(0, size, _ROWS))

    def _ranges(self) -> list[range]:
        return [range(start, min(start + _ROWS, self.size)) for start in range(0, self.size, _ROWS)]

    def add_products(self, block: torch.Tensor) -> None:
        """M ← M + BᵀB. shape of B: (k, n)"""
        for rows, part in zip(self._ranges(), self.blocks, strict=True):
            part.addmm_(block[:, rows.start : rows.stop].T, block[:, : rows.stop])

    def factor(self, shift: torch.Tensor) -> LowerTriangle:
        """L with LLᵀ = M + diag(shift); it has `failed` if that sum is not positive definite in floating point."""
        found = LowerTriangle(0, shift)
        found.size, failures = self.size, []
        for rows, part in zip(self._ranges(), self.blocks, strict=True):
            factor = part.clone()
            factor.diagonal(rows.start).add_(shift[rows.start : rows.stop])
            for columns, above in zip(self._ranges(), [*found.blocks, factor], strict=False):
                left, here = slice(columns.start), slice(columns.start, columns.stop)
                if columns.start:
                    factor[:, here].addmm_(factor[:, left], above[:, left].T, alpha=-1)
                if columns != rows:
                    factor[:, here] = torch.linalg.solve_triangular(
                        above[:, here].T, factor[:, here], upper=True, left=False
                    )
                    continue
                factor[:, here], failed = torch.linalg.cholesky_ex(factor[:, here])
                failures.append(failed)
            found.blocks.append(factor)
        found.failed = torch.stack(failures).any()
        return found

    def solved(self, right: torch.Tensor) -> torch.Tensor:
        """(LLᵀ)⁻¹ b, where L is this matrix. shape: (n,)"""
        x = right.unsqueeze(1).clone()
        for rows, part in zip(self._ranges(), self.blocks, strict=True):
            above, here = x[: rows.start], x[rows.start : rows.stop]
            here.addmm_(part[:, : rows.start], above, alpha=-1)
            here.copy_(torch.linalg.solve_triangular(part[:, rows.start :], here, upper=False))
        for rows, part in reversed([*zip(self._ranges(), self.blocks, strict=True)]):
            above, here = x[: rows.start], x[rows.start : rows.stop]
            here.copy_(torch.linalg.solve_triangular(part[:, rows.start :].T, here, upper=True))
            above.addmm_(part[:, : rows.start].T, here, alpha=-1)
        return x.squeeze(1)
