"""The families of tasks of `families.py`: equations, exact solutions, ranges, and where errors are measured.

Beside the PDEs of `pdes.py`, with what they have in common: fronts that move with the parameter, given as data or by
an equation, a Poisson equation with two parameters, and a reaction–diffusion equation, which is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import cos, pi, sqrt
from typing import Any

import torch
from pde_least_squares import EQUATIONS, Net, batch, burgers, derivatives, residual_functions
from pdes import PDE, Burgers, Elliptic, Hyperbolic, Parabolic
from torch import Tensor, nn

Parameters = tuple[float, ...]


class LeastSquaresPDE(PDE):
    """A PDE whose residual is that of its least squares, for Adam too."""

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        return EQUATIONS[type(self)](self, model, points)


class Front(LeastSquaresPDE):
    """u = tanh((x − βt − 0.2) / w) on [0, 1]², w = 0.05, given by its values, inside and at the ends x = 0 and x = 1:
    a front that begins at x = 0.2 and moves with the speed β."""

    title, symbol, axes, thickness = "Front, from data", "β", ("x", "t"), 0.05
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    sides = ((0, 0.0), (0, 1.0))
    base_parameter, target_parameter, condition_weight = 0.45, 0.65, 1.0

    def exact(self, points: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        return torch.tanh((x - self.parameter * t - 0.2) / self.thickness)


class SharpFront(Front):
    """As `Front`, w = 0.02."""

    title, thickness = "Sharper front, from data", 0.02


class Advection(Front):
    """u_t + β u_x = 0, u given at t = 0 and at x = 0, where it flows in; the solution is that of `Front`."""

    title = "Advection equation"
    sides = ((1, 0.0), (0, 0.0))
    condition_weight = 100.0  # u_t is of size 10 in the front


class FisherKPP(LeastSquaresPDE):
    """u_t = D u_xx + ρ u (1 − u), D = 0.005, u given at t = 0, x = 0 and x = 1;
    u = (1 + exp(√(ρ / 6D) (x − 0.2) − 5ρt/6))⁻², a wave of the speed 5 √(ρD/6)."""

    title, symbol, axes, diffusion = "Fisher–KPP equation", "ρ", ("x", "t"), 0.005
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    sides = ((1, 0.0), (0, 0.0), (0, 1.0))
    base_parameter, target_parameter, condition_weight = 6.4, 8.0, 100.0

    def exact(self, points: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        steepness = (self.parameter / (6 * self.diffusion)) ** 0.5
        return torch.sigmoid(5 * self.parameter * t / 6 - steepness * (x - 0.2)).square()


class EllipticPair(LeastSquaresPDE):
    """−(u_xx + u_yy) = (λ² + μ²) π² u on [−1, 1]², u given on the boundary; u = sin(λπx) sin(μπy)."""

    title, symbol, axes = "Poisson equation, two parameters", "λ, μ", ("x", "y")
    lower, upper, sides = Elliptic.lower, Elliptic.upper, Elliptic.sides
    condition_weight = Elliptic.condition_weight

    def exact(self, points: Tensor) -> Tensor:
        (x, y), (lam, mu) = points.split(1, dim=1), self.parameter
        return torch.sin(lam * pi * x) * torch.sin(mu * pi * y)


class Helmholtz(LeastSquaresPDE):
    """u_xx + u_yy + k² u = −k² sin(kx) sin(ky) on [−1, 1]², u given on the boundary; u = sin(kx) sin(ky)."""

    title, symbol, axes = "Helmholtz equation", "k", ("x", "y")
    lower, upper, sides = Elliptic.lower, Elliptic.upper, Elliptic.sides
    condition_weight = Elliptic.condition_weight

    def exact(self, points: Tensor) -> Tensor:
        x, y = points.split(1, dim=1)
        return torch.sin(self.parameter * x) * torch.sin(self.parameter * y)


class BurgersWave(Burgers):
    """u_t + u u_x = ν u_xx, ν = 0.02, on [0, 1]², u given at t = 0, x = 0 and x = 1;
    u = c (1 − tanh(c (x − ct − 0.2) / 2ν)), a wave of the speed c that is the steeper the faster it is."""

    title, symbol, viscosity = "Burgers' equation, travelling waves", "c", 0.02

    def exact(self, points: Tensor) -> Tensor:
        (x, t), c = points.split(1, dim=1), self.parameter
        return c * (1 - torch.tanh(c * (x - c * t - 0.2) / (2 * self.viscosity)))


def data(pde: PDE, net: Net, points: Tensor) -> Tensor:
    return net(points) - pde.exact(points)


def advection(pde: PDE, net: Net, points: Tensor) -> Tensor:
    first, _ = derivatives(net, points)
    return first[:, 1:] + pde.parameter * first[:, :1]


def fisher_kpp(pde: FisherKPP, net: Net, points: Tensor) -> Tensor:
    (first, second), u = derivatives(net, points), net(points)
    return first[:, 1:] - pde.diffusion * second(0) - pde.parameter * u * (1 - u)


def elliptic_pair(pde: PDE, net: Net, points: Tensor) -> Tensor:
    _, second = derivatives(net, points)
    lam, mu = pde.parameter
    return second(0) + second(1) + (lam**2 + mu**2) * pi**2 * pde.exact(points)


def helmholtz(pde: PDE, net: Net, points: Tensor) -> Tensor:
    _, second = derivatives(net, points)
    return second(0) + second(1) + pde.parameter**2 * (net(points) + pde.exact(points))


EQUATIONS |= {
    Helmholtz: helmholtz, BurgersWave: burgers, Front: data, SharpFront: data, Advection: advection,
    FisherKPP: fisher_kpp, EllipticPair: elliptic_pair,
}  # fmt: skip

# Where errors are measured, as parts of the ranges: the middles of fifths, in two dimensions in each row and column.
HELD_OUT = {
    1: ((0.1,), (0.3,), (0.5,), (0.7,), (0.9,)),
    2: ((0.5, 0.5), (0.1, 0.7), (0.3, 0.1), (0.7, 0.9), (0.9, 0.3)),
}


@dataclass(frozen=True)
class Case:
    """A family of tasks, and how the methods that need settings for it are set.

    Attributes:
        ranges: of the parameters, by name.
        base: the parameters of the base.
        base_by: "adam" or "lm", how the base is trained.
        dtype: of Levenberg–Marquardt. Adam runs in float32.
    """

    title: str
    pde_class: type[PDE]
    ranges: Mapping[str, tuple[float, float]]
    base: Parameters
    ranks: tuple[int, int, int] = (6, 6, 6)
    degree: int = 4
    kan: str = "chebyshev"
    width: int = 32
    base_by: str = "adam"
    dtype: torch.dtype = torch.float32

    def pde(self, parameters: Sequence[Any]) -> PDE:
        """The task at these parameters: numbers, or tensors with a value for each point, shape (N, 1)."""
        return self.pde_class(parameters[0] if len(parameters) == 1 else tuple(parameters))

    def parameters(self, parts: Sequence[float]) -> Parameters:
        return tuple(
            round(low + part * (high - low), 4) for part, (low, high) in zip(parts, self.ranges.values(), strict=True)
        )

    def held_out(self) -> list[Parameters]:
        return [self.parameters(parts) for parts in HELD_OUT[len(self.ranges)]]

    def nodes(self, count: int) -> list[Parameters]:
        """Chebyshev points of the range, with its ends. For one parameter."""
        return [self.parameters(((1 - cos(pi * k / (count - 1))) / 2,)) for k in range(count)]

    def residuals(self, at: Callable[[Any, tuple[Tensor, ...]], tuple[Net, AbstractContextManager]]) -> dict[str, Any]:
        """As `residual_functions`, of batches (points, parameters) with the parameters of every point, shape (N, k).

        Args:
            at: gives, for a net and parameters, the function of points alone, and a context that it is called in.
        """

        def of_kind(name: str) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
            def residual(net: Any, part: tuple[Tensor, Tensor]) -> Tensor:
                points, parameters = part[0], part[1].split(1, dim=1)
                of_points, context = at(net, parameters)
                with context:
                    return residual_functions(self.pde(parameters))[name](of_points, points)

            return residual

        return {name: of_kind(name) for name in residual_functions(self.pde(self.base))}

    def points(
        self,
        seed: int,
        interior: int = 1000,
        per_side: int = 80,
        dtype: torch.dtype = torch.float32,
        times: Callable[[int], int] = lambda iteration: 1,
    ) -> Callable[[int], dict[str, Any]]:
        """Fresh points of each kind of residual, with parameters drawn beside them.

        Args:
            times: as many points in this iteration.
        """
        low, high = (torch.tensor(ends) for ends in zip(*self.ranges.values(), strict=True))

        def fresh(iteration: int) -> dict[str, tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * iteration)
            pde, more = self.pde(self.base), times(iteration)
            parts = batch(pde, pde.sample(generator, "cpu", more * interior, more * per_side))

            def drawn(count: int) -> Tensor:
                return low + (high - low) * torch.rand(count, len(low), generator=generator)

            return {name: (part.to(dtype), drawn(len(part)).to(dtype)) for name, part in parts.items()}

        return fresh


def scaled(parameters: Sequence[Tensor], ranges: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Each from its range to [−1, 1]."""
    return [2 * (p - low) / (high - low) - 1 for p, (low, high) in zip(parameters, ranges, strict=True)]


