"""One adapter for a family of tasks beside other ways to solve its tasks: the jobs of `run.py families`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path

from family_methods import ALL_TASKS, METHODS, SMOKE, Lab, Result, Sizes
from family_tasks import ALL_CASES, CASES
from jobs import Job, Line, environment, read_lines, rounded
from version import version

# How many seeds each method has, by case; none where the case is not named.
SEVEN = ("elliptic", "front", "two parameters", "advection", "reaction", "hyperbolic", "parabolic")
MAIN = dict.fromkeys(CASES, 1) | dict.fromkeys(SEVEN, 5)
SEEDS = {
    **dict.fromkeys(("family", "family, joint", "parameter as an input"), dict.fromkeys(ALL_CASES, 1) | MAIN),
    **dict.fromkeys(("small KAN alone, LM", "LoTRA alone, LM"), MAIN),
    "full, LM": MAIN | dict.fromkeys(SEVEN[1:], 3),
    "diagonals of the parameter": dict.fromkeys(("elliptic", "front", "hyperbolic"), 3),
    "basis of 16 KANs": dict.fromkeys(("elliptic", "front", "advection"), 3),
}


def as_line(lab: Lab, result: Result) -> Line:
    """A result as JSON has it; errors that are not finite are None."""
    case = lab.case
    marks = [[[k, rounded(s), rounded(e) if e < inf else None] for k, s, e in course] for _, course in result.tasks]
    return {
        "numbers": {"offline": result.offline_numbers, "online": result.online_numbers},
        "offline_seconds": rounded(result.offline_seconds),
        "tasks": [
            {"parameters": values, "marks": course}
            for (values, _), course in zip(result.tasks, marks, strict=True)
        ],
        "details": result.details,
        "settings": {
            "ranges": case.ranges, "base": case.base, "base_by": case.base_by, "ranks": case.ranks,
            "degree": case.degree, "kan": case.kan, "dtype": str(case.dtype), **asdict(lab.sizes), "width": lab.width,
        },
        "version": version("family_methods"),
        "environment": environment(),
    }  # fmt: skip


def jobs(smoke: bool, folder: Path, lines: Path) -> Iterator[Job]:
    """Seeds outermost, methods innermost; a short form has every method once, and every case.

    Args:
        folder: where bases and fitted families are kept.
        lines: the file that the lines are in.
    """

    def compute(name: str, method: str, seed: int) -> Line:
        lab = Lab(name, ALL_CASES[name], seed, SMOKE if smoke else Sizes(), folder)
        if method not in ALL_TASKS:
            return as_line(lab, METHODS[method](lab))
        names = {"case": name, "method": "family", "seed": seed}
        family = [line for line in read_lines(lines) if names.items() <= line.items()]
        if not family:
            raise SystemExit(f"{method!r} takes the seconds of 'family', which is not there: it has to be run first")
        return as_line(lab, METHODS[method](lab, budget=family[0]["offline_seconds"]))

    for seed in range(1 if smoke else max(MAIN.values())):
        for name in ALL_CASES:
            for method in METHODS:
                if seed < SEEDS[method].get(name, 0) and (not smoke or name == "elliptic" or method == "family"):
                    yield {"case": name, "method": method, "seed": seed}, partial(compute, name, method, seed)
