"""results/<experiment>.jsonl: a line for each search for a learning rate and each reported run; what the code was."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from experiments import Experiment, Run
from reporting import write_atomically

import peft_lotra

HERE = Path(__file__).parent
FOLDERS = (HERE, HERE.parent, HERE.parent / "benchmarks")  # where modules of the examples lie
# Which runs there are, and where; their settings are in every line. How files and pictures are written.
NOT_OF_A_RESULT = {"experiments", "lines", "reporting"}
# Of the library: which layers are found, what only shows or tests, and what only imports.
NO_RESULT_OF = ("advise.py", "analysis/plots.py", "analysis/summary.py", "coefficients/registry.py", "files/")
NO_RESULT_OF += ("inference/", "testing/")
Line = dict[str, Any]


class Results:
    """The results of runs: those that an experiment's lines have, its own before those of other experiments, and files
    of single runs below `cache`. One of the code as it is now goes before all others."""

    def __init__(self, name: str, folder: Path, cache: Path | None = None) -> None:
        self.cache = cache
        self._by_key: dict[str, Line] = {}
        others = sorted(folder.glob("*.jsonl")) if cache else []
        for path in dict.fromkeys([folder / f"{name}.jsonl", *others]):
            for run, result in _read(path):
                known = self._by_key.setdefault(run.key, result)
                if is_older(run, known) and not is_older(run, result):
                    self._by_key[run.key] = result

    def __getitem__(self, run: Run) -> Line:
        """
        Raises:
            KeyError: if there is none.
        """
        key = run.key
        known = self._by_key.get(key)
        if self.cache and (known is None or is_older(run, known)) and (path := self.cache / f"{key}.json").exists():
            kept = json.loads(path.read_text())
            if known is None or not is_older(run, kept):
                self._by_key[key] = kept
        return self._by_key[key]

    def __contains__(self, run: Run) -> bool:
        try:
            return bool(self[run])
        except KeyError:
            return False


def _read(path: Path) -> Iterator[tuple[Run, Line]]:
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if "tuning" in line:
            settings = line["run"]
            for lr, metrics in line["tuning"].items():
                for seed, metric in zip(line["seeds"], metrics, strict=True):
                    run = Run(**{**settings, "method": {**settings["method"], "lr": float(lr)}, "seed": seed})
                    by = {key: line[key] for key in ("version", "measured_by") if key in line}
                    yield run, by | {"marks": [[run.steps, None, metric]]}
        elif "run" in line:  # families.py has lines of its own
            yield Run(**line["run"]), {key: line[key] for key in line if key not in ("case", "label", "seed")}


def lines(experiment: Experiment, found: Results) -> list[Line]:
    """Those of what is there, in the order of cases, methods and seeds; a search comes before the runs at its rate."""
    cases, labels, by_place = list(experiment.cases), list(experiment.methods), {}
    for case in experiment.cases:
        for label in experiment.labels(case):
            searched = experiment.tuning_runs(case, label, found)
            tuned = {lr: runs for lr, runs in searched.items() if all(run in found for run in runs)}
            if tuned:
                searched_in = experiment.searched_in(case, label)
                by_place[(*searched_in, -1)] = _of_a_search(*searched_in, tuned, found)
            if len(tuned) == len(searched):
                for run in experiment.final_runs(case, label, found):
                    if run in found:
                        place = {"case": case, "label": label, "seed": run.seed}
                        by_place[case, label, run.seed] = place | found[run]
    return [by_place[key] for key in sorted(by_place, key=lambda k: (cases.index(k[0]), labels.index(k[1]), k[2]))]


def _of_a_search(case: str, label: str, tuned: dict[float, list[Run]], found: Results) -> Line:
    runs = next(iter(tuned.values()))
    settings = {key: getattr(runs[0], key) for key in ("task", "settings", "method", "steps")}
    settings["method"] = {key: value for key, value in settings["method"].items() if key != "lr"}
    results = [found[run] for runs in tuned.values() for run in runs]
    by = {key: ", ".join(dict.fromkeys(r[key] for r in results if key in r)) for key in ("version", "measured_by")}
    return {
        "case": case,
        "label": label,
        **{key: versions for key, versions in by.items() if versions},
        "seeds": [run.seed for run in runs],
        "tuning": {lr: [found[run]["marks"][-1][-1] for run in runs] for lr, runs in tuned.items()},
        "run": settings,
    }


def write_lines(experiment: Experiment, results: Path, cache: Path) -> None:
    """Of what is there by now."""
    _write(results / f"{experiment.name}.jsonl", lines(experiment, Results(experiment.name, results, cache)))


def older_methods(experiment: Experiment, results: Path) -> dict[str, Run]:
    """Of each method with reported runs by older code, the first of these.

    Raises:
        ValueError: if a run is missing.
    """
    found, chosen = Results(experiment.name, results), {}
    try:
        for case in experiment.cases:
            for label in experiment.labels(case):
                for run in experiment.final_runs(case, label, found):
                    if is_older(run, found[run]):
                        chosen.setdefault(label, run)
        return chosen
    except KeyError:
        raise ValueError(f"{experiment.name}.jsonl lacks runs: `run.py {experiment.name}` does them") from None


def confirm_lines(experiment: Experiment, results: Path, chosen: Mapping[str, Run], again: Results) -> Iterator[str]:
    """Give the lines of a method the version of now, if its chosen run went `again` as it had gone.

    `measured_by` then has the version that they were measured by. Yields a line of text for each chosen run.
    """
    found, kept = Results(experiment.name, results), _lines_of(experiment, results)
    for label, run in chosen.items():
        before, after = ([[step, metric] for step, _, metric in of["marks"]] for of in (found[run], again[run]))
        yield f"{experiment.name}, {label}: {'the same' if before == after else 'NOT the same'}"
        for line in kept if before == after else ():
            if line["label"] == label and line["version"] != (now := version(experiment.task)):
                line |= {"measured_by": line.get("measured_by", line["version"]), "version": now}
    _write(results / f"{experiment.name}.jsonl", kept)


def _lines_of(experiment: Experiment, results: Path) -> list[Line]:
    path = results / f"{experiment.name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, kept: list[Line]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(text))


def is_older(run: Run, result: Line) -> bool:
    """Whether it is by code other than that of now."""
    return result["version"] != version(run.task)


@cache
def version(task: str) -> str:
    """The library's, and a hash of the code that a result of the task depends on."""
    code = sorted(_code(path)[0] for path in sources(task))
    return f"{peft_lotra.__version__}+{hashlib.sha256(repr(code).encode()).hexdigest()[:8]}"


def sources(task: str) -> set[Path]:
    """Of the library, what a result can depend on; of these examples, what `perform.py` and the task import."""
    library = Path(peft_lotra.__file__).parent
    found = {path for path in library.rglob("*.py") if path.name != "__init__.py"}
    found = {path for path in found if not path.relative_to(library).as_posix().startswith(NO_RESULT_OF)}
    waiting = ["perform", f"tasks/{task}"]
    while waiting:
        name = waiting.pop()
        files = (path for folder in FOLDERS for path in (folder / f"{name}.py", folder / name / "__init__.py"))
        path = next((path for path in files if path.exists()), None)
        if path and name not in NOT_OF_A_RESULT and path not in found:
            found.add(path)
            waiting += _code(path)[1]
    return found


@cache
def _code(path: Path) -> tuple[str, list[str]]:
    """What it does, without comments, docstrings and texts of errors and warnings; the modules that it imports."""
    tree, imported = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [node.module] if node.module and not node.level else []
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
        said = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(said, ast.Call) and (said is not node or ast.unparse(node.func) == "warnings.warn"):
            said.args = []
    return ast.unparse(tree), imported
