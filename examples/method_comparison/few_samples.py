"""A new task from a handful of samples, by a family's code and by rivals: runs what is not there yet, and reports it.

    python examples/method_comparison/few_samples.py
    python examples/method_comparison/few_samples.py --domains fluids --splits 1
    python examples/method_comparison/few_samples.py report
    python examples/method_comparison/few_samples.py --smoke

Every domain, split and method is a line of results/few_samples.jsonl; so are the rates that were tried, on tasks that
are not reported. `report` writes few_samples.md between its markers, and its pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # modules of the other examples
sys.path.append(str(HERE.parent / "benchmarks"))
from command_line import new_parser  # noqa: E402
from families import add_line, read_lines, rounded, run_or_report  # noqa: E402
from few_sample_methods import METHODS, ONCE, SMOKE, Lab, Sizes, solve, validated  # noqa: E402
from few_sample_report import report  # noqa: E402
from few_sample_tasks import DOMAINS, FOLDS, Split  # noqa: E402

Line = dict[str, Any]


def key(line: Line) -> tuple[Any, ...]:
    return line["domain"], line["split"], line["method"]


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


def jobs(name: str, args: argparse.Namespace) -> Iterator[tuple[Line, Callable[[], Line]]]:
    """What is done for a domain, in order: what names each line, and what computes the rest of it."""
    sizes, domain = SMOKE if args.smoke else Sizes(), DOMAINS[name]()
    used = [label for label in args.methods if METHODS[label].fits(domain)]
    rates = {
        line["method"]: line["tried"]
        for line in read_lines(args.results)
        if key(line)[:2] == (domain.rates_of or name, "rate")
    }
    missing = (
        {}
        if domain.rates_of
        else dict.fromkeys(ONCE[METHODS[label].once].rate for label in used if METHODS[label].once)
    )
    for rate in missing:

        def tune(rate: str = rate) -> Line:
            line = tuned(Split(domain, 1), rate, sizes, args.seconds)
            rates[rate] = line["tried"]
            return line

        yield {"domain": name, "split": "rate", "method": rate}, tune
    chosen = {rate: float(min(tried, key=tried.get)) for rate, tried in rates.items()}
    for number in args.splits:
        lab = Lab(Split(domain, number), sizes, (args.seconds / 3, args.seconds * 2 / 3), chosen)
        for label in used:

            def solved(label: str = label, lab: Lab = lab) -> Line:
                found, once = solve(lab, METHODS[label]), METHODS[label].once
                for part in found["samples"].values():
                    part |= {kind: [*map(rounded, part[kind])] for kind in ("errors", "inside") if kind in part}
                    part["seconds"] = rounded(part["seconds"])
                return {
                    **found,
                    "once_seconds": rounded(lab.models[once][1]) if once else 0,
                    "rate": chosen.get(ONCE[once].rate) if once else None,
                    "tasks": [domain.names[task] for task in lab.split.unseen],
                    "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
                }

            yield {"domain": name, "split": number, "method": label}, solved


def run(args: argparse.Namespace) -> None:
    """Does what has no line yet, and adds its line."""
    torch.set_num_threads(1)  # what others do on the machine then hardly changes the seconds
    for name in args.domains:
        if name == "liquids" and find_spec("chemicals") is None:
            print("Liquids are left out: their data are those of the package chemicals. pip install chemicals")
            continue
        for names, compute in jobs(name, args):
            if key(names) not in {key(line) for line in read_lines(args.results)}:
                start = time.process_time()
                add_line(args.results, names | compute())
                print(f"{names}: {time.process_time() - start:.0f} CPU s; {time.strftime('%H:%M')}", flush=True)
    if args.smoke:
        make_report(args)


def make_report(args: argparse.Namespace) -> None:
    for path in report(read_lines(args.results), args.page):
        print(f"Written: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=["run", "report"], default="run", help="report: tables and picture of all lines")
    add("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    add("--splits", nargs="+", type=int, choices=range(1, FOLDS + 1), default=list(range(1, FOLDS + 1)))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="by name, in quotes")
    add("--seconds", type=float, default=30.0, help="CPU seconds of each method on the tasks seen")
    add("--smoke", action="store_true", help="a second or less of everything on one split, into outputs/")
    add("--results", type=Path, help="file of the lines; default: results/few_samples.jsonl beside this file")
    add("--outputs", type=Path, default=Path("outputs") / "few_samples", help="where --smoke writes")
    add(
        "--page", type=Path, help="what report writes; pictures go beside it; default: few_samples.md beside this file"
    )
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"argument --seconds: should be above 0, got {args.seconds:g}")
    if args.smoke:
        args.outputs, args.splits, args.seconds = args.outputs / "smoke", args.splits[:1], min(args.seconds, 1.0)
    args.results = args.results or (args.outputs if args.smoke else HERE / "results") / "few_samples.jsonl"
    args.page = args.page or (args.outputs if args.smoke else HERE) / "few_samples.md"
    return args


def main(argv: list[str] | None = None) -> int:
    return run_or_report(parse_arguments(argv), run, make_report)


if __name__ == "__main__":
    sys.exit(main())
