"""How much a learning rate other than the best costs, by method and task: which rate is safe to begin with."""

from __future__ import annotations

from collections.abc import Mapping

from compared_methods import FIRST_ORDER
from experiments import RATES, Experiment, mean_metric
from lines import Results
from rows import NONE, table

ABOUT = (
    "Relative to the best rate: a factor on errors, a difference of accuracies; means over the two seeds of the "
    'search, which has fewer steps than the reported runs. "–": not tried, since the best rate lies between its '
    "neighbours."
)


def rates(experiments: list[Experiment], results: Mapping[str, Results]) -> str:
    """The metric at each rate of the search, relative to the best rate's: a factor on errors, a difference of scores;
    means over the seeds of the search."""
    lines = []
    for experiment in experiments:
        case = experiment.tuning.get("case", next(iter(experiment.cases)))
        for label, method in experiment.methods.items():
            if case not in method.get("cases", experiment.cases) or "lr_of" in method:
                continue
            if method.get("optimizer", "adam") not in FIRST_ORDER:
                continue
            higher = experiment.task_of(case).higher_is_better
            searched = experiment.tuning_runs(case, label, results[experiment.name])
            found = {lr: mean_metric(runs, results[experiment.name], higher) for lr, runs in searched.items()}
            known = {lr: value for lr, value in found.items() if value is not None}
            if known:
                best = (max if higher else min)(known.values())
                cells = [_relative(known.get(lr), best, higher) if lr in found else NONE for lr in RATES]
                lines.append([experiment.name, label, *cells])
    return table(["experiment", "method", *(f"{rate:g}" for rate in RATES)], lines) if lines else ""


def _relative(value: float | None, best: float, higher_is_better: bool) -> str:
    if value is None:
        return "diverged"
    return f"{value - best:+.1f}" if higher_is_better else f"{value / best:.2f} ×"
