"""Convection with the speed as a parameter, a benchmark of networks for families of PDEs: runs what is not there yet.

    python examples/method_comparison/convection.py
    python examples/method_comparison/convection.py --ranges 30-40 --seeds 0
    python examples/method_comparison/convection.py --smoke

u_t + β u_x = 0 for x in [0, 2π], periodic, and t in [0, 1], u = 1 + sin x at t = 0, so that u = 1 + sin(x −
βt), with β in [1, 20] or in [30, 40], as in Hyper-LR-PINN (Cho et al., 2023). No method sees values at t > 0.
Fast waves are a known failure: a network that is trained on the whole of [0, 1] at once ends at u = 1. So every
method but the PINN meets the times, and then the speeds, in growing parts: a part grows by a tenth as soon as
the network solves points of it that it was not fitted to. Periodicity is in the inputs, (cos x, sin x, 2t − 1).
Every range, method and seed is a line of results/convection.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from chebyshev_kan import ChebyshevKAN
from compared_methods import trainable
from family_tasks import DiagonalsOfParameters
from jobs import Job, Line, do_missing, environment, new_arguments, place, rounded
from pde_least_squares import derivatives
from peft import get_peft_model
from reporting import write_atomically

from peft_lotra import LoTRAConfig, adapter_at, at_task, fit_gauss_newton

RANGES = {"1-20": (1.0, 20.0), "30-40": (30.0, 40.0)}
PARTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the range, where errors are measured
RANKS, DEGREE, WIDTH, BASIS = (6, 6, None), 5, 24, 8
POINTS, GROWTH = (1500, 250), 3  # inside and at t = 0, and by which factor there are more in the end


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


class Network(nn.Module):
    """A network of (cos x, sin x, 2t − 1) and, where it takes them, of speeds. (N, 2), (N, 1) → (N, 1)"""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, points: Tensor, *speeds: Tensor) -> Tensor:
        x, t = points.split(1, dim=1)
        return self.net(torch.cat([torch.cos(x), torch.sin(x), 2 * t - 1], dim=1), *speeds)


class WithInput(nn.Module):
    """A KAN with the scaled speed as an input."""

    def __init__(self, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.bounds, self.kan = bounds, new_kan(further=1)

    def forward(self, inputs: Tensor, speeds: Tensor) -> Tensor:
        return self.kan(torch.cat([inputs, scaled(speeds, self.bounds)], dim=1))


class Encoders(nn.Module):
    """An encoder of inputs, an encoder of the speed, and a network of both, as in P2INN (Cho et al., 2024)."""

    def __init__(self, bounds: tuple[float, float], width: int = 30) -> None:
        super().__init__()
        self.bounds = bounds
        self.of_inputs, self.of_speeds = mlp(3, width, width, width), mlp(1, width, width, width)
        self.together = mlp(2 * width, width, width, width, 1)

    def forward(self, inputs: Tensor, speeds: Tensor) -> Tensor:
        codes = self.of_inputs(inputs), self.of_speeds(scaled(speeds, self.bounds))
        return self.together(torch.tanh(torch.cat(codes, dim=1)))


class Combined(nn.Module):
    """Σ_k c_k u_k, of networks with fixed weights, as in GPT-PINN (Chen and Koohy, 2024)."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks).requires_grad_(False)
        self.weights = nn.Parameter(torch.full((len(networks),), 1 / len(networks)))

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat([network(points) for network in self.networks], dim=1) @ self.weights[:, None]


class AtSpeed(nn.Module):
    """A network of points and speeds at one speed."""

    def __init__(self, model: nn.Module, speed: float) -> None:
        super().__init__()
        self.model, self.speed = model, speed

    def forward(self, points: Tensor) -> Tensor:
        return self.model(points, torch.full_like(points[:, :1], self.speed))


