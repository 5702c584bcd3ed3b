"""Convection with the speed as a parameter, a benchmark of networks for families of PDEs: `run.py convection`.

u_t + β u_x = 0 for x in [0, 2π], periodic, and t in [0, 1], u = 1 + sin x at t = 0, so that u = 1 + sin(x −
βt), with β in [1, 20] or in [30, 40], as in Hyper-LR-PINN (Cho et al., 2023). No method sees values at t > 0.
Fast waves are a known failure: a network that is trained on the whole of [0, 1] at once ends at u = 1. So every
method but the PINN meets the times, and then the speeds, in growing parts: a part grows by a tenth as soon as
the network solves points of it that it was not fitted to. Periodicity is in the inputs, (cos x, sin x, 2t − 1).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from math import pi
from pathlib import Path
from typing import Any

import torch
from chebyshev_kan import ChebyshevKAN
from compared_methods import trainable
from family_methods import Lab as OfFamilies
from family_tasks import (
    EQUATIONS,
    Advection,
    AtParameters,
    Case,
    Combination,
    DiagonalsOfParameters,
    OfParameters,
    advection,
    scaled,
)
from jobs import Job, Line, environment, rounded
from peft import get_peft_model
from torch import Tensor, nn
from training import lbfgs_on
from version import version

from peft_lotra import LoTRAConfig, adapter_at, at_task, fit_gauss_newton

RANGES = {"1-20": (1.0, 20.0), "30-40": (30.0, 40.0)}
RANKS, DEGREE, WIDTH, BASIS = (10, 10, None), 5, 24, 8
POINTS, GROWTH = (1500, 250), 2  # inside and at t = 0, and by which factor there are more in the end


@dataclass(frozen=True)
class Sizes:
    """CPU seconds of a base, of a family's fit and of L-BFGS; steps of LM for a task; networks that are combined."""

    base: float
    family: float
    alone: float = 60.0
    steps: int = 15
    networks: int = 8


SIZES = {"1-20": Sizes(60.0, 120.0), "30-40": Sizes(90.0, 150.0)}
SMOKE = Sizes(0.5, 0.5, 0.5, 1, 3)


