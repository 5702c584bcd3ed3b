"""The methods that `families.py` compares: each solves tasks at parameters that nothing was trained on.

What a method does once for all tasks is its offline part, what it does for one task its online part.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chebyshev_kan import ChebyshevKAN
from compared_methods import trainable
from family_tasks import (
    AtParameters,
    Case,
    DiagonalsAtParameters,
    DiagonalsOfParameters,
    OfParameters,
    Parameters,
    solve_combination,
)
from kans import build_kan, coefficients_of
from pde_least_squares import GROWTH, batch, fit
from pde_transfer import LEARNING_RATES, train
from pdes import PDE, Points, relative_l2_error
from peft import PeftModel, get_peft_model
from reporting import write_atomically
from torch import Tensor, nn
from training import train_by_adam

from peft_lotra import LoTRAConfig, adapter_at, at_task, fit_gauss_newton

BASIS = 8  # functions of a basis: degree 7, or Gaussians on a grid of 8
SMALL = 9  # width of a KAN with as many numbers as an adapter
Course = list[tuple[int, float, float]]  # (step, CPU seconds, relative L2 error)


@dataclass(frozen=True)
class Sizes:
    """How much of everything is done.

    Attributes:
        width: of all KANs; None: that of the case.
        base_steps, base_iterations: of the base, by Adam, or by Levenberg–Marquardt.
        family: iterations of the family's fit; the last fifth takes more points.
        alone: iterations of what is fitted to one task; the last fifth takes more points.
        core: iterations at a new task of the family's core.
        everything: of the KAN with parameters as inputs, at a new task.
        networks: the greater number of networks of a reduced basis.
        continued: iterations of a network that begins as one nearby.
    """

    width: int | None = None
    base_steps: int = 1500
    base_iterations: int = 60
    family: int = 75
    alone: int = 24
    core: int = 5
    everything: int = 2
    networks: int = 16
    continued: int = 10
    held_out: int = 5
    interior: int = 65  # points of the grid on a side, where errors are measured


SMOKE = Sizes(12, 5, 2, 3, 2, 2, 1, 4, 1, 2, 9)


class Lab:
    """A case with a seed: its base, its tasks, and a folder for what several methods need."""

    def __init__(self, name: str, case: Case, seed: int, sizes: Sizes, folder: Path) -> None:
        self.name, self.case, self.seed, self.sizes, self.folder = name, case, seed, sizes, folder
        self.width = sizes.width or case.width
        self.rate = (
            LEARNING_RATES["chebyshev"]["base"] if self.width <= 64 else 1e-3
        )  # of networks by Adam, from scratch
        self.grid = case.pde(case.base).grid(sizes.interior)

    def build(self, further_inputs: int = 0, width: int | None = None) -> nn.Module:
        widths = (2 + further_inputs, *[width or self.width] * 2, 1)
        if self.case.kan == "chebyshev":
            torch.manual_seed(self.seed)
            return ChebyshevKAN(widths, degree=BASIS - 1)
        return build_kan(self.case.kan, widths, BASIS, self.seed)

    def kept(self, what: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns with the CPU seconds that it took, from a file if it is there."""
        path = self.folder / f"{self.name.replace(', ', '_').replace(' ', '_')}_seed{self.seed}_{what}.pt"
        if not path.exists():
            start = time.process_time()
            result = compute() | {"seconds": time.process_time() - start}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda partial: torch.save(result, partial))
        return torch.load(path, weights_only=True)

    @cached_property
    def base(self) -> dict[str, Any]:
        """{"state", "seconds", "error"} of the base."""

        def compute() -> dict[str, Any]:
            kan, pde, sizes = self.build(), self.case.pde(self.case.base), self.sizes
            if self.case.base_by == "lm":
                fit(kan.to(self.case.dtype), pde, sizes.base_iterations, self.seed, self.grid, "base")
            else:
                train(kan, pde, sizes.base_steps, self.rate, self.seed, self.grid, "base")
            return {"state": kan.state_dict(), "error": self.error(kan, pde)}

        return self.kept("base", compute)

    def load(self, state: dict[str, Tensor] | None = None) -> nn.Module:
        """A KAN with these weights, those of the base by default."""
        kan = self.build().to(self.case.dtype)
        kan.load_state_dict(self.base["state"] if state is None else state)
        return kan

    def error(self, model: nn.Module, pde: PDE) -> float:
        return relative_l2_error(model, pde, self.grid.to(next(model.parameters()).dtype))

    def adapted(self, **config: Any) -> PeftModel:
        """The base with a new adapter, of a tenth of its numbers unless ranks are given."""
        config = config or {"compression_ratio": 0.1}
        kan = self.load()
        chebyshev = {"coefficients": "i o d"}
        coefficients = chebyshev if self.case.kan == "chebyshev" else coefficients_of(kan, self.case.kan)
        torch.manual_seed(self.seed + 1)
        return get_peft_model(kan, LoTRAConfig(coefficients=coefficients, **config))

    def tasks(self, which: Sequence[int] | None = None) -> list[tuple[Parameters, int]]:
        """Parameters that nothing is trained on, each with a seed for its points: some, or all."""
        inside = self.case.held_out()[: self.sizes.held_out]
        chosen = [k for k in range(len(inside)) if which is None or k in which]
        return [(inside[k], self.seed + 2 + k) for k in chosen]

    def course(
        self, model: nn.Module, pde: PDE, iterations: int, seed: int, label: str, grows_at: float = math.inf
    ) -> Course:
        """Levenberg–Marquardt on what is trainable."""
        label = f"{self.name}, seed {self.seed}, {label}"
        marks = fit(model, pde, iterations, seed, self.grid, label, grows_at=grows_at)
        return [(mark.step, mark.cpu_seconds, mark.error) for mark in marks]


