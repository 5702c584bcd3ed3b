"""The PDEs as least squares, for `peft_lotra.fit_gauss_newton`: residuals at points, differentiated by torch.func.

`pdes.py` differentiates by torch.autograd, which is enough for the gradient of a loss. A Jacobian has a gradient for
every sample, and torch.func takes the gradients of a whole batch at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from math import pi, sqrt
from typing import NamedTuple

import torch
from pdes import PDE, Burgers, Elliptic, Hyperbolic, Parabolic, Points, Shock, relative_l2_error
from torch import Tensor, nn
from torch.func import grad, vjp

from peft_lotra import fit_gauss_newton

Net = Callable[[Tensor], Tensor]

# The factor by which a fit increases its points. Each iteration fits a few points by heart, which is cheap and good
# enough at first. More points average this out.
GROWTH = 4


class Mark(NamedTuple):
    """The error after a step, with the seconds until then by the wall clock and of CPU time."""

    step: int
    seconds: float
    cpu_seconds: float
    error: float


def derivatives(net: Net, points: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
    """(∂u/∂p₀, ∂u/∂p₁) at every point, shape (N, 2), and axis ↦ ∂²u/∂p_axis², shape (N, 1).

    As in `pdes.py`, one gradient of Σ u serves all points.
    """
    first, pull_back = vjp(grad(lambda points: net(points).sum()), points)

    def second(axis: int) -> Tensor:
        direction = torch.zeros_like(points)
        direction[:, axis] = 1
        return pull_back(direction)[0][:, axis : axis + 1]

    return first, second


def elliptic(pde: PDE, net: Net, points: Tensor) -> Tensor:
    _, second = derivatives(net, points)
    return second(0) + second(1) + (pde.parameter**2 + 1) * pi**2 * pde.exact(points)


def parabolic(pde: PDE, net: Net, points: Tensor) -> Tensor:
    first, second = derivatives(net, points)
    return first[:, 1:] - pde.parameter / pi**2 * second(0)


def hyperbolic(pde: PDE, net: Net, points: Tensor) -> Tensor:
    _, second = derivatives(net, points)
    return second(1) - pde.parameter**2 * second(0)


def burgers(pde: Burgers, net: Net, points: Tensor) -> Tensor:
    first, second = derivatives(net, points)
    return first[:, 1:] + net(points) * first[:, :1] - pde.viscosity * second(0)


EQUATIONS = {Elliptic: elliptic, Parabolic: parabolic, Hyperbolic: hyperbolic, Burgers: burgers, Shock: burgers}


def residual_functions(pde: PDE) -> dict[str, Callable[[Net, Tensor], Tensor]]:
    """The residual functions by kind. Their mean squares over the points of `batch` sum to ``pde.loss``."""
    # The velocity at t = 0 counts as a fourth side beside the three with values. All four have one mean.
    sides = len(pde.sides) + isinstance(pde, Hyperbolic)
    value = sqrt(pde.condition_weight * len(pde.sides) / sides)
    functions = {
        "equation": lambda net, points: EQUATIONS[type(pde)](pde, net, points),
        "value": lambda net, points: value * (net(points) - pde.exact(points)),
    }
    if isinstance(pde, Hyperbolic):
        velocity = sqrt(pde.condition_weight / sides) / (pde.parameter * pi)
        functions["velocity"] = lambda net, points: velocity * derivatives(net, points)[0][:, 1:]
    return functions


def batch(pde: PDE, points: Points) -> dict[str, Tensor]:
    """The points of each kind of residual."""
    kinds = {"equation": points.interior, "value": points.boundary}
    return kinds | ({"velocity": points.boundary[points.boundary[:, 1] == 0]} if isinstance(pde, Hyperbolic) else {})


def fit(
    model: nn.Module,
    pde: PDE,
    iterations: int,
    seed: int,
    grid: Tensor,
    label: str,
    per_side: int = 80,
    grows_at: float = math.inf,
) -> list[Mark]:
    """Gauss–Newton with Levenberg–Marquardt damping, on fresh points in each iteration; returns marks of the error.

    Args:
        grows_at: the iteration from which on there are `GROWTH` times as many points.
    """
    dtype, device = next(model.parameters()).dtype, grid.device
    grid = grid.to(dtype)

    def fresh(iteration: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * iteration)
        times = GROWTH if iteration >= grows_at else 1
        points = pde.sample(generator, device, interior=times * 1000, per_side=times * per_side)
        return batch(pde, Points(*(part.to(dtype) for part in points)))

    marks = [Mark(0, 0.0, 0.0, relative_l2_error(model, pde, grid))]
    start, cpu_start = time.perf_counter(), time.process_time()

    def mark(result) -> None:
        now = time.perf_counter() - start, time.process_time() - cpu_start
        marks.append(Mark(result.iterations, *now, relative_l2_error(model, pde, grid)))

    print(f"{label}: Levenberg–Marquardt")
    result = fit_gauss_newton(
        model, residual_functions(pde), fresh, iterations=iterations, loss_tolerance=0, callback=mark
    )
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    return marks
