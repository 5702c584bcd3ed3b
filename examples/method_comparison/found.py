"""What the tables and pictures read of the stored lines: results of runs, of families, and of few samples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from experiments import load_experiments
from jobs import Line, read_lines

Course = list[tuple[int, float, float]]  # (step, seconds, metric); what diverged is infinite

CORE = "core of a family, LM"


class PDE(NamedTuple):
    """Where the lines of a PDE are: its experiment, its case in `pde_sizes` and of a family, and the target in it."""

    experiment: str
    case: str = ""
    at: float = 0.0


PDES = {
    "Poisson, λ 1 → 1.3": PDE("pde_elliptic", "elliptic", 1.3),
    "heat, κ 1 → 1.3": PDE("pde_parabolic", "parabolic", 1.3),
    "wave, c 2 → 2.5": PDE("pde_hyperbolic", "hyperbolic", 2.5),
    "Burgers, ν 0.1 → 0.13": PDE("pde_burgers"),
    "FastKAN, Poisson, λ 1 → 1.3": PDE("pde_fastkan"),
    "a shock, ν 0.02/π → 0.01/π": PDE("pde_shock"),
}


class Run(NamedTuple):
    """One run: trained numbers, metrics at the end and before, seconds."""

    trained: int
    metric: float
    before: float | None
    seconds: float
    course: Course


class Experiments:
    """The runs of the experiments by case and label."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lines = folder, {}

    def lines(self, name: str) -> list[Line]:
        if name not in self._lines:
            self._lines[name] = read_lines(self.folder / f"{name}.jsonl")
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

    def of(self, name: str) -> dict[str, dict[str, list[Run]]]:
        """All runs of an experiment by case and label, in the order of its file."""
        (found,) = load_experiments([name])
        return {case: {label: self.runs(name, case, label) for label in found.methods} for case in found.cases}

    def of_pde(self, pde: PDE) -> dict[str, list[Run]]:
        """By label, with other sizes and the core of a family; LoRA on parameters or linear layers is one label."""
        (by_label,) = self.of(pde.experiment).values()
        found = {re.sub("LoRA (on parameters|1/10)", "LoRA", label): runs for label, runs in by_label.items()}
        if pde.case:
            found |= self.of("pde_sizes")[pde.case]
            found[CORE] = self.cores(pde.case, pde.at)
        return found

    def of_widths(self) -> dict[str, dict[str, list[Run]]]:
        """By case and label, with the rival that needs no wide base."""
        rival, poisson = "small KAN from scratch, LM, longer", next(iter(PDES.values()))
        of_rival = {rival: self.of_pde(poisson)[rival]}
        return {case: by_label | of_rival for case, by_label in self.of("pde_widths").items()}

    def cores(self, case: str, at: float) -> list[Run]:
        """Of a family at a parameter that it was not trained on; the metric before is that of the family as it is."""
        found = []
        for line in self.lines("families"):
            if (line["case"], line["method"]) == (case, "family"):
                (marks,) = (task["marks"] for task in line["tasks"] if task["parameters"] == [at])
                course, numbers = finite(marks), line["numbers"]["online"]
                _, seconds, error = course[-1]
                found.append(Run(numbers, error, course[0][2], seconds, course))
        return found


def finite(marks: list[list[Any]]) -> Course:
    return [(step, seconds, inf if metric is None else metric) for step, seconds, metric in marks]


def as_run(line: Line) -> Run:
    course = finite(line["marks"])
    _, seconds, metric = course[-1]
    return Run(line["trainable"], metric, line["zero_shot"], seconds, course)


class Entry(NamedTuple):
    """A method of `families.py` after `step` iterations for a task, or at its end; its colour in pictures."""

    method: str
    step: int | None = None
    colour: str = ""


FAMILY_ENTRIES = {
    "family, as it is": Entry("family", 0, "family"),
    "family, core": Entry("family", 5, "core"),
    "joint, as it is": Entry("family, joint", 0, "family"),
    "joint, core": Entry("family, joint", 5, "core"),
    "small KAN from scratch": Entry("small KAN alone, LM", None, "small KAN"),
    "adapter": Entry("LoTRA alone, LM", None, "LoTRA"),
    "everything": Entry("full, LM", None, "full"),
    "input, as it is": Entry("parameter as an input", 0, "input"),
    "input, 1 iteration": Entry("parameter as an input", 1, "input"),
    "diagonals, 5 iterations": Entry("diagonals of the parameter", 5, "other"),
    "16 KANs combined": Entry("basis of 16 KANs", None, "basis"),
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
        """(seconds, error) at each parameter, of each seed."""
        found = []
        for line in self.lines.get(entry.method, []):
            for task in line["tasks"]:
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

    def seconds(self, method: str, n: int) -> float:
        return median(line["samples"][str(n)]["seconds"] for line in self.of(method))
