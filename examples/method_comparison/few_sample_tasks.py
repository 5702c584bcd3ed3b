"""Tasks of which a new one has to be learned from a handful of samples, and their splits into seen and unseen ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import fluids_data
import torch
from torch import Tensor

NOISE = 0.003  # of a task's spread, the standard deviation of each output over its points
FOLDS = 5
VALIDATION = 10  # tasks on which settings are chosen; no table has them


@dataclass(frozen=True)
class Domain:
    """Tasks f: inputs → outputs, known at the same points.

    Attributes:
        names: of the tasks.
        x: the points, each input in [−1, 1]. shape: (points, inputs)
        y: shape: (tasks, points, outputs)
        typical: the name of the task for a base that is fitted to one task.
        known: what is known of each task without samples, scaled to [−1, 1]. shape: (tasks, numbers)
        count: how many tasks are seen; None for all that can be.
        rates: of Adam, by what is learned: the best of a ladder on the tasks of validation (the search is in commit
            88cd90b).
    """

    names: tuple[str, ...]
    x: Tensor
    y: Tensor
    typical: str
    known: Tensor | None = None
    count: int | None = None
    rates: dict[str, float] = field(default_factory=dict)


class Samples(NamedTuple):
    """n samples of each of B tasks."""

    tasks: Tensor  # shape: (B,)
    rows: Tensor  # which of the points, shape: (B, n)
    x: Tensor  # shape: (B, n, inputs)
    y: Tensor  # shape: (B, n, outputs)


class Split:
    """A domain with its tasks in three parts, outputs scaled by those seen.

    The part of validation is the same in each split. Each of the others is unseen in one of five splits.

    Args:
        number: from 1 to 5.
    """

    def __init__(self, domain: Domain, number: int) -> None:
        self.domain, self.number, self.typical = domain, number, domain.names.index(domain.typical)
        drawn = torch.randperm(len(domain.names), generator=torch.Generator().manual_seed(0)).tolist()
        drawn.remove(self.typical)
        self.validation, rest = drawn[:VALIDATION], drawn[VALIDATION:]
        self.unseen = rest[number - 1 :: FOLDS]
        self.seen = [self.typical, *(task for task in rest if task not in self.unseen)][: domain.count]
        of_seen = domain.y[self.seen]
        self.x, self.y = domain.x, (domain.y - of_seen.mean((0, 1))) / of_seen.std((0, 1))
        self.spread = self.y.std(1)  # shape: (tasks, outputs)

    def samples(self, tasks: list[int], n: int, repeats: int) -> Samples:
        """The first n noisy samples, in an order that is drawn for each task and repeat."""
        points, noise = [], []
        for task in tasks:
            for repeat in range(repeats):
                source = torch.Generator().manual_seed(1000 * task + repeat)
                points.append(torch.randperm(len(self.x), generator=source)[:n])
                noise.append(torch.randn(len(self.x), self.y.shape[-1], generator=source, dtype=torch.float64)[:n])
        of = torch.tensor(tasks).repeat_interleave(repeats)
        rows = torch.stack(points)
        exact = self.y[of[:, None], rows].double()
        return Samples(of, rows, self.x[rows].double(), exact + NOISE * self.spread[of][:, None] * torch.stack(noise))

    def errors(self, tasks: Tensor, predicted: Tensor) -> Tensor:
        """sqrt(mean(((ŷ − y) / spread)²)) over points and outputs. shapes: (B,), (B, points, outputs) → (B,)"""
        away = (predicted - self.y[tasks]) / self.spread[tasks][:, None]
        return away.square().mean((1, 2)).sqrt().nan_to_num(math.inf)


def fluids() -> Domain:
    """61 fluids: compressibility factor, residual enthalpy and heat capacity over reduced temperature and pressure."""
    table = fluids_data.load()
    acentric = torch.tensor([[table.constants[name].acentric_factor] for name in table.names])
    return Domain(
        table.names,
        table.x[table.names[0]],
        torch.stack([table.y[name] for name in table.names]),
        "Nitrogen",
        scaled(acentric),
        rates={"family": 0.01, "GEPS": 0.01, "inputs": 0.01, "basis": 0.01, "base": 0.03, "known": 0.03},
    )


def scaled(columns: Tensor) -> Tensor:
    low, high = columns.amin(0), columns.amax(0)
    return 2 * (columns - low) / (high - low) - 1


def oscillators() -> Domain:
    """u'' + 2 δ u' + u = a cos ω t: u(t) over t ∈ [0, 8], u(0) and u'(0) ∈ [−1, 1], of unknown (δ, ω, a).

    δ ∈ [0.02, 0.6], ω ∈ [0.4, 1.6], a ∈ [0, 1], drawn evenly. The first task is the middle of these ranges.
    """
    draws = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(60).double()
    draws = torch.cat([torch.full((1, 3), 0.5, dtype=torch.float64), draws])
    damping, frequency, drive = (0.02 + 0.58 * draws[:, :1], 0.4 + 1.2 * draws[:, 1:2], draws[:, 2:])
    x = torch.quasirandom.SobolEngine(3, scramble=True, seed=1).draw(400).double() * 2 - 1
    t, position, speed = 4 * (x[:, 0] + 1), x[:, 1], x[:, 2]
    y = oscillation(damping, frequency, drive, t, position, speed)
    names = tuple(f"δ = {a:.2f}, ω = {b:.2f}, a = {c:.2f}" for (a, b, c) in torch.cat([damping, frequency, drive], 1))
    rates = {"family": 0.03, "GEPS": 0.01, "inputs": 0.01, "basis": 0.03, "base": 0.01}
    return Domain(names, x.float(), y.float()[..., None], names[0], rates=rates)


def oscillation(
    damping: Tensor, frequency: Tensor, drive: Tensor, t: Tensor, position: Tensor, speed: Tensor
) -> Tensor:
    """u(t) of u'' + 2 δ u' + u = a cos ω t, δ < 1, from u(0) and u'(0)."""
    stiffness, friction = 1 - frequency**2, 2 * damping * frequency
    size = drive / (stiffness**2 + friction**2)
    in_phase, behind = size * stiffness, size * friction
    own = (1 - damping**2).sqrt()
    cosine = position - in_phase
    sine = (speed - behind * frequency + damping * cosine) / own
    free = (-damping * t).exp() * (cosine * (own * t).cos() + sine * (own * t).sin())
    return free + in_phase * (frequency * t).cos() + behind * (frequency * t).sin()


DOMAINS: dict[str, Callable[[], Domain]] = {
    "fluids": fluids,
    "fluids_5": lambda: replace(fluids(), count=5),
    "fluids_20": lambda: replace(fluids(), count=20),
    "oscillators": oscillators,
}
