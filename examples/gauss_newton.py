"""Gauss–Newton or Adam, an adapter or everything: error over seconds on three PDEs.

    python examples/gauss_newton.py
    python examples/gauss_newton.py --families elliptic --seeds 1 --widths 32 64

A Chebyshev KAN that solves a PDE is fitted to another parameter of the PDE: by Adam and by Gauss–Newton with
Levenberg–Marquardt damping (LM, `peft_lotra.fit_gauss_newton`), each on an adapter of at most an eighth of the
coefficients and on all coefficients. A second table shows the cost of an iteration as the KAN gets wider. Every run is
stored when it ends; after an interruption, the same command goes on from there. The command prints tables, and writes
them as JSON, with a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from matplotlib.figure import Figure
from pde_least_squares import Mark, batch, fit, residual_functions
from pde_transfer import LEARNING_RATES, train, trained_base
from pdes import LINEAR, PDES, Points
from peft import get_peft_model
from pictures import COLOURS as MEANT
from pictures import OPTIMIZERS, band, by_step, plain_log
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig, fit_gauss_newton

# The optimizer and what it trains, in the order of the runs for one family and seed.
METHODS = ("adam adapter", "lm adapter", "adam all", "lm all")
# In the picture.
NAMES = dict(zip(METHODS, ("adapter, Adam", "adapter, LM", "everything, Adam", "everything, LM"), strict=True))
COLOURS = {method: MEANT["full" if method.endswith("all") else "adapter"] for method in METHODS}
STYLES = {method: OPTIMIZERS["LM" if method.startswith("lm") else "Adam"] for method in METHODS}
CLOCKS = {"seconds": "seconds", "cpu_seconds": "CPU seconds"}
# Nearly full ranks where a layer is narrow: 976 numbers for the 8,960 coefficients of width 32, a ninth.
RANKS = {"layers.0": (2, 8, 8), "layers.1": (4, 4, 4), "layers.2": (6, 1, 8)}


def attach(kan: nn.Module) -> nn.Module:
    return get_peft_model(kan, LoTRAConfig(coefficients={"coefficients": "i o d"}, rank_pattern=RANKS))


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stored(path: Path, compute: Callable[[], Any]) -> Any:
    """The contents of the file. If it does not exist, they are computed and written first."""
    if not path.exists():
        result = compute()
        write_atomically(path, lambda partial: partial.write_text(json.dumps(result) + "\n"))
    return json.loads(path.read_text())


def run(args: argparse.Namespace, family: str, seed: int, method: str) -> dict[str, Any]:
    """One fit: {"numbers": the number of trained parameters, "marks": the course of the error}."""
    source, target = PDES[family](PDES[family].base_parameter), PDES[family](PDES[family].target_parameter)
    grid, (optimizer, part) = target.grid(), method.split()
    base = argparse.Namespace(**vars(args), pde=family, kan="chebyshev", seed=seed, device="cpu")
    kan = trained_base(base, source, grid)()
    torch.manual_seed(seed + 1)  # of the factors
    model = attach(kan) if part == "adapter" else kan
    label = f"{family}, seed {seed}, {method}"
    if optimizer == "lm":
        marks = fit(model.to(args.dtype), target, args.lm_steps, seed + 1, grid, label)
    else:
        rate = LEARNING_RATES["chebyshev"]["full" if part == "all" else "lotra"]
        start = time.process_time()
        course, seconds = train(model, target, args.steps, rate, seed + 1, grid, label)
        cpu_seconds = time.process_time() - start
        # Every step costs the same.
        marks = [Mark(k, seconds * k / args.steps, cpu_seconds * k / args.steps, error) for k, error in course]
    return {"numbers": trainable(model), "marks": marks}


def cost(width: int, part: str, dtype: torch.dtype, answer: Connection) -> None:
    """Send the seconds of an iteration (the faster of two), and how far the memory of the process rises."""
    target = PDES["elliptic"](1.3)
    torch.manual_seed(0)
    # Only the time of the two iterations matters.
    warnings.filterwarnings("ignore", ".*fitted by heart", UserWarning)
    kan = ChebyshevKAN((2, width, width, 1))
    model = (attach(kan) if part == "adapter" else kan).to(dtype)

    def fit_points(interior: int, per_side: int, iterations: int) -> list[float]:
        points = target.sample(torch.Generator().manual_seed(0), interior=interior, per_side=per_side)
        times = [time.process_time()]
        fit_gauss_newton(
            model,
            residual_functions(target),
            batch(target, Points(*(x.to(dtype) for x in points))),
            iterations=iterations,
            progressbar=False,
            callback=lambda result: times.append(time.process_time()),
        )
        return [end - start for start, end in pairwise(times)]

    fit_points(4, 1, 1)  # what torch loads and allocates once
    before = psutil.Process().memory_info().rss
    seconds = min(fit_points(1000, 80, 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    answer.send({"numbers": trainable(model), "seconds": seconds, "megabytes": max(0.0, peak - before) / 1e6})


def first_time(marks: list[Mark], error: float, clock: str) -> float:
    """The time when the error was first at most `error`; infinity if it never was."""
    return next((getattr(mark, clock) for mark in marks if mark.error <= error), math.inf)


def finite_or_none(number: float) -> float | None:
    """The number, or None if it is infinite, because JSON has no infinity."""
    return number if math.isfinite(number) else None


def summarise(runs: dict[str, list[dict[str, Any]]], clock: str) -> dict[str, Any]:
    """Medians over the seeds for one family, and the comparisons of LM on the adapter with Adam."""
    marks = {method: [[Mark(*mark) for mark in one["marks"]] for one in runs[method]] for method in METHODS}
    rows = {
        method: {
            "numbers": runs[method][0]["numbers"],
            "error": median(course[-1].error for course in marks[method]),
            "seconds": median(getattr(course[-1], clock) for course in marks[method]),
        }
        for method in METHODS
    }
    comparisons = {}
    for other in ("adam adapter", "adam all"):
        pairs = list(zip(marks["lm adapter"], marks[other], strict=True))
        comparisons[other] = {
            "time to its final error / its seconds": finite_or_none(
                median(
                    first_time(ours, theirs[-1].error, clock) / getattr(theirs[-1], clock) for ours, theirs in pairs
                )
            ),
            "final error / its final error": rows["lm adapter"]["error"] / rows[other]["error"],
        }
    return {"rows": rows, "lm adapter against": comparisons}


def print_summary(family: str, summary: dict[str, Any]) -> None:
    print(f"\n{family:<18}{'trained':>9}{'rel. L2 error':>16}{'seconds':>10}")
    for method, row in summary["rows"].items():
        print(f"{method:<18}{row['numbers']:>9,}{row['error']:>16.2e}{row['seconds']:>10.1f}")
    for other, values in summary["lm adapter against"].items():
        reached, final = values.values()
        reached = "does not reach" if reached is None else f"needs {reached:.2f} × its seconds to reach"
        print(f"LM on the adapter {reached} the error of {other}, and ends at {final:.2f} × that error")


def draw(runs: dict[str, dict[str, list[dict[str, Any]]]], costs: list[dict[str, Any]], clock: str) -> Figure:
    """Error over time for each family, medians over the seeds with their range; the time of an iteration."""
    rows = 1 if len(runs) == 1 else 2
    columns = -(-(len(runs) + 1) // rows)
    figure = Figure(figsize=(4.4 * columns, 1 + 3.1 * rows), layout="constrained")
    figure.suptitle("A KAN that solves one PDE, fitted to another: Gauss–Newton (LM) and Adam")
    panels = list(figure.subplots(rows, columns).flat)
    for ax, (family, of_family) in zip(panels, runs.items(), strict=False):
        for method, of_method in of_family.items():
            marks = [[Mark(*mark) for mark in one["marks"]] for one in of_method]
            courses = [[(mark.step, getattr(mark, clock), mark.error) for mark in of_seed] for of_seed in marks]
            label = f"{NAMES[method]} ({of_method[0]['numbers']:,} numbers at width 32)"
            band(ax, *by_step(courses), label, COLOURS[method], STYLES[method])
        ax.set(title=PDES[family].title, xlabel=CLOCKS[clock], ylabel="relative L2 error", yscale="log")
        plain_log(ax.yaxis)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    last = panels[-1]
    for part in ("adapter", "all"):
        of_part = [row for row in costs if row["part"] == part]
        x, y = [row["width"] for row in of_part], [row["seconds"] for row in of_part]
        last.loglog(x, y, "o-", color=COLOURS[f"lm {part}"], ms=4)
    last.set(title="One iteration of LM", xlabel="width of the KAN", ylabel="CPU seconds")
    plain_log(last.yaxis)
    widths = sorted({row["width"] for row in costs})
    last.set_xticks(widths, labels=map(str, widths))
    last.minorticks_off()
    for ax in panels:
        ax.grid(alpha=0.3)
    for ax in panels[len(runs) : -1]:
        ax.axis("off")
    return figure


def main_table(args: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by family and method, one for each seed. They run seed by seed, so that compared runs are close in time."""
    runs = {family: {method: [] for method in METHODS} for family in args.families}
    for seed in range(args.seeds):
        for family in args.families:
            for method in METHODS:
                steps = args.lm_steps if method.startswith("lm") else args.steps
                name = f"{family}_{method.replace(' ', '_')}_seed{seed}_{steps}steps_base{args.base_steps}"
                path = args.output_dir / f"{name}{'_fp64' if args.dtype == torch.float64 else ''}.json"
                one = stored(path, lambda f=family, s=seed, m=method: run(args, f, s, m))
                runs[family][method].append(one)
    return runs


