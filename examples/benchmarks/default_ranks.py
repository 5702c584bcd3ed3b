"""Default ranks beside a tenth of the coefficients in all cases: numbers, and errors after the same fit.

    python examples/benchmarks/default_ranks.py

A small layer has no rank to spare: a tenth of a KAN [2, 8, 8, 1] is rank 1. `LoTRAConfig()` therefore takes a tenth,
but at least (4, 4, whole) in each layer. Cases: a pykan model and Chebyshev KANs of three widths from values of one
function to another, a Poisson equation (both by `fit_gauss_newton`), and digits turned by 30° (Adam). Errors are
medians over seeds. The command writes default_ranks.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from few_labels import Part, accuracy, adam, digits
from pde_least_squares import batch, residual_functions
from pdes import PDES, relative_l2_error
from peft import get_peft_model
from reporting import write_atomically
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, fit_gauss_newton

OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "a tenth": {"compression_ratio": 0.1}}
COEFFICIENTS = {"coefficients": "i o d"}


class Case(NamedTuple):
    """A base that was fitted to one task, how an adapter is fitted to another, and its error there."""

    base: nn.Module
    fit: Callable[[nn.Module], object]
    error: Callable[[nn.Module], float]
    coefficients: dict[str, str] = {}


def least_squares(model: nn.Module, residual: Any, data: Any, iterations: int = 30) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`data` give")
        fit_gauss_newton(model, residual, data, iterations=iterations, progressbar=False)


def regression(base: nn.Module, coefficients: dict[str, str], seed: int) -> Case:
    source = torch.Generator().manual_seed(seed)
    x, grid = (2 * torch.rand(1500, 2, generator=source, dtype=torch.float64) - 1 for _ in range(2))

    def before(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(3 * x[:, :1]) + x[:, 1:] ** 2)

    def after(x: Tensor) -> Tensor:
        return torch.exp(torch.sin(4 * x[:, :1]) + 0.8 * x[:, 1:] ** 2)

    def residual(net: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return net(data[0]) - data[1]

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return ((model(grid) - after(grid)).norm() / after(grid).norm()).item()

    least_squares(base, residual, (x, before(x)))
    return Case(base, lambda model: least_squares(model, residual, (x, after(x))), error, coefficients)


def pykan(seed: int) -> Case:
    from kan import KAN

    model = KAN([2, 8, 8, 1], grid=5, k=3, seed=seed, auto_save=False, symbolic_enabled=False).double()
    model.speed()
    return regression(model, {}, seed)


def chebyshev(width: int, seed: int) -> Case:
    torch.manual_seed(seed)
    return regression(ChebyshevKAN((2, width, width, 1), 5).double(), COEFFICIENTS, seed)


def poisson(width: int, seed: int) -> Case:
    torch.manual_seed(seed)
    base, cpu = ChebyshevKAN((2, width, width, 1), 7).double(), torch.device("cpu")

    def fit(model: nn.Module, parameter: float) -> None:
        pde = PDES["elliptic"](parameter)

        def points(iteration: int) -> dict[str, Tensor]:
            drawn = pde.sample(torch.Generator().manual_seed(1000 * seed + iteration), cpu, interior=600, per_side=40)
            return batch(pde, type(drawn)(*(part.double() for part in drawn)))

        least_squares(model, residual_functions(pde), points, 20)

    fit(base, 1.0)
    other = PDES["elliptic"](1.3)
    grid = other.grid().double()
    return Case(base, lambda model: fit(model, 1.3), lambda model: relative_l2_error(model, other, grid), COEFFICIENTS)


def turned_digits(seed: int) -> Case:
    upright, turned = digits(0), digits(30)
    order = torch.randperm(len(upright[1]), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1000], order[1000:]

    def rows(part: Part, chosen: Tensor) -> Part:
        return part[0][chosen], part[1][chosen]

    torch.manual_seed(seed)
    base = ChebyshevKAN((64, 32, 10), 4)
    adam(base, rows(upright, train), 3e-3, seed)
    return Case(
        base,
        lambda model: adam(model, rows(turned, train), 1e-2, seed),
        lambda model: 1 - accuracy(model, rows(turned, test)),
        COEFFICIENTS,
    )


CASES: dict[str, Callable[[int], Case]] = {
    "pykan [2, 8, 8, 1]": pykan,
    **{f"Chebyshev [2, {w}, {w}, 1], values": lambda seed, w=w: chebyshev(w, seed) for w in (8, 16, 32)},
    **{f"Chebyshev [2, {w}, {w}, 1], Poisson": lambda seed, w=w: poisson(w, seed) for w in (8, 16, 32)},
    "Chebyshev [64, 32, 10], digits": turned_digits,
}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = []
    for name in args.cases:
        found: dict[str, list[tuple[int, float, float]]] = {option: [] for option in OPTIONS}
        for seed in range(args.seeds):
            for option, values in OPTIONS.items():
                case = CASES[name](seed)
                torch.manual_seed(seed)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "the adapter has")
                    model = get_peft_model(case.base, LoTRAConfig(coefficients=case.coefficients, **values))
                numbers, total = model.get_nb_trainable_parameters()
                case.fit(model)
                found[option].append((numbers, numbers / (total - numbers), case.error(model)))
        row = {"case": name} | {
            option: {"numbers": values[0][0], "share": values[0][1], "error": median(v[2] for v in values)}
            for option, values in found.items()
        }
        rows.append(row)
        of = [f"{o} {row[o]['numbers']:,} ({row[o]['share']:.0%} of the base) {row[o]['error']:.2g}" for o in OPTIONS]
        print(f"{name}: " + "; ".join(of), flush=True)
    write_atomically(args.output_dir / "default_ranks.json", lambda path: path.write_text(json.dumps(rows) + "\n"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="in quotes")
    add("--seeds", type=positive_int, default=3)
    add("--output-dir", type=Path, default=Path("outputs/default_ranks"))
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
