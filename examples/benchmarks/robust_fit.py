"""Does `fit_gauss_newton` stall? The final losses of 30 starts of four problems, beside those of other optimizers.

    python examples/benchmarks/robust_fit.py
    python examples/benchmarks/robust_fit.py --problems values --starts "cores at 0.1" --seeds 5

Problems, each with an adapter on a small Chebyshev KAN: values of a function, a Poisson equation, a family of fronts,
classes by cross-entropy. Starts: the zero core of a new adapter on a base that was fitted to another task; all cores
drawn with a standard deviation of 0.1 and 0.3, on a random base; a new adapter after another was merged; an adapter
that goes on from another task. Rivals: scipy's `least_squares`, "trf" and "lm", with the same Jacobian; L-BFGS with
strong Wolfe line search; SOAP, whose rate is chosen on a further start. All have the same seconds of the processor.
The command writes robust_fit.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from pde_least_squares import batch, residual_functions
from pdes import PDES
from peft import get_peft_model
from reporting import write_atomically
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, at_task, fit_gauss_newton
from peft_lotra.training.problem import Problem

STARTS = ("zero core", "cores at 0.1", "cores at 0.3", "merged", "second task")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of SOAP
FIRST_ITERATIONS = 10  # on another task


class Task(NamedTuple):
    """Arguments of `fit_gauss_newton`."""

    residual: Any
    data: Any
    loss: str = "least_squares"


def points(count: int, inputs: int) -> Tensor:
    return 2 * torch.rand(count, inputs, generator=torch.Generator().manual_seed(100), dtype=torch.float64) - 1


def values(other: bool) -> Task:
    x = points(1200, 2)
    y = torch.cos(3 * x[:, :1]) + x[:, 1:] if other else torch.sin(3 * x[:, :1]) * x[:, 1:]
    return Task(lambda net, data: net(data[0]) - data[1], (x, y))


def poisson(other: bool) -> Task:
    pde = PDES["elliptic"](1.0 if other else 1.3)
    drawn = pde.sample(torch.Generator().manual_seed(100), torch.device("cpu"), interior=500, per_side=25)
    return Task(residual_functions(pde), batch(pde, type(drawn)(*(part.double() for part in drawn))))


def fronts(other: bool) -> Task:
    x = points(1000, 3)
    y = torch.tanh((x[:, :1] - 0.5 * x[:, 2:] * x[:, 1:2]) / (0.4 if other else 0.2))

    def residual(net: Callable[..., Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return net(data[0][:, :2], lotra_task={"speed": data[0][:, 2]}) - data[1]

    return Task(residual, (x, y))


def classes(other: bool) -> Task:
    x = points(800, 2)
    turned = torch.atan2(x[:, 1], x[:, 0]) / torch.pi + x.norm(dim=1) * (2.0 if other else 1.5)
    labels = (turned * 1.5).floor().long() % 3
    wrong = (
        torch.rand(len(x), generator=torch.Generator().manual_seed(101)) < 0.2
    )  # no fit should reach a loss of zero
    labels = torch.where(wrong, (labels + 1) % 3, labels)
    return Task(lambda net, data: (net(data[0]), data[1]), (x, labels), "cross_entropy")


PROBLEMS: dict[str, tuple[Callable[[bool], Task], tuple[int, ...], Any]] = {
    "values": (values, (2, 12, 12, 1), {"r": [6, 6, 4]}),
    "poisson": (poisson, (2, 10, 10, 1), {"r": [5, 5, None]}),
    "fronts": (fronts, (2, 10, 10, 1), {"r": [4, 4, 4], "family": {"speed": (-1.0, 1.0)}, "family_degree": 3}),
    "classes": (classes, (2, 8, 8, 3), {"r": [4, 4, None]}),
}


def fitted(model: nn.Module, task: Task, iterations: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`data` give")
        fit_gauss_newton(
            model, task.residual, task.data, loss=task.loss, iterations=iterations, loss_tolerance=0, progressbar=False
        )


def started(problem: str, start: str, seed: int) -> nn.Module:
    """A model with an adapter, at this start."""
    make, widths, options = PROBLEMS[problem]
    torch.manual_seed(seed)
    config = LoTRAConfig(coefficients={"coefficients": "i o d"}, **options)
    base = ChebyshevKAN(widths, 5).double()
    if start == "zero core":
        task = make(True)
        if "family" in options:
            task = task._replace(residual=lambda net, data: net(data[0][:, :2]) - data[1])
        fitted(base, task, FIRST_ITERATIONS)
    model = get_peft_model(base, config).double()
    if start.startswith("cores"):
        for name, parameter in model.named_parameters():
            if "lotra_core" in name:
                nn.init.normal_(parameter, std=float(start.split()[-1]))
    if start in ("merged", "second task"):
        fitted(model, make(True), FIRST_ITERATIONS)
    if start == "merged":
        with at_task(model, speed=0.0) if "family" in options else nullcontext():
            base = model.merge_and_unload()
        model = get_peft_model(base, config).double()
    return model


class TimeOver(Exception):
    pass


class Run:
    """A fit for so many seconds of the processor: its lowest loss counts."""

    def __init__(self, model: nn.Module, task: Task, seconds: float) -> None:
        self.model, self.task, self.seconds, self.best = model, task, seconds, float("inf")
        self.problem = Problem(model, task.residual, task.loss, 0.0, 2**32, False)
        self.began = time.process_time()

    def see(self, loss: float) -> None:
        self.best = min(self.best, loss)
        if time.process_time() - self.began > self.seconds:
            raise TimeOver

    def ours(self) -> None:
        def callback(now: Any) -> bool:
            self.best = min(now.losses)
            return time.process_time() - self.began > self.seconds

        task = self.task
        fit_gauss_newton(
            self.model,
            task.residual,
            task.data,
            loss=task.loss,
            iterations=10**6,
            gradient_tolerance=0,
            loss_tolerance=0,
            progressbar=False,
            callback=callback,
        )

    def scipy(self, method: str) -> None:
        from scipy.optimize import least_squares

        def residuals(theta: Any) -> Any:
            found = self.problem.evaluate(torch.as_tensor(theta), self.task.data)
            self.see(found.loss.item())
            return found.residuals.numpy()

        def jacobian(theta: Any) -> Any:
            point = self.problem.evaluate(torch.as_tensor(theta), self.task.data)
            return torch.cat(list(self.problem.rows(point))).numpy()

        start = self.problem.parameters().numpy()
        tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
        least_squares(residuals, start, jacobian, method=method, max_nfev=10**6, **tolerances)

    def loss(self) -> Tensor:
        task = self.task
        kinds = task.residual if isinstance(task.residual, dict) else {"": task.residual}
        total = torch.zeros((), dtype=torch.float64)
        for name, function in kinds.items():
            found = function(self.model, task.data[name] if name else task.data)
            if task.loss == "cross_entropy":
                total = total + nn.functional.cross_entropy(*found)
            else:
                total = total + found.square().sum() / len(found)
        return total

    def torch(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        optimizer = make([p for p in self.model.parameters() if p.requires_grad])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.see(loss.item())
            return loss

        while True:
            optimizer.step(closure)

    def lbfgs(self) -> None:
        self.torch(
            lambda p: torch.optim.LBFGS(
                p, max_iter=10**6, history_size=50, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0
            )
        )

    def soap(self, rate: float) -> None:
        from pytorch_optimizer import SOAP

        self.torch(lambda p: SOAP(p, lr=rate, weight_decay=0.0))


METHODS: dict[str, Callable[..., None]] = {
    "ours": Run.ours,
    "trf": lambda run: run.scipy("trf"),
    "lm": lambda run: run.scipy("lm"),
    "L-BFGS": Run.lbfgs,
    "SOAP": Run.soap,
}


def final_loss(problem: str, start: str, seed: int, method: str, seconds: float, *options: float) -> float:
    task = PROBLEMS[problem][0](False)
    run = Run(started(problem, start, seed), task, seconds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            METHODS[method](run, *options)
        except TimeOver:
            pass
    return run.best


def methods_of(problem: str) -> list[str]:
    return [name for name in METHODS if problem != "classes" or name not in ("trf", "lm")]


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = []
    for problem in args.problems:
        tried = {rate: final_loss(problem, "zero core", 1000, "SOAP", args.seconds, rate) for rate in RATES}
        rate = min(tried, key=lambda rate: tried[rate])
        print(f"{problem}: SOAP's rate is {rate}", flush=True)
        for start, seed in product(args.starts, range(args.seeds)):
            losses = {
                name: final_loss(problem, start, seed, name, args.seconds, *([rate] if name == "SOAP" else []))
                for name in methods_of(problem)
            }
            rows.append({"problem": problem, "start": start, "seed": seed, "losses": losses})
            print(f"{problem}, {start}, {seed}: " + ", ".join(f"{k} {v:.1e}" for k, v in losses.items()), flush=True)
        print(summary([row for row in rows if row["problem"] == problem]))
    write_atomically(args.output_dir / "robust_fit.json", lambda path: path.write_text(json.dumps(rows) + "\n"))


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians of the final losses, and how far ours is from the best of the others at worst."""
    medians = {name: median(row["losses"][name] for row in rows) for name in rows[0]["losses"]}
    worst = max(
        row["losses"]["ours"] / min(value for name, value in row["losses"].items() if name != "ours") for row in rows
    )
    text = ", ".join(f"{name} {value:.1e}" for name, value in medians.items())
    return f"{rows[0]['problem']}: medians of {len(rows)} starts: {text}; at worst ours has {worst:.2g} × the best's"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    add("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="in quotes")
    add("--seeds", type=positive_int, default=6, help="of each start")
    add("--seconds", type=float, default=2.0, help="of the processor, for each fit")
    add("--output-dir", type=Path, default=Path("outputs/robust_fit"))
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"argument --seconds: should be above 0, got {args.seconds:g}")
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