def width_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    context, rows = multiprocessing.get_context("spawn"), []
    for width in args.widths:
        for part in ("adapter", "all"):

            def measured(width: int = width, part: str = part) -> dict[str, Any]:
                # Each case has its own process, because the peak of a process is that of its whole life.
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=cost, args=(width, part, args.dtype, sender))
                process.start()
                sender.close()
                try:
                    return receiver.recv()
                except EOFError:
                    raise SystemExit(f"Width {width}, LM on {part}: the process ended early; out of memory?") from None
                finally:
                    process.join()

            name = f"width{width}_{part}{'_fp64' if args.dtype == torch.float64 else ''}.json"
            rows.append({"width": width, "part": part, **stored(args.output_dir / name, measured)})
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--families", nargs="+", choices=list(PDES), default=LINEAR, help="families of PDEs")
    add("--seeds", type=positive_int, default=3, help="number of seeds, of base, factors and points")
    add("--steps", type=positive_int, default=2000, help="steps of Adam")
    add("--lm-steps", type=positive_int, default=50, help="iterations of Levenberg–Marquardt")
    add("--base-steps", type=positive_int, default=1500, help="steps of Adam that train the base")
    add("--widths", type=positive_int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="of the second table")
    add("--dtype", choices=["float32", "float64"], default="float32", help="of the model under Levenberg–Marquardt")
    add("--clock", choices=["seconds", "cpu_seconds"], default="seconds", help="cpu_seconds on a shared machine")
    add("--output-dir", type=Path, default=Path("outputs/gauss_newton"), help="where everything is written")
    args = parser.parse_args(argv)
    if min(args.widths) < max(max(ranks) for ranks in RANKS.values()):
        parser.error(f"argument --widths: should be at least 8, the highest rank, got {min(args.widths)}")
    args.families, args.widths = list(dict.fromkeys(args.families)), sorted(set(args.widths))
    args.dtype = getattr(torch, args.dtype)
    make_output_dir(parser, args)
    return args