class OfParameters(nn.Module):
    """A KAN with the parameters as further inputs, scaled to [−1, 1]. (N, 2) and (N, 1) for each → (N, 1)"""

    def __init__(self, kan: nn.Module, ranges: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.kan, self.ranges = kan, tuple(ranges)

    def forward(self, points: Tensor, *parameters: Tensor) -> Tensor:
        return self.kan(torch.cat([points, *scaled(parameters, self.ranges)], dim=1))

    @staticmethod
    def at(net: Any, parameters: tuple[Tensor, ...]) -> tuple[Net, AbstractContextManager]:
        """For `Case.residuals`."""
        return lambda points: net(points, *parameters), nullcontext()


class AtParameters(nn.Module):
    """An `OfParameters` at given numbers. (N, 2) → (N, 1)"""

    def __init__(self, model: OfParameters, parameters: Parameters) -> None:
        super().__init__()
        self.model, self.parameters_of_task = model, parameters

    def forward(self, points: Tensor) -> Tensor:
        return self.model(points, *(points.new_full((len(points), 1), value) for value in self.parameters_of_task))


class DiagonalsOfParameters(nn.Module):
    """x ← tanh(L_k diag(s_k) R_k x + b_k), k = 1, …, K, between two linear layers, with s made of the parameters.

    Args:
        ranges: of the parameters, which are scaled to [−1, 1].

    Shapes: points (N, 2) and parameters (N, 1) each → (N, 1); s (N, K, rank).
    """

    def __init__(
        self, ranges: Sequence[tuple[float, float]], width: int = 50, rank: int = 20, depth: int = 3, inputs: int = 2
    ) -> None:
        super().__init__()
        self.ranges, self.shape = tuple(ranges), (depth, rank)
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, 1)
        self.left = nn.Parameter(torch.randn(depth, rank, width) * rank**-0.5)
        self.right = nn.Parameter(torch.randn(depth, width, rank) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(depth, width))
        self.maker = nn.Sequential(nn.Linear(len(ranges), 32), nn.Tanh(), nn.Linear(32, depth * rank))
        nn.init.ones_(self.maker[-1].bias)

    def diagonals(self, *parameters: Tensor) -> Tensor:
        return self.maker(torch.cat(scaled(parameters, self.ranges), dim=1)).unflatten(1, self.shape)

    def with_diagonals(self, points: Tensor, diagonals: Tensor) -> Tensor:
        x = torch.tanh(self.first(points))
        for k in range(len(self.bias)):
            x = torch.tanh((x @ self.right[k] * diagonals[:, k]) @ self.left[k] + self.bias[k])
        return self.last(x)

    def forward(self, points: Tensor, *parameters: Tensor) -> Tensor:
        return self.with_diagonals(points, self.diagonals(*parameters))


