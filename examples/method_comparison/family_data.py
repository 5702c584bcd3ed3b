"""Families from data, new tasks of which there are few samples: runs what is not there yet, and reports it.

    python examples/method_comparison/family_data.py
    python examples/method_comparison/family_data.py --cases groups --seeds 0
    python examples/method_comparison/family_data.py report
    python examples/method_comparison/family_data.py --smoke

Every case, method and seed is a line of results/family_data.jsonl; so are the rates and weight decays that were tried,
on a seed that is not reported. `report` writes a section of families.md, and its pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # modules of the other examples
sys.path.append(str(HERE.parent / "benchmarks"))
from families import add_line, new_arguments, parsed, read_lines, rounded, run_or_report  # noqa: E402
from family_data_methods import METHODS, ONCE, SMOKE, Lab, Sizes, solve  # noqa: E402
from family_data_report import report  # noqa: E402
from family_data_tasks import FAMILIES  # noqa: E402

Line = dict[str, Any]
TUNING = 100  # the seed on which rates and weight decays are chosen


def best(line: Line, is_error: bool) -> float:
    """The value with the best metric."""
    return float((min if is_error else max)(line["tried"], key=line["tried"].get))


def jobs(name: str, seed: int, sizes: Sizes, lines: list[Line]) -> Iterator[tuple[Line, Callable[[], Line]]]:
    """What a case does with a seed, in order: what names each line, and what computes the rest of it."""
    tasks = FAMILIES[name](seed)
    chosen = {
        (line["stage"], line["method"]): best(line, tasks.regression)
        for line in lines
        if line["case"] == name and "tried" in line
    }
    lab = Lab(tasks, sizes, chosen)

    def tried(stage: str, method: str, values: tuple[float, ...], measure: Callable[[float], float]) -> Line:
        line = {"stage": stage, "tried": {f"{value:g}": rounded(measure(value)) for value in values}}
        chosen[stage, method] = best(line, tasks.regression)
        return line

    def final(metrics: list[dict[str, Any]]) -> float:
        return (geometric_mean if tasks.regression else mean)(task["metrics"][1] for task in metrics)

    def solved(method: str) -> Line:
        weight_decay = chosen["weight decay", method] if METHODS[method].decays else 0.0
        numbers, found = solve(lab, METHODS[method], weight_decay)
        once = lab.once(METHODS[method].once)
        return {
            "numbers": {"once": once.numbers, "task": numbers},
            "once": {"seconds": rounded(lab.seconds(METHODS[method].once)), "metric": rounded(once.metric)},
            "rate": chosen.get(("rate", METHODS[method].once)),
            "weight decay": weight_decay,
            "tasks": [
                {**task, "metrics": [rounded(m) for m in task["metrics"]], "seconds": rounded(task["seconds"])}
                for task in found
            ],
            "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }

    used = {label: method for label, method in METHODS.items() if method.kind in ("any", *tasks.kinds)}
    if seed != TUNING:
        for label in used:
            yield {"case": name, "method": label, "seed": seed}, lambda label=label: solved(label)
        return
    for once in ONCE if not tasks.regression else ():
        if once in {"base"} | {method.once for method in used.values()}:

            def rates(once: str = once) -> Line:
                return tried("rate", once, sizes.rates, lambda rate: ONCE[once](lab, rate, sizes.tuning).metric)

            yield {"case": name, "method": once, "seed": seed, "stage": "rate"}, rates
    for label, method in used.items():
        if method.decays:

            def decays(label: str = label, method: Any = method) -> Line:
                return tried(
                    "weight decay", label, sizes.weight_decays, lambda w: final(solve(lab, method, w, every=2)[1])
                )

            yield {"case": name, "method": label, "seed": seed, "stage": "weight decay"}, decays


def key(line: Line) -> tuple[Any, ...]:
    return line["case"], line["method"], line["seed"], line.get("stage")


def run(args: argparse.Namespace) -> None:
    """Does what has no line yet, and adds its line."""
    torch.set_num_threads(1)  # what others do on the machine then hardly changes the seconds
    for name in args.cases:
        for seed in (TUNING, *args.seeds):
            lines = read_lines(args.results)
            known = {key(line) for line in lines}
            for names, compute in jobs(name, seed, SMOKE if args.smoke else Sizes(), lines):
                if key(names) not in known:
                    start = time.process_time()
                    add_line(args.results, names | compute())
                    print(f"{names}: {time.process_time() - start:.0f} CPU s; {time.strftime('%H:%M')}", flush=True)
    if args.smoke:
        make_report(args)


def make_report(args: argparse.Namespace) -> None:
    for path in report(read_lines(args.results), args.page):
        print(f"Written: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = new_arguments(__doc__, FAMILIES, "family_data")
    args = parsed(parser, argv, "family_data")
    if TUNING in args.seeds:
        parser.error(f"argument --seeds: {TUNING} is the seed of which rates and weight decays are chosen")
    return run_or_report(args, run, make_report)


if __name__ == "__main__":
    sys.exit(main())
