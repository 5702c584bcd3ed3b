"""A new task from a handful of samples, by a family's code and by rivals: runs what is not there yet.

    python examples/method_comparison/few_samples.py
    python examples/method_comparison/few_samples.py --domains fluids --splits 1
    python examples/method_comparison/few_samples.py --smoke

Every domain, split and method is a line of results/few_samples.jsonl; so are the rates that were tried, on tasks that
are not reported. Tables and pictures come from `report.py`.
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
from few_sample_methods import METHODS, ONCE, SMOKE, Lab, Sizes, solve, validated
from few_sample_tasks import DOMAINS, FOLDS, Split
from jobs import Job, Line, do_missing, environment, new_arguments, place, read_lines, rounded


def tuned(split: Split, rate: str, sizes: Sizes, seconds: float) -> Line:
    """The middle rates, then those beyond the best until it is not at an edge; each on the tasks of validation."""
    method = next(m for m in METHODS.values() if m.once and ONCE[m.once].rate == rate)
    tried: dict[float, float] = {}
    ladder, low, high = sizes.rates, len(sizes.rates) // 2 - 1, len(sizes.rates) // 2 + 1
    while True:
        for value in ladder[low : high + 1]:
            if value not in tried:
                tried[value] = validated(Lab(split, sizes, (seconds * sizes.tuning, 0.0), {rate: value}), method)
        best = ladder.index(min(tried, key=lambda value: tried[value]))
        wider = max(0, min(low, best - 1)), min(len(ladder) - 1, max(high, best + 1))
        if wider == (low, high):
            return {"tried": {f"{value:g}": rounded(error) for value, error in sorted(tried.items())}}
        low, high = wider


def chosen_rates(path: Path, domain: str) -> dict[str, float]:
    lines = [line for line in read_lines(path) if (line["domain"], line["split"]) == (domain, "rate")]
    return {line["method"]: float(min(line["tried"], key=line["tried"].get)) for line in lines}


def solved(lab: Lab, label: str) -> Line:
    found, once = solve(lab, METHODS[label]), METHODS[label].once
    for part in found["samples"].values():
        part |= {kind: [*map(rounded, part[kind])] for kind in ("errors", "inside") if kind in part}
        part["seconds"] = rounded(part["seconds"])
    return {
        **found,
        "once_seconds": rounded(lab.models[once][1]) if once else 0,
        "rate": lab.rates.get(ONCE[once].rate) if once else None,
        "tasks": [lab.split.domain.names[task] for task in lab.split.unseen],
        "environment": environment(),
    }


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """For each domain the search for rates, and then every method on every split."""
    sizes = SMOKE if args.smoke else Sizes()
    for name in args.domains:
        if name == "liquids" and find_spec("chemicals") is None:
            print("Liquids are left out: their data are those of the package chemicals. pip install chemicals")
            continue
        domain = DOMAINS[name]()
        used = [label for label in args.methods if METHODS[label].fits(domain)]
        rates = dict.fromkeys(ONCE[METHODS[label].once].rate for label in used if METHODS[label].once)
        for rate in rates if not domain.rates_of else ():
            names = {"domain": name, "split": "rate", "method": rate}
            yield names, partial(tuned, Split(domain, 1), rate, sizes, args.seconds)
        chosen = chosen_rates(args.results, domain.rates_of or name)
        for number in args.splits:
            lab = Lab(Split(domain, number), sizes, (args.seconds / 3, args.seconds * 2 / 3), chosen)
            for label in used:
                yield {"domain": name, "split": number, "method": label}, partial(solved, lab, label)


def main(argv: list[str] | None = None) -> int:
    parser = new_arguments(__doc__, "few_samples")
    add = parser.add_argument
    add("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    add("--splits", nargs="+", type=int, choices=range(1, FOLDS + 1), default=list(range(1, FOLDS + 1)))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="by name, in quotes")
    add("--seconds", type=float, default=30.0, help="CPU seconds of each method on the tasks seen")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"argument --seconds: should be above 0, got {args.seconds:g}")
    if args.smoke:
        args.splits, args.seconds = args.splits[:1], min(args.seconds, 0.2)
    place(args, "few_samples")
    return do_missing(args.results, lambda: jobs(args))


if __name__ == "__main__":
    sys.exit(main())