class DiagonalsAtParameters(nn.Module):
    """A `DiagonalsOfParameters` at given numbers, of which the diagonals and the outer layers are trainable."""

    def __init__(self, model: DiagonalsOfParameters, parameters: Parameters) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        model.first.requires_grad_(True)
        model.last.requires_grad_(True)
        with torch.no_grad():
            made = model.diagonals(*(model.bias.new_full((1, 1), value) for value in parameters))
        self.own = nn.Parameter(made)

    def forward(self, points: Tensor) -> Tensor:
        return self.model.with_diagonals(points, self.own)


class Combination(nn.Module):
    """Σ_k c_k u_k of given networks; shape (N, 2) → (N, 1)"""

    def __init__(self, networks: Sequence[nn.Module], weights: Tensor) -> None:
        super().__init__()
        self.networks, self.weights = nn.ModuleList(networks), weights

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat([network(points) for network in self.networks], dim=1) @ self.weights[:, None]


def residual_vector(pde: PDE, net: Net, parts: Mapping[str, Tensor]) -> Tensor:
    """r with ‖r‖² the loss, as in `fit_gauss_newton`."""
    functions = residual_functions(pde)
    return torch.cat([functions[name](net, part).flatten() / sqrt(len(part)) for name, part in parts.items()])


def solve_combination(pde: PDE, networks: Sequence[nn.Module], parts: Mapping[str, Tensor]) -> Combination:
    """The combination with the least residual, of an equation that is linear in u: r(Σ c_k u_k) = r(0) + Σ c_k A_k."""
    with torch.no_grad():
        nothing = residual_vector(pde, lambda points: 0 * points[:, :1], parts)
        columns = [residual_vector(pde, network, parts) - nothing for network in networks]
        weights = torch.linalg.lstsq(torch.stack(columns, dim=1), -nothing[:, None], driver="gelsd").solution[:, 0]
    return Combination(networks, weights)


