"""The results of an experiment's cases, by method and seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments import Experiment
from lines import Results
from tasks import Task

NONE = "–"


@dataclass(frozen=True)
class Row:
    """The results of one method in one case, one for each seed that has been run."""

    label: str
    results: list[dict[str, Any]]
    lr: float | None
    edge: bool  # the rate is the lowest or highest that was tried

    @property
    def trainable(self) -> int:
        return self.results[0]["trainable"]

    @property
    def finals(self) -> list[float | None]:
        return [result["marks"][-1][-1] for result in self.results]

    @property
    def seconds(self) -> float:
        return median(result["marks"][-1][1] for result in self.results)

    def at(self, seconds: float) -> list[float | None]:
        """The last metric that was there after so many seconds."""
        return [[m for k, s, m in result["marks"] if s <= seconds or not k][-1] for result in self.results]


@dataclass(frozen=True)
class Case:
    """All rows of a case of an experiment, by label; the first is the reference."""

    experiment: Experiment
    name: str
    rows: dict[str, Row]

    @property
    def task(self) -> Task:
        return self.experiment.task_of(self.name)

    @property
    def reference(self) -> Row:
        return self.rows[next(iter(self.experiment.methods))]

    @property
    def zero_shot(self) -> float | None:
        return self.reference.results[0]["zero_shot"]

    def middle(self, values: list[float | None]) -> float:
        """The median; what diverged is worst."""
        worst = float("-inf" if self.task.higher_is_better else "inf")
        return median(worst if value is None else value for value in values)

    def best(self, rows: Iterable[Row]) -> Row | None:
        """The row whose last metric has the best median; None if there are no rows."""
        choose = max if self.task.higher_is_better else min
        return choose(rows, key=lambda row: self.middle(row.finals), default=None)

    def relative(self, values: list[float | None]) -> str:
        """To the reference's final metric, of medians: a factor on errors, a difference of scores."""
        ours, theirs = self.middle(values), self.middle(self.reference.finals)
        return f"{ours - theirs:+.3f}" if self.task.higher_is_better else f"{ours / theirs:.2f} ×"


def case_of(experiment: Experiment, name: str, found: Results) -> Case:
    """
    Raises:
        KeyError: if a run has not been done.
    """
    rows = {}
    for label in experiment.labels(name):
        runs, rates = experiment.final_runs(name, label, found), sorted(experiment.tuning_runs(name, label, found))
        lr = runs[0].method.get("lr")
        rows[label] = Row(label, [found[run] for run in runs], lr, bool(rates) and lr in (rates[0], rates[-1]))
    return Case(experiment, name, rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