def mlp(*widths: int) -> nn.Sequential:
    layers = [module for n, m in zip(widths, widths[1:], strict=False) for module in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def scaled(speeds: Tensor, bounds: tuple[float, float]) -> Tensor:
    return 2 * (speeds - bounds[0]) / (bounds[1] - bounds[0]) - 1


def new_kan(further: int = 0) -> nn.Module:
    return ChebyshevKAN((3 + further, WIDTH, WIDTH, 1), degree=BASIS - 1)


Call = Callable[[nn.Module, Tensor, Tensor], tuple[Callable[[Tensor], Tensor], Any]]


def of_points(net: nn.Module, points: Tensor, speeds: Tensor) -> tuple[Callable[[Tensor], Tensor], Any]:
    """A network that knows its speed, for `Lab.fit`: the function of points, and the context that it is called in."""
    return net, nullcontext()


def of_both(net: nn.Module, points: Tensor, speeds: Tensor) -> tuple[Callable[[Tensor], Tensor], Any]:
    return (lambda points: net(points, speeds)), nullcontext()


class Lab:
    """A range with a seed: its residuals, points, base and errors."""

    def __init__(self, name: str, seed: int, sizes: Sizes, folder: Path) -> None:
        self.bounds, self.seed, self.sizes = RANGES[name], seed, sizes
        self.path, bounds = folder / f"{name}_seed{seed}_base.pt", self.bounds
        self.weight = 2.5 * bounds[1]  # of the values at t = 0, beside derivatives of the size of the speed
        self.middle = sum(bounds) / 2
        self.speeds = [round(bounds[0] + part * (bounds[1] - bounds[0]), 4) for part in PARTS]
        torch.manual_seed(seed)

    def residuals(self, call: Call) -> dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]]:
        def equation(net: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
            function, context = call(net, *part)
            with context:
                first, _ = derivatives(function, part[0])
            return first[:, 1:] + part[1] * first[:, :1]

        def value(net: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
            function, context = call(net, *part)
            with context:
                return self.weight * (function(part[0]) - 1 - torch.sin(part[0][:, :1]))

        return {"equation": equation, "value": value}

    def points(
        self, iteration: int, until: float, speeds: tuple[float, float], times: float = 1.0
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Points at times in [0, until], and at t = 0, each with a speed."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * iteration)
        parts = {}
        for name, count, end in zip(("equation", "value"), POINTS, (until, 0.0), strict=True):
            drawn = torch.rand(int(times * count), 3, generator=generator)
            parts[name] = (
                drawn[:, :2] * torch.tensor([2 * pi, end]),
                speeds[0] + (speeds[1] - speeds[0]) * drawn[:, 2:],
            )
        return parts

    def fit(self, model: nn.Module, call: Call, seconds: float, grows: str, times: int = 1) -> float:
        """Levenberg–Marquardt on what is trainable; the CPU seconds that it took.

        Args:
            seconds: of CPU time; at least.
            grows: "times" at the middle speed, or "speeds" from the middle on.
            times: as many points, as soon as all is there.
        """
        residuals, start, part = self.residuals(call), time.process_time(), 0.03

        def drawn(iteration: int, times: float) -> dict[str, tuple[Tensor, Tensor]]:
            if grows == "times":
                return self.points(iteration, part, (self.middle, self.middle), times)
            low, high = self.bounds
            return self.points(
                iteration,
                1.0,
                (self.middle + part * (low - self.middle), self.middle + part * (high - self.middle)),
                times,
            )

        def over(result: Any) -> bool:
            nonlocal part
            if part < 1:
                unseen = drawn(10**6 + result.iterations, 0.2)
                with torch.no_grad():
                    loss = sum(residuals[name](model, batch).square().mean().item() for name, batch in unseen.items())
                if loss < 5e-4 * self.weight**2:
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
        return time.process_time() - start

    def task(self, model: nn.Module, speed: float) -> Line:
        """The course of a fit on what is trainable, at one speed."""
        start, marks = time.process_time(), [(0, 0.0, rounded(self.error(model, speed)))]

        def mark(result: Any) -> None:
            seconds = rounded(time.process_time() - start)
            marks.append((result.iterations, seconds, rounded(self.error(model, speed))))

        fit_gauss_newton(
            model,
            self.residuals(of_points),
            lambda iteration: self.points(iteration + 7_000, 1.0, (speed, speed)),
            iterations=self.sizes.steps,
            loss_tolerance=0,
            callback=mark,
            progressbar=False,
        )
        return {"speed": speed, "marks": marks, "numbers": trainable(model)}

    @torch.no_grad()
    def error(self, model: nn.Module, speed: float) -> float:
        """Relative L2 error on the grid of the public generators, 256 × 100."""
        x, t = torch.arange(256) * (2 * pi / 256), torch.linspace(0, 1, 100)
        points = torch.cartesian_prod(x, t)
        exact = 1 + torch.sin(points[:, :1] - speed * points[:, 1:])
        return ((model(points) - exact).norm() / exact.norm()).item()

    @cached_property
    def base(self) -> tuple[dict[str, Tensor], float]:
        """A KAN at the middle speed, and its seconds."""
        if not self.path.exists():
            kan = Network(new_kan())
            seconds = self.fit(kan, of_points, self.sizes.base, "times")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda partial: torch.save((kan.state_dict(), seconds), partial))
        return torch.load(self.path, weights_only=True)

    def load(self) -> nn.Module:
        kan = Network(new_kan())
        kan.load_state_dict(self.base[0])
        return kan


def family(whole: bool, lab: Lab) -> Line:
    """An adapter for all speeds; at a new one its core, or core and factors."""
    config = LoTRAConfig(
        r=RANKS, coefficients={"coefficients": "i o d"}, family={"beta": lab.bounds}, family_degree=DEGREE
    )
    model = get_peft_model(lab.load(), config)
    numbers = trainable(model)

    def call(net: nn.Module, points: Tensor, speeds: Tensor) -> tuple[Callable[[Tensor], Tensor], Any]:
        return net, at_task(model, beta=speeds)

    path = lab.path.with_name(lab.path.name.replace("base", "family"))
    if not path.exists():
        seconds = lab.fit(model, call, lab.sizes.family, "speeds", GROWTH)
        write_atomically(path, lambda partial: torch.save((model.state_dict(), seconds), partial))
    state, seconds = torch.load(path, weights_only=True)
    model.load_state_dict(state)
    tasks = []
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
        "seconds": lab.base[1] + seconds,
        "tasks": tasks,
        "base error": rounded(lab.error(lab.load(), lab.middle)),
    }


def of_all(make: Callable[[tuple[float, float]], nn.Module], lab: Lab) -> Line:
    """A network of points and speed, from scratch: the middle speed first, as the base, and then all speeds."""
    model = Network(make(lab.bounds))
    seconds = lab.fit(model, of_both, lab.sizes.base, "times")
    seconds += lab.fit(model, of_both, lab.sizes.family, "speeds", GROWTH)
    tasks = [lab.task(AtSpeed(copy.deepcopy(model), speed), speed) for speed in lab.speeds]
    return {"once": trainable(model), "seconds": seconds, "tasks": tasks}


def alone(adapted: bool, lab: Lab) -> Line:
    """The base, or an adapter of a tenth on it, at the new speed."""
    tasks, config = [], LoTRAConfig(compression_ratio=0.1, coefficients={"coefficients": "i o d"})
    for speed in lab.speeds:
        tasks.append(lab.task(get_peft_model(lab.load(), config) if adapted else lab.load(), speed))
    return {"once": 0, "seconds": lab.base[1], "tasks": tasks}


def combined(lab: Lab) -> Line:
    """KANs at Chebyshev points of the range, each begun as the nearest that is there; a task is their combination."""
    count, (low, high), start = lab.sizes.networks, lab.bounds, time.process_time()
    nodes = [low + (high - low) * (1 - math.cos(pi * k / (count - 1))) / 2 for k in range(count)]
    states = {lab.middle: lab.base[0]}
    for node in sorted(nodes, key=lambda node: abs(node - lab.middle)):
        kan = lab.load()
        kan.load_state_dict(states[min(states, key=lambda known: abs(known - node))])
        lab.task(kan, node)
        states[node] = copy.deepcopy(kan.state_dict())
    networks = []
    for node in nodes:
        networks.append(lab.load())
        networks[-1].load_state_dict(states[node])
    seconds = lab.base[1] + time.process_time() - start
    tasks = [lab.task(Combined(copy.deepcopy(networks)), speed) for speed in lab.speeds]
    return {"once": count * trainable(lab.load()), "seconds": seconds, "tasks": tasks}


def pinn(lab: Lab) -> Line:
    """A network with tanh at one speed, from scratch on all times at once, by L-BFGS with strong Wolfe line search, on
    fixed points."""

    def solve(speed: float) -> Line:
        model, start = Network(mlp(3, 50, 50, 50, 50, 1)), time.process_time()
        residuals, parts = lab.residuals(of_points), lab.points(0, 1.0, (speed, speed), 2)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(residuals[name](model, part).square().mean() for name, part in parts.items())
            loss.backward()
            return loss

        while time.process_time() - start < lab.sizes.alone:
            optimizer.step(closure)
        marks = [(1, rounded(time.process_time() - start), rounded(lab.error(model, speed)))]
        return {"speed": speed, "marks": marks, "numbers": trainable(model)}

    return {"once": 0, "seconds": 0.0, "tasks": [solve(speed) for speed in lab.speeds[::2]]}


METHODS: Mapping[str, Callable[[Lab], Line]] = {
    "family, its core": partial(family, False),
    "family, core and factors": partial(family, True),
    "speed as an input": partial(of_all, WithInput),
    "diagonals of the speed": partial(of_all, lambda bounds: DiagonalsOfParameters([bounds], inputs=3)),
    "encoders": partial(of_all, Encoders),
    "KANs combined": combined,
    "adapter from the base": partial(alone, True),
    "everything from the base": partial(alone, False),
    "PINN, L-BFGS": pinn,
}


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    def compute(name: str, method: str, seed: int) -> Line:
        sizes = SMOKE if args.smoke else SIZES[name]
        found = METHODS[method](Lab(name, seed, sizes, args.outputs))
        return {**found, "seconds": rounded(found["seconds"]), "settings": vars(sizes), "environment": environment()}

    for seed in args.seeds:
        for name in args.ranges:
            for method in args.methods:
                yield {"range": name, "method": method, "seed": seed}, partial(compute, name, method, seed)


def main(argv: list[str] | None = None) -> int:
    parser = new_arguments(__doc__, "convection", METHODS)
    parser.add_argument("--ranges", nargs="+", choices=list(RANGES), default=list(RANGES), help="of the speed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and points")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds = args.seeds[:1]
    place(args, "convection")
    return do_missing(args.results, lambda: jobs(args), stored=args.stored)


if __name__ == "__main__":
    sys.exit(main())
