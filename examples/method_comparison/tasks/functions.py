"""A function from samples of it, with or without noise: there is no base, a KAN learns it from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from kans import build_kan, coefficients_of
from objectives import Data, Objective, Regression, generator
from torch import Tensor, nn

from . import Task

TEST_SAMPLES = 2000


def ridge(x: Tensor) -> Tensor:
    """exp(sin πx₁ + x₂²)"""
    return torch.exp(torch.sin(pi * x[:, 0]) + x[:, 1] ** 2)


def waves(x: Tensor) -> Tensor:
    """sin(2πx₁) cos(πx₂) + x₁x₂"""
    return torch.sin(2 * pi * x[:, 0]) * torch.cos(pi * x[:, 1]) + x[:, 0] * x[:, 1]


def quotient(x: Tensor) -> Tensor:
    """x₁x₂ / (1 + x₃²)"""
    return x[:, 0] * x[:, 1] / (1 + x[:, 2] ** 2)


def four(x: Tensor) -> Tensor:
    """exp((sin π(x₁² + x₂²) + sin π(x₃² + x₄²)) / 2)"""
    s = torch.sin(pi * (x[:, 0] ** 2 + x[:, 1] ** 2)) + torch.sin(pi * (x[:, 2] ** 2 + x[:, 3] ** 2))
    return torch.exp(s / 2)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "ridge": (ridge, 2),
    "waves": (waves, 2),
    "quotient": (quotient, 3),
    "four": (four, 4),
}


@dataclass(frozen=True, kw_only=True)
class Representation(Task):
    """`samples` values of a function on [−1, 1]ⁿ, with normal noise of `noise` times its standard deviation."""

    function: str
    noise: float = 0.0
    samples: int = 1000
    batch: int = 256
    kan: str = "chebyshev"
    width: int = 32
    basis: int = 8

    metric = "relative L2 error without noise"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(
                f"`function` should be one of {list(FUNCTIONS)} but the value passed is {self.function!r}"
            )

    def build(self, seed: int) -> nn.Module:
        return build_kan(self.kan, (FUNCTIONS[self.function][1], self.width, self.width, 1), self.basis, seed)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        return coefficients_of(model, self.kan)

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        function, inputs = FUNCTIONS[self.function]
        # A step of its own for the data, which no batch has.
        source = generator(seed, -1)
        x = 2 * torch.rand(self.samples + TEST_SAMPLES, inputs, generator=source) - 1
        y = function(x)[:, None]
        noise = self.noise * y.std() * torch.randn(self.samples, 1, generator=source)
        training = Data(x[: self.samples].to(device), (y[: self.samples] + noise).to(device))
        test = Data(x[self.samples :].to(device), y[self.samples :].to(device))
        return Regression(training, test, self.batch, seed)


TASK = Representation