class Result(NamedTuple):
    """What a method has to tell: numbers trained and CPU seconds, once and for a task, courses by parameters."""

    offline_numbers: int
    offline_seconds: float
    online_numbers: int
    tasks: list[tuple[Parameters, Course]]
    details: dict[str, Any] = {}


def family(lab: Lab, budget: float = 0.0) -> Result:
    """One adapter for all parameters; at a new one, its core alone. With a budget in CPU seconds, base included, the
    base is fitted together with the adapter until it is over, and then frozen."""
    case, sizes, joint = lab.case, lab.sizes, budget > 0
    ranges = dict(case.ranges)
    model = lab.adapted(r=case.ranks, family=ranges, family_degree=case.degree)
    if joint:
        model.requires_grad_(True)
    numbers, label = trainable(model), "family, joint" if joint else "family"

    def at(net: Any, parameters: tuple[Tensor, ...]) -> Any:
        return net, at_task(model, **dict(zip(ranges, parameters, strict=True)))

    def compute() -> dict[str, Any]:
        print(f"{lab.name}, seed {lab.seed}, {label}")
        seconds, start = budget - lab.base["seconds"], time.process_time()

        def grown(iteration: int) -> int:
            if joint:
                return 2 if time.process_time() - start >= 0.6 * seconds else 1
            return GROWTH if iteration >= 0.8 * sizes.family else 1

        result = fit_gauss_newton(
            model,
            case.residuals(at),
            case.points(lab.seed + 1, dtype=case.dtype, times=grown),
            iterations=10_000 if joint else sizes.family,
            loss_tolerance=0,
            callback=lambda result: joint and time.process_time() - start >= seconds,
        )
        if result.reason == "interrupted":
            raise KeyboardInterrupt
        details = {"iterations": result.iterations, "reason": result.reason}
        return {"state": model.state_dict(), "details": details}

    fitted = lab.kept(label.replace(", ", "_"), compute)
    model.load_state_dict(fitted["state"])
    model.requires_grad_(False)
    tasks, online = [], 0
    for values, seed in lab.tasks():
        adapter_at(model, "task", **dict(zip(ranges, values, strict=True)))
        online = trainable(model)
        tasks.append((values, lab.course(model, case.pde(values), sizes.core, seed, f"core at {values}")))
        model.set_adapter("default")
        model.delete_adapter("task")
    details = {"base error": lab.base["error"], **fitted["details"]}
    return Result(numbers, lab.base["seconds"] + fitted["seconds"], online, tasks, details)


def each_alone(
    lab: Lab, start: Callable[[], nn.Module], label: str, which: Sequence[int] | None = None, based: bool = True
) -> Result:
    """A model for every task by Levenberg–Marquardt: from the base, or from scratch."""
    tasks, numbers, iterations = [], 0, lab.sizes.alone
    for values, seed in lab.tasks(which):
        model = start()
        numbers = trainable(model)
        marks = lab.course(model, lab.case.pde(values), iterations, seed, f"{label} at {values}", 0.8 * iterations)
        tasks.append((values, marks))
    return Result(0, lab.base["seconds"] if based else 0.0, numbers, tasks)


