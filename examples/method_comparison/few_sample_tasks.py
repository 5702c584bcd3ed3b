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


def digits() -> Domain:
    """±1 for 400 images of scikit-learn's digits, 4 × 4 pixels: whether they show one of a group of digits.

    60 of the groups of three to five digits, and {0, 1, 2, 3, 4} as the typical one.
    """
    from itertools import combinations

    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images[:400]).unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).flatten(1)
    groups = [group for size in (3, 4, 5) for group in combinations(range(10), size)]
    drawn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    typical = (0, 1, 2, 3, 4)
    chosen = [typical, *[groups[k] for k in drawn if groups[k] != typical][:60]]
    labels = torch.as_tensor(data.target[:400])
    y = torch.stack([torch.isin(labels, torch.tensor(group)) for group in chosen]).float() * 2 - 1
    names = tuple("".join(map(str, group)) for group in chosen)
    rates = {"family": 0.001, "GEPS": 0.003, "inputs": 0.001, "basis": 0.01, "base": 0.01}
    return Domain(names, (images / 8 - 1).float(), y[..., None], names[0], rates=rates)


def liquids() -> Domain:
    """Saturated liquids, six measured properties over T / T_c ∈ [0.55, 0.9], by the equations of the VDI Heat Atlas.

    ln(p / p_c), ρ / ρ_c, surface tension, ln of viscosity and of thermal conductivity, enthalpy of evaporation over
    R T_c: of 120 substances that are liquid in this range and have all six. Known are ln of molar mass, T_c and p_c.

    Raises:
        ImportError: without the package chemicals.
    """
    import numpy as np
    from chemicals import interface, phase_change, thermal_conductivity, vapor_pressure, viscosity, volume
    from chemicals.dippr import EQ106, EQ116
    from chemicals.vapor_pressure import Wagner

    tables = (
        vapor_pressure.Psat_data_VDI_PPDS_3,
        volume.rho_data_VDI_PPDS_2,
        interface.sigma_data_VDI_PPDS_11,
        viscosity.mu_data_VDI_PPDS_7,
        thermal_conductivity.k_data_VDI_PPDS_9,
        phase_change.phase_change_data_VDI_PPDS_4,
    )
    reduced = np.linspace(0.55, 0.9, 71)
    names, values, known = [], [], []
    for key in sorted(set.intersection(*(set(table.index) for table in tables))):
        p, rho, sigma, mu, k, H = (table.loc[key] for table in tables)
        T = reduced * p.Tc
        letters = [row[list("ABCDE")].astype(float).tolist() for row in (sigma, mu, k, H)]
        (A, B, C, D, E), (a, b, c, d, e) = letters[1], letters[3]
        warm, tau = (C - T) / (T - D), 1 - reduced
        conductivity = np.polynomial.polynomial.polyval(T, letters[2])
        if (
            p.Tm > T[0] or min(T) <= D + 5 or max(T) >= C or min(conductivity) <= 0
        ):  # outside of where the equations hold
            continue
        columns = [
            [math.log(Wagner(t, p.Tc, p.Pc, p.A, p.B, p.C, p.D) / p.Pc) for t in T],
            [EQ116(t, p.Tc, rho.rhoc, rho.A, rho.B, rho.C, rho.D) / rho.rhoc for t in T],
            [EQ106(t, sigma.Tc, *letters[0]) for t in T],
            np.log(E) + A * np.cbrt(warm) + B * np.cbrt(warm) * warm,
            np.log(conductivity),
            a * np.cbrt(tau) + b * np.cbrt(tau) ** 2 + c * tau + d * tau**2 + e * tau**6,
        ]
        y = np.stack(columns, 1)
        if np.isfinite(y).all():
            names.append(p.Chemical)
            values.append(torch.tensor(y))
            known.append(torch.tensor([rho.MW, p.Tc, p.Pc]).log())
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:120].sort().values
    return Domain(
        tuple(names[k] for k in chosen),
        torch.linspace(-1, 1, len(reduced))[:, None],
        torch.stack(values)[chosen].float(),
        names[chosen[0]],
        scaled(torch.stack(known)[chosen].float()),
        rates={"family": 0.03, "GEPS": 0.01, "inputs": 0.01, "basis": 0.01, "base": 0.03, "known": 0.003},
    )


DOMAINS: dict[str, Callable[[], Domain]] = {
    "fluids": fluids,
    "fluids_5": lambda: replace(fluids(), count=5),
    "fluids_10": lambda: replace(fluids(), count=10),
    "fluids_20": lambda: replace(fluids(), count=20),
    "oscillators": oscillators,
    "digits": digits,
    "liquids": liquids,
}
