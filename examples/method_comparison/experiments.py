"""Experiments from their files, and the runs that they consist of."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

from compared_methods import FIRST_ORDER, FROM_SCRATCH, check_method
from tasks import Task, make_task

if TYPE_CHECKING:
    from lines import Results

HERE = Path(__file__).parent
NOT_OF_A_RUN = ("lr", "lr_of", "steps", "cases")  # settings of a method that only say which runs there are
SMOKE_STEPS = 3
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # the grid of learning rates
PICTURES = ("courses", "finals", "ratios", "spectra")


@dataclass(frozen=True)
class Run:
    """One method on one task with one seed: everything that its result depends on."""

    task: str
    settings: dict[str, Any]
    method: dict[str, Any]  # `lr` in it is a number, or absent with Levenberg–Marquardt
    steps: int
    seed: int

    def make_task(self) -> Task:
        return make_task(self.task, self.settings)

    @property
    def key(self) -> str:
        """A changed setting is another run, with another result."""
        return f"{self.task}/{self.method['method']}-{digest(asdict(self))}"


@dataclass(frozen=True)
class Experiment:
    """A task in some cases, the methods compared on it, and the seeds; see README.md for the file's fields."""

    name: str
    title: str
    task: str
    methods: dict[str, dict[str, Any]]
    steps: int
    lm_steps: int = 30
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    settings: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    tuning: dict[str, Any] = field(default_factory=dict)  # rates, seeds, steps[, case]
    pictures: list[str] = field(default_factory=lambda: ["courses"])
    drawn: list[str] = field(default_factory=list)  # methods that the pictures have; all if there are none
    large: dict[str, Any] = field(default_factory=dict)  # what is different with --large
    about: str = ""  # the first paragraph of the page, in Markdown
    reading: str = ""  # its last one: what the table shows

    def task_of(self, case: str) -> Task:
        return make_task(self.task, {**self.settings, **self.cases[case]})

    def run(self, case: str, label: str, seed: int, lr: float | None, steps: int | None = None) -> Run:
        method = {key: value for key, value in self.methods[label].items() if key not in NOT_OF_A_RUN}
        if lr is not None:
            method["lr"] = lr
        default = self.lm_steps if method.get("optimizer") == "lm" else self.steps
        # asdict: defaults of the task are part of its settings
        settings = asdict(self.task_of(case))
        return Run(self.task, settings, method, steps or self.methods[label].get("steps", default), seed)

    def labels(self, case: str) -> list[str]:
        """The methods of a case."""
        return [label for label, method in self.methods.items() if case in method.get("cases", self.cases)]

    def searched_in(self, case: str, label: str) -> tuple[str, str]:
        """The case and label that the search for the rate is done for."""
        return self.tuning.get("case", case), self.methods[label].get("lr_of", label)

    def tuning_runs(self, case: str, label: str, found: Results) -> dict[float, list[Run]]:
        """One for each tuning seed, by learning rate; none where there is nothing to tune.

        The rates are those of `tuning`. If the best of three or more is the lowest or the highest, the next one in
        `RATES` is tried as well.
        """
        case, label = self.searched_in(case, label)
        method = self.methods[label]
        if method.get("optimizer") == "lm" or "lr" in method:
            return {}

        def at(lr: float) -> list[Run]:
            return [self.run(case, label, seed, lr, self.tuning["steps"]) for seed in self.tuning["seeds"]]

        runs = {lr: at(lr) for lr in self.tuning["rates"]}
        while len(runs) >= 3 and all(run in found for tried in runs.values() for run in tried):
            best = best_rate(runs, found, self.task_of(case).higher_is_better)
            beyond = [lr for lr in RATES if (best == max(runs) and lr > best) or (best == min(runs) and lr < best)]
            if not beyond:
                break
            lr = min(beyond, key=lambda lr: abs(math.log(lr / best)))
            runs[lr] = at(lr)
        return dict(sorted(runs.items()))

    def all_tuning_runs(self, found: Results) -> Iterator[Run]:
        for case in self.cases:
            for label in self.labels(case):
                for runs in self.tuning_runs(case, label, found).values():
                    yield from runs

    def final_runs(self, case: str, label: str, found: Results) -> list[Run]:
        """One for each seed, at the rate that has turned out best.

        Raises:
            KeyError: if the tuning has not been done.
        """
        lr = self.methods[label].get("lr")
        if runs := self.tuning_runs(case, label, found):
            lr = best_rate(runs, found, self.task_of(case).higher_is_better)
        return [self.run(case, label, seed, lr) for seed in self.seeds]

    def all_final_runs(self, found: Results) -> Iterator[Run]:
        for case in self.cases:
            for label in self.labels(case):
                yield from self.final_runs(case, label, found)


def mean_metric(runs: Iterable[Run], found: Results, higher_is_better: bool) -> float | None:
    """The mean over seeds of the last metric, of errors the geometric one; None if a run has diverged."""
    metrics = [found[run]["marks"][-1][-1] for run in runs]
    return None if None in metrics else (fmean if higher_is_better else geometric_mean)(metrics)