def study(args: argparse.Namespace) -> None:
    runs = main_table(args)
    summaries = {family: summarise(of_family, args.clock) for family, of_family in runs.items()}
    for family, summary in summaries.items():
        print_summary(family, summary)
    costs = width_table(args)
    print(f"\n{'width':>6} {'LM on':<8}{'trained':>9}{'s / iteration':>15}{'MB':>9}")
    for row in costs:
        print("{width:>6} {part:<8}{numbers:>9,}{seconds:>15.2f}{megabytes:>9.0f}".format(**row))
    settings = {
        key: str(value) if isinstance(value, Path | torch.dtype) else value for key, value in vars(args).items()
    }
    record = {"settings": settings, "families": summaries, "widths": costs, "runs": runs}
    path = args.output_dir / "gauss_newton.json"
    write_atomically(path, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    figure = draw(runs, costs, args.clock)
    write_atomically(path.with_suffix(".png"), lambda partial: figure.savefig(partial, dpi=90, format="png"))
    print(f"\nWritten: {path.with_suffix('.png')}, .json")


def main(argv: list[str] | None = None) -> int:
    return exit_code(
        lambda: study(parse_arguments(argv)),
        "The runs that were done are stored; the same command goes on from there.",
    )


if __name__ == "__main__":
    sys.exit(main())
