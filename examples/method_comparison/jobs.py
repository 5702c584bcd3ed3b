"""Jobs that add a line each to a file: those without one are done, so that the same command goes on after Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from command_line import exit_code
from measuring import device_name
from reporting import write_atomically

Line = dict[str, Any]
NAMES = ("case", "domain", "range", "method", "label", "seed", "split", "run")  # what names a line
Job = tuple[Line, Callable[[], Line]]  # what names the line, and what computes the rest of it


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_line(path: Path, names: Line, line: Line) -> None:
    """In the place of lines with these names."""
    kept = [other for other in read_lines(path) if not is_of(names, other)]  # another process may have added lines
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*kept, names | line])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(text))


def is_of(names: Line, line: Line) -> bool:
    return names.items() <= line.items()


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def environment() -> Line:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": device_name(),
        "commit": git.stdout.strip() or None,
    }


def last_errors(line: Line) -> list[float]:
    """What a line ends with: of a run, of each task, of each task at each number of samples; none of a search."""
    if "samples" in line:
        return [error for part in line["samples"].values() for error in part["errors"]]
    return [part["marks"][-1][-1] for part in (line.get("tasks") or [line]) if "marks" in part]


def print_ratios(stored: Path, again: Path) -> None:
    """For each method, the median and the range of its new errors over the stored ones of the same runs."""
    found: dict[str, list[float]] = {}
    for line in read_lines(again):
        names = {key: line[key] for key in NAMES if key in line}
        for other in (other for other in read_lines(stored) if is_of(names, other)):
            pairs = zip(last_errors(line), last_errors(other), strict=True)
            ratios = found.setdefault(line.get("method") or line["label"], [])
            ratios += [new / old for new, old in pairs if new and old]
    for method, ratios in found.items():
        if ratios:
            print(f"{method}: {median(ratios):.3g} × ({min(ratios):.3g} to {max(ratios):.3g})")


def do_missing(
    path: Path,
    jobs: Callable[[], Iterable[Job]],
    counts: Callable[[Line], bool] = lambda line: True,
    stored: Path | None = None,
) -> int:
    """Does what has no line yet, or none that counts, and adds its line; returns the exit code of the command.

    Args:
        stored: lines that the new ones are compared with in the end.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def work() -> None:
        torch.set_num_threads(1)  # what others do on the machine then hardly changes the seconds
        for names, compute in jobs():
            if any(is_of(names, line) and counts(line) for line in read_lines(path)):
                continue
            title = ", ".join(f"{value}" for value in names.values() if not isinstance(value, dict))
            print(f"\n{path.stem}, {title}; {time.strftime('%H:%M')}", flush=True)
            start = time.process_time()
            line = compute()
            spent = rounded(time.process_time() - start)  # with bases, searches and evaluation
            add_line(path, names, line | {"cpu_seconds": spent})
            print(f"Done in {spent:.0f} CPU s", flush=True)
        if stored:
            print_ratios(stored, path)

    return exit_code(work, "The lines that were done are stored; the same command goes on from there.")
