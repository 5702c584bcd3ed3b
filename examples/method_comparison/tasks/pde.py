"""A physics-informed KAN that solves one PDE is adapted to another parameter of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kans import build_kan, coefficients_of
from objectives import Objective, generator
from pde_least_squares import batch, residual_functions
from pdes import PDE, PDES, Points, relative_l2_error
from torch import Tensor, nn

from . import Task


class Solution(Objective):
    """Residuals at fresh points in every step; the metric is the relative L2 error on a grid."""

    def __init__(self, pde: PDE, seed: int, device: torch.device) -> None:
        self.pde, self.seed, self.device = pde, seed, device
        self.grid = pde.grid().to(device)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        return self.pde.loss(model, self.pde.sample(generator(self.seed, step), self.device))

    def metric(self, model: nn.Module) -> float:
        return relative_l2_error(model, self.pde, self.grid)

    def second_order(self) -> dict[str, Any]:
        def data(iteration: int) -> dict[str, Tensor]:
            drawn = generator(self.seed, iteration)
            points = self.pde.sample(drawn, self.device, interior=self.pde.lm_points, per_side=80)
            return batch(self.pde, Points(*points))

        return {"residual_fn": residual_functions(self.pde), "data": data}


@dataclass(frozen=True, kw_only=True)
class Transfer(Task):
    """`family` at `parameter`, from a base at `base_parameter`."""

    family: str
    parameter: float
    base_parameter: float
    kan: str = "chebyshev"
    width: int = 32
    basis: int = 8
    base_steps: int = 1500

    metric = "relative L2 error"
    only_target = ("parameter",)

    def __post_init__(self) -> None:
        if self.family not in PDES:
            raise ValueError(f"`family` should be one of {list(PDES)} but the value passed is {self.family!r}")

    def build(self, seed: int) -> nn.Module:
        return build_kan(self.kan, (2, self.width, self.width, 1), self.basis, seed)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        return coefficients_of(model, self.kan)

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        parameter = self.base_parameter if part == "base" else self.parameter
        return Solution(PDES[self.family](parameter), seed, device)


TASK = Transfer