def trained_on_all(lab: Lab, model: nn.Module, what: str, budget: float) -> dict[str, Any]:
    """A network of points and parameters, from scratch: Adam as for the base, then Levenberg–Marquardt until `budget`
    CPU seconds are over. What `Lab.kept` gives of it; the model has its weights."""
    case = lab.case
    residuals = case.residuals(OfParameters.at)
    start = time.process_time()

    def over(result: Any) -> bool:
        return time.process_time() - start >= budget

    def grown(iteration: int) -> int:
        # Of 1, 2 and 4 times as many this was the best, as it is, on two cases.
        return 2 if time.process_time() - start >= 0.6 * budget else 1

    def compute() -> dict[str, Any]:
        print(f"{lab.name}, seed {lab.seed}, {what}, {budget:.0f} CPU s")
        points = case.points(lab.seed + 1, interior=256, per_side=20)

        def loss(step: int) -> Tensor:
            return sum(residuals[name](model, part).square().mean() for name, part in points(step).items())

        train_by_adam(model, loss, lab.rate, lab.sizes.base_steps)
        adam_seconds = time.process_time() - start
        result = fit_gauss_newton(
            model.to(case.dtype),
            residuals,
            case.points(lab.seed + 1, dtype=case.dtype, times=grown),
            iterations=10_000,
            loss_tolerance=0,
            callback=over,
        )
        if result.reason == "interrupted":
            raise KeyboardInterrupt
        details = {"iterations": result.iterations, "reason": result.reason, "Adam seconds": adam_seconds}
        return {"state": model.state_dict(), "details": details}

    fitted = lab.kept(what.replace(" ", "_"), compute)
    model.to(case.dtype).load_state_dict(fitted["state"])
    return fitted


def of_parameters(lab: Lab, budget: float, diagonals: bool = False) -> Result:
    """A network of points and parameters, `trained_on_all`, and at a new task Levenberg–Marquardt: a KAN with the
    parameters as inputs, on all of it; or layers of low rank whose diagonals a small network makes of the parameters,
    on the diagonals and the first and last layer. That idea is of Hyper-LR-PINN (Cho et al., 2023)."""
    ranges, what = (
        list(lab.case.ranges.values()),
        "diagonals of the parameter" if diagonals else "parameter as an input",
    )
    torch.manual_seed(lab.seed)
    model = DiagonalsOfParameters(ranges) if diagonals else OfParameters(lab.build(len(ranges)), ranges)
    fitted, tasks, online = trained_on_all(lab, model, what, budget), [], 0
    iterations = lab.sizes.core if diagonals else lab.sizes.everything
    for values, seed in lab.tasks():
        of_task = (DiagonalsAtParameters if diagonals else AtParameters)(copy.deepcopy(model), values)
        online = trainable(of_task)
        marks = lab.course(of_task, lab.case.pde(values), iterations, seed, f"{what}, at {values}")
        tasks.append((values, marks))
    return Result(trainable(model), fitted["seconds"], online, tasks, fitted["details"])


def reduced_basis(lab: Lab) -> Result:
    """KANs at Chebyshev points of the range, by Levenberg–Marquardt; a task is the combination of them with the least
    residual. The KAN nearest to the base begins as the base, any other as the nearest that is there."""
    nodes, base = lab.case.nodes(lab.sizes.networks), lab.case.base

    def compute() -> dict[str, Any]:
        states: dict[int, dict[str, Tensor]] = {}
        numbers = 0
        for k in sorted(range(len(nodes)), key=lambda k: abs(nodes[k][0] - base[0])):
            model, iterations = lab.load(), lab.sizes.continued if states else lab.sizes.alone
            if states:
                model.load_state_dict(states[min(states, key=lambda j: abs(nodes[j][0] - nodes[k][0]))])
            label = f"one of {len(nodes)} KANs at {nodes[k]}"
            lab.course(model, lab.case.pde(nodes[k]), iterations, lab.seed + 100 + k, label)
            states[k], numbers = copy.deepcopy(model.state_dict()), trainable(model)
        return {"states": states, "numbers": numbers}

    found = lab.kept("KANs", compute)
    networks, tasks = [lab.load(state).double() for _, state in sorted(found["states"].items())], []
    for values, seed in lab.tasks():
        pde, generator = lab.case.pde(values), torch.Generator().manual_seed(seed)
        points = Points(*(part.double() for part in pde.sample(generator, interior=1000, per_side=80)))
        start = time.process_time()
        model = solve_combination(pde, networks, batch(pde, points))
        seconds = time.process_time() - start
        tasks.append((values, [(1, seconds, relative_l2_error(model, pde, lab.grid.double()))]))
    count, seconds = len(networks), lab.base["seconds"] + found["seconds"]
    return Result(count * found["numbers"], seconds, count, tasks)


# They take the seconds of the family.
ALL_TASKS = ("family, joint", "parameter as an input", "diagonals of the parameter")
METHODS: dict[str, Callable[..., Result]] = {
    "family": family,
    "family, joint": family,
    "small KAN alone, LM": lambda lab: each_alone(
        lab, lambda: lab.build(width=SMALL).to(lab.case.dtype), "small KAN", based=False
    ),
    "LoTRA alone, LM": lambda lab: each_alone(lab, lab.adapted, "LoTRA alone"),
    "full, LM": lambda lab: each_alone(lab, lab.load, "everything, LM", (1, 3)),
    "parameter as an input": of_parameters,
    "diagonals of the parameter": partial(of_parameters, diagonals=True),
    "basis of 16 KANs": reduced_basis,
}