def best_rate(runs: Mapping[float, list[Run]], found: Results, higher_is_better: bool) -> float:
    """The rate with the best last metric, in the mean over seeds; one that diverged is the worst."""

    def badness(lr: float) -> float:
        mean = mean_metric(runs[lr], found, higher_is_better)
        if mean is None:
            return float("inf")
        return -mean if higher_is_better else mean

    return min(runs, key=badness)


def digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def experiment_names(folder: Path = HERE / "experiments") -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def load_experiments(
    names: Iterable[str] = (), folder: Path = HERE / "experiments", smoke: bool = False, large: bool = False
) -> list[Experiment]:
    """Those named, or all. `smoke`: a few steps, one seed, one case.

    Raises:
        ValueError: naming the file and what is allowed, if an experiment is not as it should be.
    """
    known = experiment_names(folder)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no experiment {unknown[0]!r}; there are {known}")
    return [_load(folder / f"{name}.json", smoke, large) for name in names or known]


def missing_packages(experiment: Experiment) -> list[str]:
    """The commands that install what the task's data is read from and the optimizers, where that is not there."""
    needed = {p: command for case in experiment.cases for p, command in experiment.task_of(case).requires.items()}
    optimizers = {method.get("optimizer") for method in experiment.methods.values()}
    packages = {FIRST_ORDER[name].split(":")[0].split(".")[0] for name in optimizers & FIRST_ORDER.keys()}
    needed |= dict.fromkeys(sorted(packages), 'pip install -e ".[examples]"')
    return [command for package, command in needed.items() if importlib.util.find_spec(package) is None]


def _load(path: Path, smoke: bool, large: bool) -> Experiment:
    try:
        content = json.loads(path.read_text())
        if large:
            drawn = content.get("drawn", [])
            content = _merged(content, content.get("large", {}))
            content["drawn"] = [label for label in drawn if label in content["methods"]]
        allowed = [key for key in Experiment.__dataclass_fields__ if key != "name"]
        if unknown := sorted(set(content) - set(allowed)):
            raise ValueError(f"an experiment should have some of {allowed} but has {unknown}")
        experiment = Experiment(path.stem, **content)
        if smoke:
            experiment = _shortened(experiment)
        _check(experiment)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    return experiment


def _merged(content: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`other` on top of `content`, mapping by mapping. What is null in `other` is left out."""
    merged = dict(content)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None}


def _shortened(experiment: Experiment) -> Experiment:
    case = experiment.tuning.get("case", next(iter(experiment.cases)))
    tuning = dict(experiment.tuning)
    if tuning:
        tuning |= {"rates": tuning["rates"][:2], "seeds": tuning["seeds"][:1], "steps": 1}
    base = {"base_steps": SMOKE_STEPS} if experiment.task_of(case).base_steps else {}
    methods = {
        label: {k: v for k, v in m.items() if k not in ("steps", "cases")}
        for label, m in experiment.methods.items()
        if case in m.get("cases", experiment.cases)
    }
    return replace(
        experiment,
        methods=methods,
        drawn=[label for label in experiment.drawn if label in methods],
        steps=SMOKE_STEPS,
        lm_steps=1,
        seeds=experiment.seeds[:1],
        settings={**experiment.settings, **base},
        cases={case: experiment.cases[case]},
        tuning=tuning,
    )


def _check(experiment: Experiment) -> None:
    if unknown := [picture for picture in experiment.pictures if picture not in PICTURES]:
        raise ValueError(f"`pictures` should be some of {list(PICTURES)} but has {unknown}")
    if unknown := [label for label in experiment.drawn if label not in experiment.methods]:
        raise ValueError(f"`drawn` should be some of {list(experiment.methods)} but has {unknown}")
    for case in experiment.cases:
        task = experiment.task_of(case)
        for label, method in experiment.methods.items():
            check_method(label, method)
            for key, allowed in {"lr_of": experiment.methods, "cases": experiment.cases}.items():
                values = [method[key]] if key == "lr_of" and key in method else method.get(key, [])
                if unknown := [value for value in values if value not in allowed]:
                    raise ValueError(f"{label!r}: `{key}` should be of {list(allowed)} but has {unknown}")
            if not task.base_steps and method["method"] not in FROM_SCRATCH:
                raise ValueError(
                    f"{label!r} needs a base, but `base_steps` is 0; without one there are {FROM_SCRATCH}"
                )
    tuned = [
        label for label, m in experiment.methods.items() if m.get("optimizer") != "lm" and not {"lr", "lr_of"} & set(m)
    ]
    needed = ("rates", "seeds", "steps")
    if tuned and (missing := [key for key in needed if key not in experiment.tuning]):
        raise ValueError(f"{tuned[0]!r} has no `lr`, so `tuning` should have {list(needed)} but {missing} are missing")
    cases = list(experiment.cases)
    if (case := experiment.tuning.get("case", cases[0])) not in cases:
        raise ValueError(f"`tuning`: `case` should be one of {cases} but the value passed is {case!r}")
    if set(experiment.tuning.get("seeds", ())) & set(experiment.seeds):
        raise ValueError(f"`tuning`: `seeds` should be none of the reported ones, {experiment.seeds}")
