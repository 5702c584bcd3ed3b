"""A new task from a handful of samples, by a family's code and by rivals: the jobs of `run.py few_samples`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from few_sample_methods import METHODS, ONCE, SMOKE, Lab, Sizes, solve
from few_sample_tasks import DOMAINS, FOLDS, Split
from jobs import Job, Line, environment, rounded
from version import version

# Methods that were not run on a domain; that of fluids has all, and all splits.
NOT_OF_FEW = {"Gaussian process", "pooled, own adapter, LM", "one task, everything, LM"}
LEFT_OUT = {
    "fluids_5": NOT_OF_FEW,
    "fluids_20": NOT_OF_FEW | {"from scratch, LM"},
    "oscillators": {"known input, everything, LM", "one task, everything, LM"},
}


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


def jobs(smoke: bool, folder: Path, lines: Path) -> Iterator[Job]:
    """Every method on every split of the fluids, and on one of each other domain; in short, every method once."""
    for name, make in DOMAINS.items():
        used = [label for label in METHODS if label not in LEFT_OUT.get(name, ())]
        domain, whole = make(), name == "fluids"
        for number in range(1, FOLDS + 1 if whole and not smoke else 2):
            lab = Lab(Split(domain, number), SMOKE if smoke else Sizes(), (0.1, 0.1) if smoke else (10.0, 20.0))
            for label in used if whole or not smoke else used[:1]:
                yield {"domain": name, "split": number, "method": label}, partial(solved, lab, label)
