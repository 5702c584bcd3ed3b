"""One adapter for a family of tasks beside other ways to solve its tasks: runs what is not there yet.

    python examples/method_comparison/families.py
    python examples/method_comparison/families.py --cases front --seeds 0
    python examples/method_comparison/families.py --smoke

Every case, method and seed is a line of results/families.jsonl, and what several methods need a file below outputs/:
stop it when you like, the same command goes on.
Tables and pictures come from `report.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # modules of the other examples
sys.path.append(str(HERE.parent / "benchmarks"))
from family_methods import ALL_TASKS, METHODS, SEPARATE, SMOKE, Lab, Result, Sizes  # noqa: E402
from family_tasks import ALL_CASES, CASES  # noqa: E402
from jobs import Job, Line, do_missing, environment, new_arguments, place, read_lines, rounded  # noqa: E402
from version import version  # noqa: E402


def as_line(lab: Lab, result: Result) -> Line:
    """A result as JSON has it; errors that are not finite are None."""

    def mark(step: int, seconds: float, error: float) -> list[float | None]:
        return [step, rounded(seconds), rounded(error) if error < float("inf") else None]

    case = lab.case
    return {
        "numbers": {"offline": result.offline_numbers, "online": result.online_numbers},
        "offline_seconds": rounded(result.offline_seconds),
        "tasks": [
            {"parameters": values, "inside": values in case.held_out(), "marks": [mark(*m) for m in marks]}
            for values, marks in result.tasks
        ],
        "details": result.details,
        "settings": {
            "ranges": case.ranges, "base": case.base, "base_by": case.base_by, "ranks": case.ranks,
            "degree": case.degree, "kan": case.kan, "dtype": str(case.dtype), **asdict(lab.sizes), "width": lab.width,
        },
        "version": version("family_methods"),
        "environment": environment(),
    }  # fmt: skip


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """In the order of the command line, methods innermost."""
    sizes = SMOKE if args.smoke else Sizes()

    def compute(name: str, method: str, seed: int) -> Line:
        lab, further = Lab(name, ALL_CASES[name], seed, sizes, args.outputs), {}
        if method in ALL_TASKS:
            names = {"case": name, "method": "family", "seed": seed}
            family = [line for line in read_lines(args.results) if names.items() <= line.items()]
            if not family:
                raise SystemExit(f"{method!r} takes the seconds of 'family', which is not there: add it to --methods")
            further["budget"] = family[0]["offline_seconds"]
        return as_line(lab, METHODS[method](lab, **further))

    for seed in args.seeds:
        for name in args.cases:
            for method in args.methods:
                if ALL_CASES[name].separate or method not in SEPARATE:
                    yield {"case": name, "method": method, "seed": seed}, partial(compute, name, method, seed)


def main(argv: list[str] | None = None) -> int:
    parser = new_arguments(__doc__, "families", METHODS)
    parser.add_argument("--cases", nargs="+", choices=list(ALL_CASES), default=list(CASES), help="families of tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of base, factors and points")
    args = parser.parse_args(argv)
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 2**31]:
        parser.error(f"argument --seeds: should be in [0, 2**31 − 1], got {wrong[0]}")
    if args.smoke:
        args.seeds = args.seeds[:1]
    place(args, "families")
    return do_missing(args.results, lambda: jobs(args), stored=args.stored)


if __name__ == "__main__":
    sys.exit(main())
