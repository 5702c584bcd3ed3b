"""Solves the damped system without P² numbers, by conjugate gradients. Some rows of J make a preconditioner."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from .damped_system import DampedSystem, Equation, Rows

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
        self.places = chosen.tolist()
        self.chosen, self.scales = chosen.to(rest.device), scales.to(rest.device)
        self.sample = Rows(rest.new_empty(len(self.chosen), len(rest), dtype=equation.dtype))
        super().__init__(equation)

    def _keep(self, block: torch.Tensor, rows: slice) -> None:
        here = slice(bisect_left(self.places, rows.start), bisect_left(self.places, rows.stop))
        drawn = block[self.chosen[here] - rows.start]
        self.sample.matrix[here] = drawn.mul_(self.scales[here].unsqueeze(1))

    def step(self, damping: float) -> torch.Tensor:
        shift = damping * self.diagonal + self.decay
        precondition = self.processes.agreed(self._preconditioner, shift, damping)
        step, rest = torch.zeros_like(self.gradient), -self.gradient
        direction = rest
        gains: list[float] = []  # by which δᵀAδ grows
        before = 1.0  # the squared preconditioned norm of `rest`, one product ago
        for number in range(_MOST_PRODUCTS):
            conditioned = self.processes.of_first(self.processes.agreed(precondition, rest))
            norm = rest @ conditioned
            direction = conditioned + norm / before * direction if number else conditioned
            image = self.processes.sum(self.product(direction)) + shift * direction
            now, curvature = torch.stack([norm, direction @ image]).tolist()
            if not (now > 0 and curvature > 0):  # solved, or only rounding is left
                break
            length = now / curvature
            step.add_(direction, alpha=length)
            rest.sub_(image, alpha=length)
            gains.append(length * now)
            before = now
            # All gains add up to δᵀAδ of the solution. The last few gains estimate what is missing.
            if number > _LAST and sum(gains[-_LAST:]) <= self.tolerance**2 * sum(gains):
                break
        self.missing = rest
        return self.processes.of_first(step)

    def predicted_gain(self, step: torch.Tensor, damping: float, rate: float = 1.0) -> torch.Tensor:
        """The same for the δ that `step` returned last, whose equation has an error, `missing`, on the right side."""
        return super().predicted_gain(step, damping, rate) + rate**2 * (self.missing @ step)

    def _preconditioner(self, shift: torch.Tensor, damping: float) -> _Map:
        if not self.processes.is_first:  # the first process's is taken
            return torch.empty_like
        factor = self.sample.factor(self.diagonal, damping, self.decay)

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            weights = factor.solved(self.sample.times(vector / shift))
            return torch.where(factor.failed, vector, vector - damping * self.sample.transposed_times(weights)) / shift

        return precondition


def _drawn(kinds: Sequence[int], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows to draw, ascending, and √(rows of the kind / rows drawn of it). All iterations draw the same rows."""
    generator, left = torch.Generator().manual_seed(0), min(number, sum(kinds))
    chosen, scales = [], []
    for done, index in enumerate(sorted(range(len(kinds)), key=lambda index: kinds[index])):
        share = min(kinds[index], max(1, left // (len(kinds) - done)))
        left -= share
        chosen.append(sum(kinds[:index]) + torch.randperm(kinds[index], generator=generator)[:share])
        scales.append(torch.full((share,), (kinds[index] / share) ** 0.5))
    rows, order = torch.cat(chosen).sort()
    return rows, torch.cat(scales)[order]