class Convection(Advection):
    """u_t + β u_x = 0, periodic in x, u = 1 + sin x at t = 0; u = 1 + sin(x − βt)."""

    title = "Convection"
    lower, upper, sides = (0.0, 0.0), (2 * pi, 1.0), ((1, 0.0),)
    condition_weight = 50.0**2  # derivatives are of the size of the speed

    def exact(self, points: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        return 1 + torch.sin(x - self.parameter * t)


class FastConvection(Convection):
    condition_weight = 100.0**2


EQUATIONS |= {Convection: advection, FastConvection: advection}
CASES = {
    name: Case("Convection", kind, {"beta": bounds}, (sum(bounds) / 2,), RANKS, DEGREE)
    for (name, bounds), kind in zip(RANGES.items(), (Convection, FastConvection), strict=True)
}


class Network(nn.Module):
    """A network of (cos x, sin x, 2t − 1) and, where it takes them, of speeds. (N, 2), (N, 1) → (N, 1)"""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, points: Tensor, *speeds: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        return self.net(torch.cat([torch.cos(x), torch.sin(x), 2 * t - 1], dim=1), *speeds)


class Encoders(nn.Module):
    """An encoder of inputs, an encoder of the speed, and a network of both, as in P2INN (Cho et al., 2024)."""

    def __init__(self, bounds: tuple[float, float], width: int = 30) -> None:
        super().__init__()
        self.bounds = bounds
        self.of_inputs, self.of_speeds = mlp(3, width, width, width), mlp(1, width, width, width)
        self.together = mlp(2 * width, width, width, width, 1)

    def forward(self, inputs: Tensor, speeds: Tensor) -> Tensor:
        codes = self.of_inputs(inputs), self.of_speeds(*scaled([speeds], [self.bounds]))
        return self.together(torch.tanh(torch.cat(codes, dim=1)))


def mlp(*widths: int) -> nn.Sequential:
    layers = [module for n, m in zip(widths, widths[1:], strict=False) for module in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def new_kan(further: int = 0) -> nn.Module:
    return ChebyshevKAN((3 + further, WIDTH, WIDTH, 1), degree=BASIS - 1)


def with_input(bounds: tuple[float, float]) -> nn.Module:
    return OfParameters(new_kan(further=1), [bounds])


At = Callable[[nn.Module, tuple[Tensor]], tuple[Callable[[Tensor], Tensor], Any]]  # as `Case.residuals` takes it


def at_one_speed(net: nn.Module, speeds: tuple[Tensor]) -> tuple[nn.Module, Any]:
    """A network that knows its speed."""
    return net, nullcontext()


class Lab(OfFamilies):
    """A range with a seed: its residuals, points, base and errors."""

    def __init__(self, name: str, seed: int, sizes: Sizes, folder: Path) -> None:
        self.name, self.case, self.seed, self.sizes, self.folder = name, CASES[name], seed, sizes, folder
        self.bounds, (self.middle,) = self.case.ranges["beta"], self.case.base
        self.speeds = [speed for (speed,) in self.case.held_out()]  # where errors are measured
        # that of the public generators, 256 × 100
        self.grid = torch.cartesian_prod(torch.arange(256) * (2 * pi / 256), torch.linspace(0, 1, 100))
        torch.manual_seed(seed)

    def points(
        self, iteration: int, until: float, speeds: tuple[float, float], times: float = 1.0
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Points at times in [0, until], and at t = 0, each with a speed: denser at both ends, as Chebyshev points."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * iteration)
        parts = {}
        for name, count, end in zip(("equation", "value"), POINTS, (until, 0.0), strict=True):
            drawn = torch.rand(int(times * count), 3, generator=generator)
            part = (1 - torch.cos(pi * drawn[:, 2:])) / 2
            parts[name] = drawn[:, :2] * torch.tensor([2 * pi, end]), speeds[0] + (speeds[1] - speeds[0]) * part
        return parts

    def fit(self, model: nn.Module, at: At, seconds: float, grows: str, times: int = 1) -> None:
        """Levenberg–Marquardt on what is trainable.

        Args:
            seconds: of CPU time; at least.
            grows: "times" at the middle speed, or "speeds" from the middle on.
            times: as many points, as soon as all is there.
        """
        residuals, start, part = self.case.residuals(at), time.process_time(), 0.03

        def drawn(iteration: int, times: float) -> dict[str, tuple[Tensor, Tensor]]:
            if grows == "times":
                return self.points(iteration, part, (self.middle, self.middle), times)
            low, high = (self.middle + part * (end - self.middle) for end in self.bounds)
            return self.points(iteration, 1.0, (low, high), times)

        # A network that goes to u = 1 soon after t = 0 has small residuals at nearly all points.
        small = (5e-5 if grows == "times" else 5e-4) * self.case.pde_class.condition_weight

        def over(result: Any) -> bool:
            nonlocal part
            if part < 1:
                unseen = drawn(10**6 + result.iterations, 0.2)
                with torch.no_grad():
                    loss = sum(residuals[name](model, batch).square().mean().item() for name, batch in unseen.items())
                if loss < small:
                    part = min(1.0, 1.1 * part)
            return time.process_time() - start >= seconds

        fit_gauss_newton(
            model,
            residuals,
            lambda iteration: drawn(iteration, times if part == 1 else 1),
            iterations=100_000,
            loss_tolerance=0,
            callback=over,
        )

    def task(self, model: nn.Module, speed: float) -> Line:
        """The course of a fit on what is trainable, at one speed."""
        start, marks = time.process_time(), [(0, 0.0, rounded(self.error_at(model, speed)))]

        def mark(result: Any) -> None:
            seconds = rounded(time.process_time() - start)
            marks.append((result.iterations, seconds, rounded(self.error_at(model, speed))))

        fit_gauss_newton(
            model,
            self.case.residuals(at_one_speed),
            lambda iteration: self.points(iteration + 7_000, 1.0, (speed, speed)),
            iterations=self.sizes.steps,
            loss_tolerance=0,
            callback=mark,
            progressbar=False,
        )
        return {"speed": speed, "marks": marks, "numbers": trainable(model)}

    def error_at(self, model: nn.Module, speed: float) -> float:
        return self.error(model, self.case.pde((speed,)))

    def build(self, further_inputs: int = 0) -> nn.Module:
        torch.manual_seed(self.seed)
        return Network(new_kan(further_inputs))

    @cached_property
    def base(self) -> dict[str, Any]:
        """The "state" and "seconds" of a KAN at the middle speed."""

        def compute() -> dict[str, Any]:
            kan = self.build()
            self.fit(kan, at_one_speed, self.sizes.base, "times")
            return {"state": kan.state_dict()}

        return self.kept("base", compute)


def family(whole: bool, lab: Lab) -> Line:
    """An adapter for all speeds; at a new one its core, or core and factors."""
    ranges = dict(lab.case.ranges)
    config = LoTRAConfig(r=RANKS, coefficients={"coefficients": "i o d"}, family=ranges, family_degree=DEGREE)
    model = get_peft_model(lab.load(), config)
    numbers = trainable(model)

    def at(net: nn.Module, speeds: tuple[Tensor]) -> tuple[nn.Module, Any]:
        return net, at_task(model, beta=speeds[0])

    def compute() -> dict[str, Any]:
        lab.fit(model, at, lab.sizes.family, "speeds", GROWTH)
        return {"state": model.state_dict()}

    fitted, tasks = lab.kept("family", compute), []
    model.load_state_dict(fitted["state"])
    for speed in lab.speeds:
        adapter_at(model, "task", beta=speed)
        if whole:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".task" in name)
        tasks.append(lab.task(model, speed))
        model.set_adapter("default")
        model.delete_adapter("task")
    return {
        "once": numbers,
        "seconds": lab.base["seconds"] + fitted["seconds"],
        "tasks": tasks,
        "base error": rounded(lab.error_at(lab.load(), lab.middle)),
    }


def of_all(make: Callable[[tuple[float, float]], nn.Module], lab: Lab) -> Line:
    """A network of points and speed, from scratch: the middle speed first, as the base, and then all speeds."""
    model, start = Network(make(lab.bounds)), time.process_time()
    lab.fit(model, OfParameters.at, lab.sizes.base, "times")
    lab.fit(model, OfParameters.at, lab.sizes.family, "speeds", GROWTH)
    seconds = time.process_time() - start
    tasks = [lab.task(AtParameters(copy.deepcopy(model), (speed,)), speed) for speed in lab.speeds]
    return {"once": trainable(model), "seconds": seconds, "tasks": tasks}


def alone(adapted: bool, lab: Lab) -> Line:
    """The base, or an adapter of a tenth on it, at the new speed."""
    tasks, config = [], LoTRAConfig(compression_ratio=0.1, coefficients={"coefficients": "i o d"})
    for speed in lab.speeds:
        tasks.append(lab.task(get_peft_model(lab.load(), config) if adapted else lab.load(), speed))
    return {"once": 0, "seconds": lab.base["seconds"], "tasks": tasks}


def combined(lab: Lab) -> Line:
    """KANs at Chebyshev points of the range, each begun as the nearest that is there; a task is their combination, as
    in GPT-PINN (Chen and Koohy, 2024)."""
    count, start = lab.sizes.networks, time.process_time()
    nodes = [node for (node,) in lab.case.nodes(count)]
    states = {lab.middle: lab.base["state"]}
    for node in sorted(nodes, key=lambda node: abs(node - lab.middle)):
        kan = lab.load()
        kan.load_state_dict(states[min(states, key=lambda known: abs(known - node))])
        lab.task(kan, node)
        states[node] = copy.deepcopy(kan.state_dict())
    seconds = lab.base["seconds"] + time.process_time() - start
    networks = []
    for node in nodes:
        networks.append(lab.load().requires_grad_(False))
        networks[-1].load_state_dict(states[node])
    weights = torch.full((count,), 1 / count)
    tasks = [lab.task(Combination(networks, nn.Parameter(weights.clone())), speed) for speed in lab.speeds]
    return {"once": count * trainable(lab.load()), "seconds": seconds, "tasks": tasks}


def pinn(lab: Lab) -> Line:
    """A network with tanh at one speed, from scratch on all times at once, by L-BFGS with strong Wolfe line search, on
    fixed points."""

    def solve(speed: float) -> Line:
        model, start = Network(mlp(3, 50, 50, 50, 50, 1)), time.process_time()
        step = lbfgs_on(model, lab.case.residuals(at_one_speed), lab.points(0, 1.0, (speed, speed), 2))
        while time.process_time() - start < lab.sizes.alone:
            step()
        marks = [(1, rounded(time.process_time() - start), rounded(lab.error_at(model, speed)))]
        return {"speed": speed, "marks": marks, "numbers": trainable(model)}

    return {"once": 0, "seconds": 0.0, "tasks": [solve(speed) for speed in lab.speeds[::2]]}


METHODS: Mapping[str, Callable[[Lab], Line]] = {
    "family, its core": partial(family, False),
    "family, core and factors": partial(family, True),
    "speed as an input": partial(of_all, with_input),
    "diagonals of the speed": partial(of_all, lambda bounds: DiagonalsOfParameters([bounds], inputs=3)),
    "encoders": partial(of_all, Encoders),
    "KANs combined": combined,
    "adapter from the base": partial(alone, True),
    "everything from the base": partial(alone, False),
    "PINN, L-BFGS": pinn,
}
SEEDS = dict.fromkeys(METHODS, 3) | dict.fromkeys(("diagonals of the speed", "encoders", "PINN, L-BFGS"), 1)


def jobs(smoke: bool, folder: Path, lines: Path) -> Iterator[Job]:
    """Seeds outermost, methods innermost; a short form has one range."""

    def compute(name: str, method: str, seed: int) -> Line:
        sizes = SMOKE if smoke else SIZES[name]
        found = METHODS[method](Lab(name, seed, sizes, folder))
        found |= {"seconds": rounded(found["seconds"]), "settings": vars(sizes)}
        return found | {"version": version("convection"), "environment": environment()}

    for seed in range(1 if smoke else max(SEEDS.values())):
        for name in list(RANGES)[smoke:]:
            for method in METHODS:
                if seed < SEEDS[method]:
                    yield {"range": name, "method": method, "seed": seed}, partial(compute, name, method, seed)
