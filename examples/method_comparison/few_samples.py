"""A new task from a handful of samples, by a family's code and by rivals: runs what is not there yet.

    python examples/method_comparison/few_samples.py
    python examples/method_comparison/few_samples.py --domains fluids --splits 1
    python examples/method_comparison/few_samples.py --smoke

Every domain, split and method is a line of results/few_samples.jsonl. Tables and pictures come from `report.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from few_sample_methods import METHODS, ONCE, SMOKE, Lab, Sizes, solve
from few_sample_tasks import DOMAINS, FOLDS, Split
from jobs import Job, Line, do_missing, environment, new_arguments, place, rounded
from version import version


def solved(lab: Lab, label: str) -> Line:
    found, once = solve(lab, METHODS[label]), METHODS[label].once
    for part in found["samples"].values():
        part |= {kind: [*map(rounded, part[kind])] for kind in ("errors", "inside") if kind in part}
        part["seconds"] = rounded(part["seconds"])
    return {
        **found,
        "once_seconds": rounded(lab.models[once][1]) if once else 0,
        "rate": lab.split.domain.rates.get(ONCE[once].rate) if once else None,
        "tasks": [lab.split.domain.names[task] for task in lab.split.unseen],
        "version": version("few_sample_methods"),
        "environment": environment(),
    }


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Every method on every split of each domain."""
    sizes = SMOKE if args.smoke else Sizes()
    for name in args.domains:
        if name == "liquids" and find_spec("chemicals") is None:
            print("Liquids are left out: their data are those of the package chemicals. pip install chemicals")
            continue
        domain = DOMAINS[name]()
        used = [label for label in args.methods if METHODS[label].fits(domain)]
        for number in args.splits:
            lab = Lab(Split(domain, number), sizes, (args.seconds / 3, args.seconds * 2 / 3))
            for label in used:
                yield {"domain": name, "split": number, "method": label}, partial(solved, lab, label)


def main(argv: list[str] | None = None) -> int:
    parser = new_arguments(__doc__, "few_samples", METHODS)
    add = parser.add_argument
    add("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    add("--splits", nargs="+", type=int, choices=range(1, FOLDS + 1), default=list(range(1, FOLDS + 1)))
    add("--seconds", type=float, default=30.0, help="CPU seconds of each method on the tasks seen")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"argument --seconds: should be above 0, got {args.seconds:g}")
    if args.smoke:
        args.splits, args.seconds = args.splits[:1], min(args.seconds, 0.2)
    place(args, "few_samples")
    return do_missing(args.results, lambda: jobs(args), stored=args.stored)


if __name__ == "__main__":
    sys.exit(main())
