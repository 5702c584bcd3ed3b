"""Experiments from their files, and the jobs that they consist of: searches for learning rates, and runs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from compared_methods import FIRST_ORDER, FROM_SCRATCH, WITHOUT_RATE, check_method
from jobs import Job, Line
from tasks import Task, make_task

HERE = Path(__file__).parent
NOT_OF_A_RUN = ("lr", "steps")  # settings of a method that only say which runs there are
SMOKE_STEPS = 3
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # the grid of learning rates


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


Perform = Callable[[Run], Line]


@dataclass(frozen=True)
class Experiment:
    """A task in some cases, the methods compared on it, and the seeds; see README.md for the file's fields."""

    name: str
    task: str
    methods: dict[str, dict[str, Any]]
    steps: int
    lm_steps: int = 30
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    settings: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    tuning: dict[str, Any] = field(default_factory=dict)  # rates, seeds, steps[, case][, settings of each case]

    def task_of(self, case: str) -> Task:
        return make_task(self.task, {**self.settings, **self.cases[case]})

    def run(self, case: str, label: str, seed: int, lr: float | None, of_search: bool = False) -> Run:
        """One that is reported, or one of the search for a rate, with its own steps and, if `tuning` says so, task."""
        method = {key: value for key, value in self.methods[label].items() if key not in NOT_OF_A_RUN}
        if lr is not None:
            method["lr"] = lr
        default = self.lm_steps if method.get("optimizer") == "lm" else self.steps
        # asdict: defaults of the task are part of its settings
        settings = asdict(self.task_of(case))
        steps = self.methods[label].get("steps", default)
        if of_search:
            settings |= self.tuning.get("settings", {}).get(case, {})
            steps = self.tuning["steps"]
        return Run(self.task, settings, method, steps, seed)

    def jobs(self, perform: Perform, lines: Callable[[], list[Line]]) -> Iterator[Job]:
        """The search for each rate, and then the runs at the best one; `lines` gives those that are there."""
        for case in self.cases:
            for label, method in self.methods.items():
                lr = method.get("lr")
                if lr is None and method.get("optimizer") not in WITHOUT_RATE:
                    at = self.tuning.get("case", case)
                    names = self.names_of_search(at, label)
                    yield names, partial(self.search, at, label, perform)
                    found = [line for line in lines() if names.items() <= line.items()]
                    if not found:  # the search was left out
                        continue
                    lr = best_rate(found[0]["tuning"], self.task_of(case).higher_is_better)
                for seed in self.seeds:
                    run = self.run(case, label, seed, lr)
                    yield {"case": case, "label": label, "seed": seed, "run": asdict(run)}, partial(perform, run)

    def names_of_search(self, case: str, label: str) -> Line:
        settings = asdict(self.run(case, label, 0, None, of_search=True))
        del settings["seed"]
        return {"case": case, "label": label, "seeds": self.tuning["seeds"], "run": settings}

    def search(self, case: str, label: str, perform: Perform) -> Line:
        """The last metric of each seed by rate: at the rates of `tuning`, and of three or more, while the best is the
        lowest or the highest, at the next one in `RATES`."""
        tried: dict[str, list[float | None]] = {}
        rates, results = list(self.tuning["rates"]), []
        while rates:
            for lr in rates:
                runs = [self.run(case, label, seed, lr, of_search=True) for seed in self.tuning["seeds"]]
                results = [perform(run) for run in runs]
                tried[str(lr)] = [result["marks"][-1][-1] for result in results]
            known, best = [float(lr) for lr in tried], best_rate(tried, self.task_of(case).higher_is_better)
            beyond = [lr for lr in RATES if (best == max(known) and lr > best) or (best == min(known) and lr < best)]
            near = sorted(beyond, key=lambda lr: abs(math.log(lr / best)))
            rates = near[:1] if len(known) >= 3 else []
        in_order = {str(lr): tried[str(lr)] for lr in sorted(map(float, tried))}
        return {key: results[0][key] for key in ("version", "environment")} | {"tuning": in_order}


