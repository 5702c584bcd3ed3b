"""Solves the damped system without P² numbers, by conjugate gradients. Some rows of J make a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .damped_system import DampedSystem, Prior, Rows, norm_of
from .processes import Processes

# Estimated error at which the iteration ends, as a fraction of the step in the norm of the matrix. The predicted gain
# lacks the square of it.
_TOLERANCE = 1e-3
_MOST_PRODUCTS, _LAST = 200, 4


class ConjugateGradients(DampedSystem):
    """δ by products v ↦ JᵀJv, preconditioned with (SᵀS + E)⁻¹ = E⁻¹ − E⁻¹Sᵀ(SE⁻¹Sᵀ + I)⁻¹SE⁻¹, where E = λD + cI.

    S has m rows of J, drawn at random: equally many of each kind, as far as the kind has rows. They are multiplied by
    √(rows of the kind / rows drawn of it). Wherever the iteration ends, its δ is a step downhill.

    Args:
        blocks, residuals, size, prior, further, norm, processes: as for `NormalEquations`.
        product: the function v ↦ JᵀJv, with the rows of this process. shapes: (P,)
        drawn: m.
        kinds: how many rows of J belong to each kind of residuals, in their order.

    Source: Hestenes and Stiefel (1952); Woodbury's formula.
    """

    def __init__(
        self,
        blocks: Iterable[torch.Tensor],
        residuals: torch.Tensor,
        size: int,
        product: Callable[[torch.Tensor], torch.Tensor],
        drawn: int,
        kinds: Sequence[int] = (),
        prior: Prior | None = None,
        further: torch.Tensor | None = None,
        norm: float | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes, self.product = processes or Processes(False), product
        self.tolerance, self.most_products = _TOLERANCE, _MOST_PRODUCTS
        gradient, squares = residuals.new_zeros(size), residuals.new_zeros(size)
        chosen, scales = _drawn(kinds or [len(residuals)], drawn, residuals.device)
        sample, done, filled = torch.empty(0), 0, 0
        for block in blocks:
            if not done:
                sample = block.new_empty(len(chosen), size)
            inside = chosen[filled:][chosen[filled:] < done + len(block)] - done
            sample[filled : filled + len(inside)] = block[inside]
            filled += len(inside)
            for part, right in zip(block.split(256), residuals[done : done + len(block)].split(256), strict=True):
                wide = part.double()
                gradient.addmv_(wide.T, right)
                squares += wide.square_().sum(dim=0) if wide is not part else wide.square().sum(dim=0)
            done += len(block)
        self.sample = Rows(sample.mul_(scales.to(sample).unsqueeze(1)))
        for part in (gradient, squares):
            self.processes.sum(part)
        norm = norm_of(residuals, self.processes) if norm is None else norm
        self._measure(gradient, squares, norm, prior, further)
        # Only the first process computes the preconditioner.
        once = self.processes.is_first and not self.decay and self.scale > 0
        self.gram = self.sample.gram(self.diagonal) if once else None

    def step(self, damping: float) -> torch.Tensor:
        shift = damping * self.diagonal + self.decay
        precondition = self._preconditioner(shift, damping)
        step, rest = torch.zeros_like(self.gradient), -self.gradient
        direction = torch.zeros_like(rest)
        gains: list[float] = []  # by which δᵀAδ grows
        before = 1.0  # the squared preconditioned norm of `rest`, one product ago
        for number in range(self.most_products):
            conditioned = self.processes.of_first(precondition(rest))
            now = (rest @ conditioned).item()
            direction = conditioned + (now / before if number else 0.0) * direction
            image = self.processes.sum(self.product(direction)) + shift * direction
            curvature = (direction @ image).item()
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

    def predicted_gain(self, step: torch.Tensor, damping: float, rate: float = 1.0) -> float:
        """The same for the δ that `step` returned last, whose equation has an error, `missing`, on the right side."""
        return super().predicted_gain(step, damping, rate) + rate**2 * (self.missing @ step).item()

    def _preconditioner(self, shift: torch.Tensor, damping: float) -> Callable[[torch.Tensor], torch.Tensor]:
        if not self.processes.is_first:
            return torch.empty_like
        gram, unit = (self.sample.gram(shift), 1.0) if self.gram is None else (self.gram, damping)
        factor = gram.factor(shift.new_full((gram.size,), unit))
        if factor is None:
            return lambda vector: vector / shift
        scale = 1.0 if self.gram is None else damping

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            weights = factor.solved(self.sample.times(vector / shift))
            return (vector - scale * self.sample.transposed_times(weights)) / shift

        return precondition


def _drawn(kinds: Sequence[int], number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows to draw, ascending, and √(rows of the kind / rows drawn of it). All iterations draw the same rows."""
    generator = torch.Generator().manual_seed(0)
    chosen, scales, left = {}, {}, min(number, sum(kinds))
    for done, index in enumerate(sorted(range(len(kinds)), key=lambda index: kinds[index])):
        share = min(kinds[index], max(1, left // (len(kinds) - done)))
        left -= share
        start = sum(kinds[:index])
        chosen[index] = start + torch.randperm(kinds[index], generator=generator)[:share].sort().values
        scales[index] = torch.full((share,), (kinds[index] / share) ** 0.5)
    order = range(len(kinds))
    return torch.cat([chosen[i] for i in order]).to(device), torch.cat([scales[i] for i in order]).to(device)
