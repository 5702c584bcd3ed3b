"""Solves the damped system without P² numbers, by conjugate gradients. Some rows of J make a preconditioner."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from .damped_system import DampedSystem, Equation, Inverse, Rows

# Estimated error at which the iteration ends, as a fraction of the step in the norm of the matrix. The predicted gain
# lacks the square of it.
_TOLERANCE = 1e-3
_MOST_PRODUCTS, _LAST = 200, 4
_Map = Callable[[torch.Tensor], torch.Tensor]


class ConjugateGradients(DampedSystem):
    """δ by products v ↦ JᵀJv, preconditioned with (SᵀS + E)⁻¹ = E⁻¹ − E⁻¹Sᵀ(SE⁻¹Sᵀ + I)⁻¹SE⁻¹, where E = λD + cI.

    S has m rows of J, drawn at random: equally many of each kind, as far as the kind has rows. They are multiplied by
    √(rows of the kind / rows drawn of it). Wherever the iteration ends, its δ is a step downhill.

    Args:
        product: the function v ↦ JᵀJv, with the rows of this process. shapes: (P,)
        drawn: m.
        kinds: how many rows of J belong to each kind of residuals, in their order.

    Source: Hestenes and Stiefel (1952); Woodbury's formula.
    """

    def __init__(self, equation: Equation, product: _Map, drawn: int, kinds: Sequence[int]) -> None:
        self.product, self.tolerance, rest = product, _TOLERANCE, equation.rest
        chosen, scales = _drawn(kinds, drawn)
        self._rows = chosen.tolist()  # where rows are is known without waiting for an accelerator
        self.chosen, self.scales = chosen.to(rest.device), scales.to(rest.device)
        self.sample = Rows(rest.new_empty(len(chosen), len(rest), dtype=equation.dtype))
        super().__init__(equation)

    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        here = slice(bisect_left(self._rows, rows.start), bisect_left(self._rows, rows.stop))
        drawn = block[self.chosen[here] - rows.start]
        self.sample.matrix[here] = drawn.mul_(self.scales[here].unsqueeze(1))

    def step(self, damping: float) -> torch.Tensor:
        shift, processes = damping * self.diagonal + self.decay, self.processes
        none = torch.zeros_like(self.scales)
        condition = processes.agreed(self._inverse, damping)
        step, rest = torch.zeros_like(self.gradient), -self.gradient
        direction, before = torch.zeros_like(rest), torch.ones_like(self.scale)
        gains: list[float] = []  # by which δᵀAδ grows
        while len(gains) < _MOST_PRODUCTS:
            conditioned = processes.of_first(processes.agreed(condition, none, rest))
            now = rest @ conditioned
            direction = conditioned + (now / before) * direction
            image = processes.sum(self.product(direction)) + shift * direction
            length = now / (direction @ image)
            gain, of_length = torch.stack([length * now, length]).tolist()
            if not (gain > 0 and of_length > 0):  # solved, or only rounding is left
                break
            step += length * direction
            rest -= length * image
            gains.append(gain)
            before = now
            # All gains add up to δᵀAδ of the solution. The last few gains estimate what is missing.
            if len(gains) > _LAST + 1 and sum(gains[-_LAST:]) <= self.tolerance**2 * sum(gains):
                break
        self.missing = rest
        return processes.of_first(step)

    def _inverse(self, damping: float) -> Inverse:
        if not self.processes.is_first:  # the first process's is taken
            return lambda _, rest: torch.empty_like(rest)
        return self.sample.inverse(self.diagonal, damping, self.decay)


def _drawn(kinds: Sequence[int], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows to draw, ascending, and √(rows of the kind / rows drawn of it). All iterations draw the same rows."""
    generator, left = torch.Generator().manual_seed(0), min(number, sum(kinds))
    chosen, scales = [], []
    for done, index in enumerate(sorted(range(len(kinds)), key=lambda index: kinds[index])):
        share = min(kinds[index], max(1, left // (len(kinds) - done)))
        left -= share
        chosen.append(sum(kinds[:index]) + torch.randperm(kinds[index], generator=generator)[:share])
        scales.append(torch.full((share,), (kinds[index] / share) ** 0.5, dtype=torch.float64))
    rows, order = torch.cat(chosen).sort()
    return rows, torch.cat(scales)[order]
