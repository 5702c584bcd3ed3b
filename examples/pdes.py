"""Families of PDEs with known solutions and one parameter each, on which a physics-informed KAN is trained.

A family has its residual (by autograd), its boundary and initial conditions and its exact solution for every value of
its parameter. A model is trained at one value and adapted to another. It is any ``nn.Module`` from (N, 2) to (N, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import ClassVar, NamedTuple

import torch
from numpy.polynomial.hermite import hermgauss
from torch import Tensor, nn


class Points(NamedTuple):
    """The points at which the equation and the conditions are imposed. shapes: (N, 2) and (M, 2)"""

    interior: Tensor
    boundary: Tensor


def partial_derivatives(u: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """(∂u/∂p₀, ∂u/∂p₁) at every point. They can be differentiated again.

    One gradient of Σ u serves all points, because u at a point depends on that point alone.

    Args:
        u: shape: (N, 1)
        points: the leaf from which u was computed. shape: (N, 2)

    Returns:
        Two tensors. shape: (N, 1)
    """
    (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    return gradient[:, :1], gradient[:, 1:]


@dataclass(frozen=True)
class PDE:
    """A boundary value problem on a rectangle. A subclass is a family, and ``parameter`` selects a member.

    The loss is mean(residual²) + condition_weight · mean(condition²). The residual contains second derivatives, of
    size 10 to 100 here. The conditions contain the solution, of size 1, and would hardly count without the weight.
    """

    parameter: float

    title: ClassVar[str]
    symbol: ClassVar[str]  # of the parameter, for captions
    axes: ClassVar[tuple[str, str]]
    lower: ClassVar[tuple[float, float]]
    upper: ClassVar[tuple[float, float]]
    sides: ClassVar[tuple[tuple[int, float], ...]]  # (axis, value) of each side that carries a condition
    base_parameter: ClassVar[float]
    target_parameter: ClassVar[float]
    condition_weight: ClassVar[float]
    lm_points: ClassVar[int] = 1000  # inside, for an iteration of Levenberg–Marquardt

    def exact(self, points: Tensor) -> Tensor:
        """The solution. shape: (N, 2) → (N, 1)"""
        raise NotImplementedError

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        """Left side minus right side of the equation. shape: (N, 2) → (N, 1)"""
        raise NotImplementedError

    def conditions(self, model: nn.Module, points: Tensor) -> Tensor:
        """The differences between the model and the prescribed values on the boundary. shape: (M, 2) → (≥ M, 1)"""
        return model(points) - self.exact(points)

    def loss(self, model: nn.Module, points: Points, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """The loss; `weights` are factors of its two terms, for points that are a part of a larger batch."""
        residual = self.residual(model, points.interior.detach().requires_grad_()).square().mean()
        conditions = self.conditions(model, points.boundary).square().mean()
        return weights[0] * residual + weights[1] * self.condition_weight * conditions

    def sample(
        self,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        interior: int = 256,
        per_side: int = 20,
    ) -> Points:
        """Uniform random points. They are drawn on the CPU, so a seed gives the same points on every device.

        Call this at every step. If points are drawn once, the loss falls all the same, but the error stays ten times
        higher (elliptic, 1,000 Adam steps: 1.6e-2 fixed, 1.8e-3 fresh), because 336 points can be fitted by heart.
        Compared with the derivatives, drawing points costs almost nothing.

        Returns:
            shapes: (interior, 2) and (number of sides · per_side, 2)
        """
        low, high = torch.tensor(self.lower), torch.tensor(self.upper)
        boundary = low + (high - low) * torch.rand(len(self.sides) * per_side, 2, generator=generator)
        for rows, (axis, value) in zip(boundary.split(per_side), self.sides, strict=True):
            rows[:, axis] = value
        inside = low + (high - low) * torch.rand(interior, 2, generator=generator)
        return Points(inside.to(device), boundary.to(device))

    def grid(self, size: int = 65) -> Tensor:
        """A regular grid that includes the boundary. The first axis varies slowest. shape: (size², 2)"""
        axes = [torch.linspace(low, high, size) for low, high in zip(self.lower, self.upper, strict=True)]
        return torch.cartesian_prod(*axes)


class Elliptic(PDE):
    """−(u_xx + u_yy) = (λ² + 1) π² sin(λπx) sin(πy) on [−1, 1]², u given on the boundary; u = sin(λπx) sin(πy)."""

    title, symbol, axes = "Poisson equation", "λ", ("x", "y")
    lower, upper = (-1.0, -1.0), (1.0, 1.0)
    sides = ((0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0))
    base_parameter, target_parameter, condition_weight = 1.0, 1.3, 1000.0

    def exact(self, points: Tensor) -> Tensor:
        x, y = points.split(1, dim=1)
        return torch.sin(self.parameter * pi * x) * torch.sin(pi * y)

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        u_x, u_y = partial_derivatives(model(points), points)
        u_xx, u_yy = partial_derivatives(u_x, points)[0], partial_derivatives(u_y, points)[1]
        return u_xx + u_yy + (self.parameter**2 + 1) * pi**2 * self.exact(points)


class Parabolic(PDE):
    """u_t = (κ/π²) u_xx for x in [0, 1], t in [0, 1], u = 0 at both ends, u = sin(πx) at t = 0; u = e^(−κt) sin(πx).

    The diffusivity is κ/π², so that κ is the rate at which this mode decays.
    """

    title, symbol, axes = "Heat equation", "κ", ("x", "t")
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    sides = ((1, 0.0), (0, 0.0), (0, 1.0))
    base_parameter, target_parameter, condition_weight = 1.0, 1.3, 10.0

    def exact(self, points: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        return torch.exp(-self.parameter * t) * torch.sin(pi * x)

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        u_x, u_t = partial_derivatives(model(points), points)
        return u_t - self.parameter / pi**2 * partial_derivatives(u_x, points)[0]


class Hyperbolic(PDE):
    """u_tt = c² u_xx for x in [0, 1], t in [0, 1], u = 0 at both ends, u = sin(πx) and u_t = 0 at t = 0;
    u = cos(cπt) sin(πx)."""

    title, symbol, axes = "Wave equation", "c", ("x", "t")
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    sides = ((1, 0.0), (0, 0.0), (0, 1.0))
    base_parameter, target_parameter, condition_weight = 2.0, 2.5, 3000.0

    def exact(self, points: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        return torch.cos(self.parameter * pi * t) * torch.sin(pi * x)

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        u_x, u_t = partial_derivatives(model(points), points)
        u_xx, u_tt = partial_derivatives(u_x, points)[0], partial_derivatives(u_t, points)[1]
        return u_tt - self.parameter**2 * u_xx

    def conditions(self, model: nn.Module, points: Tensor) -> Tensor:
        at_rest = points[points[:, 1] == 0].detach().requires_grad_()
        u_t = partial_derivatives(model(at_rest), at_rest)[1]
        # cπ is the size of u_t elsewhere. Divided by it, the velocity has the same weight as the displacement.
        return torch.cat([super().conditions(model, points), u_t / (self.parameter * pi)])


class Burgers(PDE):
    """u_t + u u_x = ν u_xx for x in [0, 1], t in [0, 1], u given at t = 0 and u = 0 at both ends;
    u = 2πν s(t) sin(πx) / (1.5 + s(t) cos(πx)), s(t) = e^(−νπ²t), by the Cole–Hopf transformation. Not linear."""

    title, symbol, axes = "Burgers' equation", "ν", ("x", "t")
    lower, upper = (0.0, 0.0), (1.0, 1.0)
    sides = ((1, 0.0), (0, 0.0), (0, 1.0))
    base_parameter, target_parameter, condition_weight = 0.1, 0.2, 10.0

    @property
    def viscosity(self) -> float:
        return self.parameter

    def exact(self, points: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        decay = torch.exp(-self.parameter * pi**2 * t)
        return 2 * pi * self.parameter * decay * torch.sin(pi * x) / (1.5 + decay * torch.cos(pi * x))

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        u = model(points)
        u_x, u_t = partial_derivatives(u, points)
        return u_t + u * u_x - self.viscosity * partial_derivatives(u_x, points)[0]


class Shock(Burgers):
    """u_t + u u_x = ν u_xx for x in [−1, 1], t in [0, 1], u = −sin(πx) at t = 0, u = 0 at both ends, ν = parameter/π:
    at 0.01 the equation Burgers-1d of PINNacle. u = −∫ sin(πy) w dy / ∫ w dy by 100 nodes of Gauss–Hermite, where
    w = exp(−cos(πy) / (2πν) − (x − y)² / (4νt)) (Cole–Hopf). It steepens to a front at x = 0."""

    title, symbol = "Burgers' equation with a shock", "πν"
    lower = (-1.0, 0.0)
    sides = ((1, 0.0), (0, -1.0), (0, 1.0))
    base_parameter, target_parameter = 0.02, 0.01
    lm_points = 4000

    @property
    def viscosity(self) -> float:
        return self.parameter / pi

    def exact(self, points: Tensor) -> Tensor:
        nodes, weights = map(torch.from_numpy, hermgauss(100))
        x, t = points.double().split(1, dim=1)
        y = x - 2 * (self.viscosity * t).sqrt() * nodes.to(points.device)
        w = weights.to(points.device) * torch.exp((-1 - torch.cos(pi * y)) / (2 * pi * self.viscosity))
        return (-(torch.sin(pi * y) * w).sum(1, True) / w.sum(1, True)).to(points.dtype)


PDES: dict[str, type[PDE]] = {
    "elliptic": Elliptic,
    "parabolic": Parabolic,
    "hyperbolic": Hyperbolic,
    "burgers": Burgers,
    "shock": Shock,
}
LINEAR = ("elliptic", "parabolic", "hyperbolic")  # the source's families, which the longer examples try


@torch.no_grad()
def relative_l2_error(model: nn.Module, pde: PDE, points: Tensor) -> float:
    """‖model − exact‖₂ / ‖exact‖₂ over the points. shape: (N, 2)"""
    exact = pde.exact(points)
    return (torch.linalg.vector_norm(model(points) - exact) / torch.linalg.vector_norm(exact)).item()
