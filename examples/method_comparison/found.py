"""What the tables and pictures read of the stored lines: results of runs, of families, and of few samples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

Line = dict[str, Any]
Course = list[tuple[int, float, float]]  # (step, seconds, metric); what diverged is infinite

SMALL, SMALL_BFGS = (f"small KAN from scratch, {by}" for by in ("LM", "L-BFGS"))
LORA, CORE = "LoRA on parameters, SOAP", "core of a family, LM †"
# Shown, and as the lines have it: in the experiment of a PDE, or in the one on sizes.
PDE_ROWS = {
    SMALL: SMALL,
    SMALL_BFGS: SMALL_BFGS,
    **{f"from scratch, {by}": f"from scratch, {by}" for by in ("Adam", "LM")},
    **{f"full, {by}": f"full, {by}" for by in ("Adam", "SOAP", "L-BFGS", "LM")},
    **{f"LoTRA 1/10, {by}": f"LoTRA 1/10, {by}" for by in ("Adam", "SOAP", "LM")},
    LORA: "LoRA target_parameters 1/10, SOAP",
}
SIZES = [f"{kind} 1/{k}, LM" for k in (16, 10, 4) for kind in ("LoTRA", "small KAN")]
SIZES += [*(f"{kind} 1/10, LM, longer" for kind in ("LoTRA", "small KAN")), "LoTRA 1/4, Adam, orthonormal"]
QUARTER = "LoTRA 1/4, LM †"


class PDE(NamedTuple):
    """Where the lines of a PDE are: experiment and case; its case in `pde_sizes`; a family and the target's place."""

    experiment: str
    case: str
    sizes: str = ""
    family: tuple[str, float] | None = None


PDES = {
    "Poisson, λ 1 → 1.3": PDE("pde_elliptic", "λ = 1.3", "elliptic", ("elliptic", 1.3)),
    "heat, κ 1 → 1.3": PDE("pde_parabolic", "κ = 1.3", "parabolic", ("parabolic", 1.3)),
    "wave, c 2 → 2.5": PDE("pde_hyperbolic", "c = 2.5", "hyperbolic", ("hyperbolic", 2.5)),
    "Burgers, ν 0.1 → 0.13": PDE("pde_burgers", "ν = 0.13"),
}


class Run(NamedTuple):
    """One run: trained and stored numbers, metrics at the end and before, seconds, bytes of a step (of one seed)."""

    trained: int
    stored: int
    metric: float
    before: float | None
    seconds: float
    memory: float | None
    course: Course


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Experiments:
    """The runs of the experiments by case and label."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lines = folder, {}

    def lines(self, name: str) -> list[Line]:
        if name not in self._lines:
            self._lines[name] = read(self.folder / f"{name}.jsonl")
        return self._lines[name]

    def runs(self, experiment: str, case: str, label: str) -> list[Run]:
        """
        Raises:
            ValueError: if there are none.
        """
        found = [
            as_run(line)
            for line in self.lines(experiment)
            if (line["case"], line["label"]) == (case, label) and "marks" in line
        ]
        if not found:
            raise ValueError(f"results/{experiment}.jsonl has no run of {label!r} in {case!r}: run.py {experiment}")
        return found

    def of_pde(self, pde: PDE) -> dict[str, list[Run]]:
        """By the labels shown."""
        found = {shown: self.runs(pde.experiment, pde.case, label) for shown, label in PDE_ROWS.items()}
        if pde.sizes:
            found[QUARTER] = self.runs("pde_sizes", pde.sizes, "LoTRA 1/4, LM")
        if pde.family:
            found[CORE] = self.cores(*pde.family)
        return found

    def cores(self, case: str, at: float) -> list[Run]:
        """Of a family at a parameter that it was not trained on; the metric before is that of the family as it is."""
        found = []
        for line in self.lines("families"):
            if (line["case"], line["method"]) == (case, "family"):
                (marks,) = (task["marks"] for task in line["tasks"] if task["parameters"] == [at])
                course, numbers = finite(marks), line["numbers"]["online"]
                _, seconds, error = course[-1]
                found.append(Run(numbers, numbers, error, course[0][2], seconds, None, course))
        return found


def finite(marks: list[list[Any]]) -> Course:
    return [(step, seconds, inf if metric is None else metric) for step, seconds, metric in marks]


def as_run(line: Line) -> Run:
    course = finite(line["marks"])
    _, seconds, metric = course[-1]
    stored = line.get("stored", line["trainable"])
    return Run(line["trainable"], stored, metric, line["zero_shot"], seconds, line.get("step_bytes"), course)


class Entry(NamedTuple):
    """A method of `families.py` after `step` iterations for a task, or at its end."""

    method: str
    step: int | None = None


FAMILY_ENTRIES = {
    "family, as it is": Entry("family", 0),
    "family, core": Entry("family", 5),
    "adapter, LM": Entry("LoTRA alone, LM"),
    "adapter, LM, more points": Entry("LoTRA alone, LM, more points"),
    "everything, LM": Entry("full, LM"),
    "everything, Adam": Entry("full, Adam"),
    "input, as it is": Entry("parameter as an input", 0),
    "input, 1 iteration": Entry("parameter as an input", 1),
    "diagonals, 5 iterations": Entry("diagonals of the parameter", 5),
    "16 KANs combined": Entry("basis of 16 KANs"),
}


class Family:
    """The lines of a case of `families.py`, by method."""

    def __init__(self, case: str, lines: Iterable[Line]) -> None:
        self.lines: dict[str, list[Line]] = {}
        for line in lines:
            if line["case"] == case:
                self.lines.setdefault(line["method"], []).append(line)
        self.seeds = len(self.lines.get("family", []))

    def values(self, entry: Entry) -> list[tuple[float, float]]:
        """(seconds, error) at each parameter within the range, of each seed."""
        found = []
        for line in self.lines.get(entry.method, []):
            for task in line["tasks"]:
                if task["inside"]:
                    course = [mark for mark in finite(task["marks"]) if entry.step is None or mark[0] <= entry.step]
                    found.append(course[-1][1:])
        return found

    def errors(self, entry: Entry) -> list[float]:
        return [error for _, error in self.values(entry)]


class FewSamples:
    """The lines of a domain of `few_samples.py`."""

    def __init__(self, domain: str, lines: Iterable[Line]) -> None:
        self.lines = [line for line in lines if line["domain"] == domain and "samples" in line]
        self.methods = {line["method"] for line in self.lines}

    def of(self, method: str) -> list[Line]:
        return [line for line in self.lines if line["method"] == method]

    def errors(self, method: str, n: int) -> list[float]:
        """Of all unseen tasks of all splits."""
        return [error for line in self.of(method) for error in line["samples"][str(n)]["errors"]]

    def median(self, method: str, n: int) -> float:
        return median(self.errors(method, n))
