"""One adapter for a family of tasks beside other ways to solve its tasks: runs what is not there yet, and reports it.

    python examples/method_comparison/families.py
    python examples/method_comparison/families.py --cases front advection --seeds 0
    python examples/method_comparison/families.py report
    python examples/method_comparison/families.py --smoke

Every case, method and seed is a line of results/families.jsonl, and what several methods need a file below outputs/:
stop it when you like, the same command goes on. `report` writes families.md between its markers, and its pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # modules of the other examples
sys.path.append(str(HERE.parent / "benchmarks"))
from command_line import exit_code, new_parser  # noqa: E402
from family_methods import ALL_TASKS, METHODS, SEPARATE, SMOKE, Lab, Result, Sizes  # noqa: E402
from family_report import report  # noqa: E402
from family_tasks import CASES  # noqa: E402
from reporting import write_atomically  # noqa: E402

Line = dict[str, Any]
Job = Callable[[argparse.Namespace], None]


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_line(path: Path, line: Line) -> None:
    lines = [*read_lines(path), line]  # another process may have added lines
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(text))


def key(line: Line) -> tuple[str, str, int]:
    return line["case"], line["method"], line["seed"]


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def as_line(lab: Lab, method: str, result: Result) -> Line:
    """A result as JSON has it; errors that are not finite are None."""

    def mark(step: int, seconds: float, error: float) -> list[float | None]:
        return [step, rounded(seconds), rounded(error) if error < float("inf") else None]

    case = lab.case
    return {
        "case": lab.name,
        "method": method,
        "seed": lab.seed,
        "numbers": {"offline": result.offline_numbers, "online": result.online_numbers},
        "offline_seconds": rounded(result.offline_seconds),
        "tasks": [
            {"parameters": values, "inside": values in case.held_out(), "marks": [mark(*m) for m in marks]}
            for values, marks in result.tasks
        ],
        "details": result.details,
        "settings": {
            "ranges": case.ranges, "base": case.base, "base_by": case.base_by, "ranks": case.ranks,
            "degree": case.degree, "kan": case.kan, "seen": case.seen, "dtype": str(case.dtype), **asdict(lab.sizes),
            "width": lab.width,
        },
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }  # fmt: skip


def wanted(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(case, method, seed) in the order of the command line, methods innermost."""
    return [
        (name, method, seed)
        for seed in args.seeds
        for name in args.cases
        for method in args.methods
        if (CASES[name].separate or method not in SEPARATE) and (method == "family" or not CASES[name].variant_of)
    ]


def run(args: argparse.Namespace) -> None:
    """Does what has no line yet, and adds its line."""
    torch.set_num_threads(1)  # what others do on the machine then hardly changes the seconds
    sizes = SMOKE if args.smoke else Sizes()
    every = wanted(args)
    for number, (name, method, seed) in enumerate(every, start=1):
        done = {key(line): line for line in read_lines(args.results)}
        if (name, method, seed) in done:
            continue
        print(f"\n[{number} of {len(every)}] {name}, {method}, seed {seed}; {time.strftime('%H:%M')}", flush=True)
        lab, start = Lab(name, CASES[name], seed, sizes, args.outputs), time.process_time()
        further = {}
        if method in ALL_TASKS:
            if (name, "family", seed) not in done:
                raise SystemExit(f"{method!r} takes the seconds of 'family', which is not there: add it to --methods")
            further["budget"] = done[name, "family", seed]["offline_seconds"]
        add_line(args.results, as_line(lab, method, METHODS[method](lab, **further)))
        print(f"Done in {time.process_time() - start:.0f} CPU s", flush=True)
    if args.smoke:
        make_report(args)


def make_report(args: argparse.Namespace) -> None:
    for path in report(read_lines(args.results), args.page):
        print(f"Written: {path}")


def new_arguments(docstring: str, cases: Iterable[str], name: str) -> argparse.ArgumentParser:
    """Those of this command and of `family_data.py`."""
    parser = new_parser(docstring)
    add = parser.add_argument
    add(
        "command", nargs="?", choices=["run", "report"], default="run", help="report: tables and pictures of all lines"
    )
    add("--cases", nargs="+", choices=list(cases), default=list(cases), help="families of tasks")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of base, factors and points")
    add("--smoke", action="store_true", help="a few iterations of everything with one seed, into --outputs")
    add("--results", type=Path, help=f"file of the lines; default: results/{name}.jsonl beside this file")
    add("--outputs", type=Path, default=Path("outputs") / name, help="bases, and what else several methods need")
    add("--page", type=Path, help="what report writes; pictures go beside it; default: families.md beside this file")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, name: str) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 2**31]:
        parser.error(f"argument --seeds: should be in [0, 2**31 − 1], got {wrong[0]}")
    if args.smoke:
        args.outputs, args.seeds = args.outputs / "smoke", args.seeds[:1]
    args.results = args.results or (args.outputs if args.smoke else HERE / "results") / f"{name}.jsonl"
    args.page = args.page or (args.outputs if args.smoke else HERE) / "families.md"
    return args


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_arguments(__doc__, CASES, "families")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="by name, in quotes"
    )
    return parsed(parser, argv, "families")


def run_or_report(args: argparse.Namespace, run: Job, make_report: Job) -> int:
    """The exit code after the command."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return exit_code(
        lambda: make_report(args) if args.command == "report" else run(args),
        "The lines that were done are stored; the same command goes on from there.",
    )


def main(argv: list[str] | None = None) -> int:
    return run_or_report(parse_arguments(argv), run, make_report)


if __name__ == "__main__":
    sys.exit(main())
