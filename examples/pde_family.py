"""Solve a whole family of PDEs with one adapter, and a new member of it by a few iterations on the adapter's core.

    python examples/pde_family.py --pde elliptic
    python examples/pde_family.py --pde hyperbolic
    python examples/pde_family.py --frozen

The command trains a base at one parameter (or loads the base of an earlier run). It fits the base and one LoTRA
adapter together to the whole range, by Gauss–Newton with Levenberg–Marquardt damping, on points and parameters that
are drawn together. Then the base is frozen, and written beside the adapter; with --frozen, it stays as it was. The
command prints the adapter's errors at parameters that it never saw, as it is and after 1, 2 and 5 iterations on the
core alone. For comparison, it trains for one parameter, by the same optimizer, an adapter from the first base, and a
KAN of the adapter's size from scratch. It writes the adapter, a table as JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, new_parser, positive_int, training_arguments
from matplotlib.figure import Figure
from pde_least_squares import GROWTH, batch, fit, residual_functions
from pde_transfer import trained_base
from pdes import PDE, PDES
from peft import PeftModel, get_peft_model
from pictures import COLOURS, OPTIMIZERS, band, by_step, plain_log
from reporting import write_atomically
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, adapter_at, at_task, base_state_dict, fit_gauss_newton

RANGES = {"elliptic": (1.0, 1.6), "parabolic": (1.0, 2.0), "hyperbolic": (2.0, 3.0)}
RANKS = (6, 6, 6)
# Points of an iteration, (interior, per side), and by which factor they grow in the last fifth of the iterations. Fits
# of the base as well have four times as many numbers, and so fewer points, to take as long.
POINTS = {False: (1000, 80, GROWTH), True: (700, 50, 2)}
DEGREE = 4  # of the polynomials in the parameter
CORE_ITERATIONS = (1, 2, 5)
TASK_ITERATIONS = 24  # of what is fitted to one parameter alone; the last fifth takes more points
COEFFICIENTS = {"coefficients": "i o d"}


def family_residuals(model: nn.Module, family: type[PDE]) -> dict[str, Callable[[Any, Any], Tensor]]:
    """The same as `residual_functions`, for batches that have a parameter for every point."""

    def at(function: Callable[[PDE], Callable[..., Tensor]]) -> Callable[[Any, Any], Tensor]:
        def residual(net: Any, part: tuple[Tensor, Tensor]) -> Tensor:
            points, parameter = part
            with at_task(model, parameter=parameter):
                return function(family(parameter))(net, points)

        return residual

    names = residual_functions(family(family.base_parameter))
    return {name: at(lambda pde, name=name: residual_functions(pde)[name]) for name in names}


def family_points(
    family: type[PDE],
    bounds: tuple[float, float],
    seed: int,
    device: str,
    sizes: tuple[int, int, int] = POINTS[False],
    grows_at: float = math.inf,
) -> Callable[[int], dict[str, tuple[Tensor, Tensor]]]:
    """Fresh points for each kind of residual, with a parameter drawn for each point.

    An iteration learns a few points by heart, which is cheap and good enough at first. More points average this out.

    Args:
        sizes: of interior points, of points per side, and the factor of their growth.
        grows_at: the iteration from which on there are more points.
    """
    interior, per_side, growth = sizes

    def fresh(iteration: int) -> dict[str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * iteration)
        times = growth if iteration >= grows_at else 1
        points = family(bounds[0]).sample(generator, "cpu", times * interior, times * per_side)
        parts = batch(family(bounds[0]), points)
        low, high = bounds
        return {
            name: (part.to(device), (low + (high - low) * torch.rand(len(part), 1, generator=generator)).to(device))
            for name, part in parts.items()
        }

    return fresh


def course(
    model: nn.Module, pde: PDE, iterations: int, seed: int, grid: Tensor, label: str, grows_at: float = math.inf
) -> list[tuple[float, float]]:
    """(CPU seconds, error) at the start and after every iteration on the trainable parameters."""
    marks = fit(model, pde, iterations, seed, grid, label, grows_at=grows_at)
    return [(mark.cpu_seconds, mark.error) for mark in marks]


def run(args: argparse.Namespace) -> None:
    family, bounds = PDES[args.pde], RANGES[args.pde]
    source = family(family.base_parameter)
    grid = source.grid().to(args.device)
    load_base = trained_base(args, source, grid)

    config = LoTRAConfig(r=RANKS, coefficients=COEFFICIENTS, family={"parameter": bounds}, family_degree=DEGREE)
    model = get_peft_model(load_base(), config)
    if not args.frozen:
        model.requires_grad_(True)
    numbers = model.get_nb_trainable_parameters()[0]
    print(f"Family: {family.title}, {family.symbol} in {list(bounds)}; {numbers:,} numbers")
    start = time.process_time()
    result = fit_gauss_newton(
        model,
        family_residuals(model, family),
        family_points(family, bounds, args.seed + 1, args.device, POINTS[not args.frozen], 0.8 * args.iterations),
        iterations=args.iterations,
        loss_tolerance=0,
    )
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    offline = time.process_time() - start
    name = f"{args.pde}_frozen" if args.frozen else f"{args.pde}_family"
    if not args.frozen:
        model.requires_grad_(False)
        write_atomically(args.output_dir / f"{name}_base.pt", lambda path: torch.save(base_state_dict(model), path))
    model.save_pretrained(args.output_dir / name)

    low, high = bounds
    parameters = [round(low + (high - low) * (k + 0.5) / args.parameters, 4) for k in range(args.parameters)]
    compared = parameters[:: max(1, len(parameters) // args.compared)][: args.compared]
    rows = []
    for k, parameter in enumerate(parameters):
        pde = family(parameter)
        adapter_at(model, "task", parameter=parameter)
        core = sum(p.numel() for p in model.parameters() if p.requires_grad)
        marks = course(model, pde, max(CORE_ITERATIONS), args.seed + 2 + k, grid, "core")
        model.set_adapter("default")
        model.delete_adapter("task")
        row: dict[str, Any] = {"parameter": parameter, "family": marks, "core": core}
        if parameter in compared:
            row |= separate(args, load_base, pde, args.seed + 2 + k, grid)
        rows.append(row)
        print(format_row(family, row))
    report(args, family, bounds, rows, numbers, offline, name)


def separate(
    args: argparse.Namespace, load_base: Callable[[], nn.Module], pde: PDE, seed: int, grid: Tensor
) -> dict[str, Any]:
    """For this parameter alone, by LM: an adapter with a tenth of the numbers, and as small a KAN from scratch."""
    iterations = min(TASK_ITERATIONS, args.iterations)
    adapted: PeftModel = get_peft_model(load_base(), LoTRAConfig(compression_ratio=0.1, coefficients=COEFFICIENTS))
    torch.manual_seed(args.seed)
    models = {"LoTRA alone": adapted, "small KAN": ChebyshevKAN((2, 9, 9, 1), degree=7).to(args.device)}
    return {
        label: course(model, pde, iterations, seed, grid, label, 0.8 * iterations) for label, model in models.items()
    }


def format_row(family: type[PDE], row: dict[str, Any]) -> str:
    marks = row["family"]
    text = f"{family.symbol} = {row['parameter']:.3f}: family {marks[0][1]:.1e}, core after "
    text += ", ".join(f"{k}: {marks[min(k, len(marks) - 1)][1]:.1e}" for k in CORE_ITERATIONS)
    text += f" ({marks[-1][0]:.1f} s)"
    for label in ("LoTRA alone", "small KAN"):
        if label in row:
            text += f"; {label} {row[label][-1][1]:.1e} ({row[label][-1][0]:.1f} s)"
    return text


def report(
    args: argparse.Namespace,
    family: type[PDE],
    bounds: tuple[float, float],
    rows: list[dict[str, Any]],
    numbers: int,
    offline: float,
    label: str,
) -> None:
    zero_shot = median(row["family"][0][1] for row in rows)
    cores = median(row["family"][-1][1] for row in rows)
    print(
        f"\nMedians over {len(rows)} parameters never trained on ({numbers:,} numbers, {offline:.0f} CPU s offline):"
    )
    print(f"  family as it is {zero_shot:.1e}; after {max(CORE_ITERATIONS)} iterations on its core {cores:.1e}")
    for method in ("LoTRA alone", "small KAN"):
        found = [row[method][-1] for row in rows if method in row]
        if found:
            print(f"  {method}: {median(e for _, e in found):.1e} in {median(s for s, _ in found):.1f} CPU s each")
    record = {"pde": args.pde, "range": bounds, "numbers": numbers, "offline_seconds": offline, "rows": rows}
    name = args.output_dir / label
    write_atomically(name.with_suffix(".json"), lambda p: p.write_text(json.dumps(record) + "\n"))
    figure = draw(family, bounds, rows)
    write_atomically(name.with_suffix(".png"), lambda p: figure.savefig(p, dpi=120, format="png"))
    print(f"Written: {name}.png, .json, and the adapter {name}/")


def numbered(marks: list[tuple[float, float]]) -> list[tuple[int, float, float]]:
    return [(k, seconds, error) for k, (seconds, error) in enumerate(marks)]


def draw(family: type[PDE], bounds: tuple[float, float], rows: list[dict[str, Any]]) -> Figure:
    """The error over the parameter, and over seconds for the parameters that were compared."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    parameters = [row["parameter"] for row in rows]
    as_it_is, fitted = ([row["family"][k][1] for row in rows] for k in (0, -1))
    left.plot(parameters, as_it_is, "o-", color=COLOURS["family"], label="family, as it is")
    left.plot(parameters, fitted, "s-", color=COLOURS["core"], label="its core, 5 iterations of LM")
    styles = {
        "LoTRA alone": ("^", COLOURS["adapter"], "an adapter from the base, LM", OPTIMIZERS["LM"]),
        "small KAN": ("v", COLOURS["scratch"], "a small KAN from scratch, LM", OPTIMIZERS["LM"]),
    }
    for label, (marker, color, name, line) in styles.items():
        found = [row for row in rows if label in row]
        left.plot([r["parameter"] for r in found], [r[label][-1][1] for r in found], marker, color=color, label=name)
        if found:
            band(right, *by_step([numbered(row[label]) for row in found]), name, color, line)
    compared = [numbered(row["family"]) for row in rows if "LoTRA alone" in row]
    band(right, *by_step(compared), "its core", COLOURS["core"], ".-")
    left.set(title=f"{family.title}: one adapter for all {family.symbol}", xlabel=family.symbol, yscale="log")
    left.set(ylabel="relative L2 error", xlim=bounds)
    count = f", medians of {len(compared)} with their range" if len(compared) > 1 else ""
    right.set(
        title=f"A new {family.symbol}{count}", xlabel="CPU seconds for it", ylabel="relative L2 error", yscale="log"
    )
    for axes in (left, right):
        plain_log(axes.yaxis)
        axes.grid(alpha=0.3)
    figure.legend(handles=left.get_lines()[: 2 + len(styles)], loc="outside lower center", ncols=4)
    return figure


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pde", choices=list(RANGES), default="elliptic", help="family of PDEs")
    add("--iterations", type=positive_int, default=60, help="of the fit to the whole family")
    add("--parameters", type=positive_int, default=10, help="at which errors are measured")
    add("--compared", type=positive_int, default=1, help="of them, at which the other methods run too")
    add("--base-steps", type=positive_int, default=600, help="Adam steps of the base")
    add("--frozen", action="store_true", help="fit the adapter alone, on the base as it is")
    return training_arguments(parser, argv, "pde_family", kan="chebyshev")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_code(lambda: run(args), f"The base, if trained, is kept in {args.output_dir}.")


if __name__ == "__main__":
    sys.exit(main())
