"""Adapters at two parameters of a PDE, combined to one for the parameter between them.

    python examples/interpolation.py
    python examples/interpolation.py --optimizer adam --seeds 1

The base solves the elliptic problem at λ = 1. Adapters are trained at λ = 1.2 and at λ = 1.6. The second one starts
from random factors, or from the end of the first. `add_weighted_adapter` takes their mean for λ = 1.4. For comparison,
the table has the base, each adapter alone, an adapter trained at λ = 1.4, and a few steps from the mean and as many
from the base. The command prints medians over the seeds, and writes all errors as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import torch
from command_line import exit_code, make_output_dir, new_parser, positive_int
from pde_transfer import STEPS, adapt, attach_lotra, trained_base
from pdes import PDES, relative_l2_error
from peft import PeftModel
from reporting import write_atomically
from torch import Tensor

LEFT, MIDDLE, RIGHT = 1.2, 1.4, 1.6


def run(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """The relative L2 error at the middle parameter for each row of the table."""
    family = PDES["elliptic"]
    settings = argparse.Namespace(
        **vars(args) | {"pde": "elliptic", "kan": "chebyshev", "seed": seed, "device": "cpu"}
    )
    grid = family(MIDDLE).grid()
    load = trained_base(settings, family(family.base_parameter), grid)

    def error(model: PeftModel, adapter: str) -> float:
        model.set_adapter(adapter)
        return relative_l2_error(model, family(MIDDLE), grid)

    def fit(model: PeftModel, adapter: str, parameter: float, steps: int, grid: Tensor = grid) -> None:
        model.set_adapter(adapter)
        short = argparse.Namespace(**vars(settings) | {"steps": steps})
        adapt(short, model, family(parameter), "lotra", grid)

    torch.manual_seed(seed + 1)  # of the factors
    model = attach_lotra(load(), args.r, None)
    config = model.peft_config["default"]
    names = ("left", "right", "middle", "few steps")
    for name in names:
        model.add_adapter(name, config)
    found = {"base (zero-shot)": error(model, "default")}
    fit(model, "left", LEFT, args.steps)
    fit(model, "right", RIGHT, args.steps)
    model.add_weighted_adapter(["left"], [1.0], "continued", "cat")
    fit(model, "continued", RIGHT, args.steps)
    for name, label in {
        "left": f"λ = {LEFT}",
        "right": f"λ = {RIGHT}",
        "continued": f"λ = {RIGHT} from {LEFT}",
    }.items():
        found[f"adapter of {label}"] = error(model, name)
    for right, label in {"right": "separate", "continued": "one from the other"}.items():
        model.add_weighted_adapter(["left", right], [0.5, 0.5], f"mean, {right}", "cat")
        found[f"mean of both, {label}"] = error(model, f"mean, {right}")
    model.add_weighted_adapter(["left", "continued"], [0.5, 0.5], "svd", "svd", svd_rank=tuple(args.r))
    found["the same at the ranks of one"] = error(model, "svd")
    few = max(1, args.steps // 10)
    fit(model, "svd", MIDDLE, few)
    found[f"the same and {few} steps at λ = {MIDDLE}"] = error(model, "svd")
    fit(model, "few steps", MIDDLE, few)
    found[f"{few} steps at λ = {MIDDLE} from the base"] = error(model, "few steps")
    fit(model, "middle", MIDDLE, args.steps)
    found[f"{args.steps} steps at λ = {MIDDLE} from the base"] = error(model, "middle")
    return found


def report(args: argparse.Namespace) -> None:
    runs = [run(args, seed) for seed in range(args.seeds)]
    print(f"\nRelative L2 error at λ = {MIDDLE}, {args.optimizer}, ranks {tuple(args.r)}; median of {args.seeds}\n")
    for row in runs[0]:
        errors = [found[row] for found in runs]
        print(f"{row:36} {median(errors):.1e}   ({min(errors):.1e} … {max(errors):.1e})")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    path = args.output_dir / f"interpolation_{args.optimizer}.json"
    write_atomically(path, lambda p: p.write_text(json.dumps({"settings": settings, "errors": runs}, indent=1) + "\n"))
    print(f"\nWritten: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--optimizer", choices=list(STEPS), default="lm", help="Adam, or Levenberg–Marquardt")
    add("--steps", type=positive_int, help=f"training steps of an adapter; default: {STEPS}")
    add("--r", type=positive_int, nargs=3, default=[6, 6, 6], help="Tucker ranks: input output basis")
    add("--seeds", type=positive_int, default=3, help="of bases, factors and points")
    add("--base-steps", type=positive_int, default=1500, help="training steps of the base")
    add("--output-dir", type=Path, default=Path("outputs/pde_transfer"), help="that of pde_transfer.py")
    args = parser.parse_args(argv)
    args.steps = args.steps or STEPS[args.optimizer]
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: report(parse_arguments(argv)), "The bases that were done will be used again.")


if __name__ == "__main__":
    sys.exit(main())