def best_rate(tried: dict[str, list[float | None]], higher_is_better: bool) -> float:
    """The rate with the best mean over seeds, of errors the geometric one; one that diverged is the worst."""

    def badness(lr: str) -> float:
        if None in tried[lr]:
            return math.inf
        return -fmean(tried[lr]) if higher_is_better else geometric_mean(tried[lr])

    return float(min(tried, key=badness))


def digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def experiment_names(folder: Path = HERE / "experiments") -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def load_experiments(
    names: Iterable[str] = (), folder: Path = HERE / "experiments", smoke: bool = False
) -> list[Experiment]:
    """Those named, or all. `smoke`: a few steps, one seed, one case, and each method once for a task.

    Raises:
        ValueError: naming the file and what is allowed, if an experiment is not as it should be.
    """
    known = experiment_names(folder)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no experiment {unknown[0]!r}; there are {known}")
    found = [_load(folder / f"{name}.json", smoke) for name in names or known]
    return _each_method_once(found) if smoke else found


def missing_packages(experiment: Experiment) -> list[str]:
    """The commands that install what the task's data is read from and the optimizers, where that is not there."""
    needed = {p: command for case in experiment.cases for p, command in experiment.task_of(case).requires.items()}
    optimizers = {method.get("optimizer") for method in experiment.methods.values()}
    packages = {FIRST_ORDER[name].split(":")[0].split(".")[0] for name in optimizers & FIRST_ORDER.keys()}
    needed |= dict.fromkeys(sorted(packages), 'pip install -e ".[examples]"')
    return [command for package, command in needed.items() if importlib.util.find_spec(package) is None]


def _load(path: Path, smoke: bool) -> Experiment:
    try:
        content = json.loads(path.read_text())
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


def _shortened(experiment: Experiment) -> Experiment:
    case = experiment.tuning.get("case", next(iter(experiment.cases)))
    tuning = dict(experiment.tuning)
    if tuning:
        tuning |= {"rates": tuning["rates"][:2], "seeds": tuning["seeds"][:1], "steps": 1}
    task = experiment.task_of(case)
    smoke = task.smoke | ({"base_steps": SMOKE_STEPS} if task.base_steps else {})
    return replace(
        experiment,
        methods={label: {k: v for k, v in m.items() if k != "steps"} for label, m in experiment.methods.items()},
        steps=SMOKE_STEPS,
        lm_steps=1,
        seeds=experiment.seeds[:1],
        settings=experiment.settings | smoke,
        cases={case: experiment.cases[case]},
        tuning=tuning,
    )


def _each_method_once(experiments: list[Experiment]) -> list[Experiment]:
    """Of each task, and the first of each experiment."""
    seen, found = [], []
    for experiment in experiments:
        new = {k: m for k, m in experiment.methods.items() if (experiment.task, m) not in seen}
        new = new or dict([next(iter(experiment.methods.items()))])
        seen += [(experiment.task, method) for method in new.values()]
        found.append(replace(experiment, methods=new))
    return found


def _check(experiment: Experiment) -> None:
    for case in experiment.cases:
        task = experiment.task_of(case)
        for label, method in experiment.methods.items():
            check_method(label, method)
            if not task.base_steps and method["method"] not in FROM_SCRATCH:
                raise ValueError(
                    f"{label!r} needs a base, but `base_steps` is 0; without one there are {FROM_SCRATCH}"
                )
    methods = experiment.methods.items()
    tuned = [label for label, m in methods if m.get("optimizer") not in WITHOUT_RATE and "lr" not in m]
    needed = ("rates", "seeds", "steps")
    if tuned and (missing := [key for key in needed if key not in experiment.tuning]):
        raise ValueError(f"{tuned[0]!r} has no `lr`, so `tuning` should have {list(needed)} but {missing} are missing")
    cases = list(experiment.cases)
    if (case := experiment.tuning.get("case", cases[0])) not in cases:
        raise ValueError(f"`tuning`: `case` should be one of {cases} but the value passed is {case!r}")
    if set(experiment.tuning.get("seeds", ())) & set(experiment.seeds):
        raise ValueError(f"`tuning`: `seeds` should be none of the reported ones, {experiment.seeds}")
