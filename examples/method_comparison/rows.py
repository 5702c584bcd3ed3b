"""The results of an experiment's cases, by method and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments import Experiment

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


class Case:
    """All rows of a case of an experiment, by label; the first is the reference. Rows without results are left out."""

    def __init__(self, experiment: Experiment, name: str, results: Path) -> None:
        self.experiment, self.name, self.task = experiment, name, experiment.task_of(name)
        self.rows: dict[str, Row] = {}
        for label in experiment.labels(name):
            try:
                runs = experiment.final_runs(name, label, results)
            except FileNotFoundError:  # the search for its rate is not complete
                continue
            found = [json.loads(path.read_text()) for run in runs if (path := run.path(results)).exists()]
            if found:
                lr = runs[0].method.get("lr")
                rates = sorted(experiment.tuning_runs(name, label))
                self.rows[label] = Row(label, found, lr, bool(rates) and lr in (rates[0], rates[-1]))

    @property
    def reference(self) -> Row | None:
        return self.rows.get(next(iter(self.experiment.methods)))

    @property
    def zero_shot(self) -> list[float | None]:
        return self.reference.results[0]["zero_shot"] if self.reference else None

    def middle(self, values: list[float | None]) -> float:
        """The median; what diverged is worst."""
        worst = float("-inf" if self.task.higher_is_better else "inf")
        return median(worst if value is None else value for value in values)

    def relative(self, values: list[float | None]) -> str:
        """To the reference's final metric, of medians: a factor on errors, a difference of scores."""
        if not self.reference:
            return NONE
        ours, theirs = self.middle(values), self.middle(self.reference.finals)
        return f"{ours - theirs:+.3f}" if self.task.higher_is_better else f"{ours / theirs:.2f} ×"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