LAM = {"lam": (1.0, 1.6)}
PAIR = {"lam": (1.0, 1.5), "mu": (1.0, 1.5)}
BETA = {"beta": (0.2, 0.8)}
# Where a front is far, the values of a fitted network differ from ±1 by rounding errors of float32 alone.
OF_FRONTS = {"ranges": BETA, "base": (0.45,), "base_by": "lm", "dtype": torch.float64}

# In the order of their importance, in which they are run.
CASES = {
    "elliptic": Case("Poisson, λ", Elliptic, LAM, (1.0,)),
    "front": Case("front, from data, β", Front, **OF_FRONTS),
    "two parameters": Case("Poisson, λ and μ", EllipticPair, PAIR, (1.0, 1.0), degree=2),
    "advection": Case("advection of a front, β", Advection, **OF_FRONTS),
    "reaction": Case("Fisher–KPP, ρ", FisherKPP, {"rho": (4.0, 10.0)}, (6.4,), dtype=torch.float64),
    "hyperbolic": Case("wave, c", Hyperbolic, {"c": (2.0, 3.0)}, (2.0,)),
    "sharp front": Case("sharper front, from data, β", SharpFront, **OF_FRONTS),
    "parabolic": Case("heat, κ", Parabolic, {"kappa": (1.0, 2.0)}, (1.0,)),
    "fastkan": Case("Poisson, FastKAN", Elliptic, LAM, (1.0,), kan="fastkan"),
    "helmholtz": Case("Helmholtz, k", Helmholtz, {"k": (2.0, 5.0)}, (3.2,)),
    "burgers": Case(
        "Burgers' travelling waves, c", BurgersWave, {"c": (0.3, 0.8)}, (0.5,), base_by="lm", dtype=torch.float64
    ),
}
WIDER = {
    f"{name}, width {width}": replace(CASES[name], title=f"{CASES[name].title}, width {width}", width=width)
    for width, names in {
        64: ("elliptic", "front", "hyperbolic", "two parameters", "advection", "reaction", "parabolic"),
        128: ("elliptic",),
    }.items()
    for name in names
}
ALL_CASES = CASES | WIDER
