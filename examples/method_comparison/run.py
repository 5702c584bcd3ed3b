"""Do what has no line in results/ yet: experiments, families of tasks, convection, few samples.

    python examples/method_comparison/run.py
    python examples/method_comparison/run.py pde_elliptic images_kan
    python examples/method_comparison/run.py families --only front family
    python examples/method_comparison/run.py --smoke

Every search for a rate and every run is a line of results/<name>.jsonl, and what several runs need a file below
outputs/: stop it when you like, the same command goes on. Started twice, the processes share the work: each takes
whole names. A run is done again if a setting changes; with --stale, also if the code has changed that it depends on.
Tables and pictures come from `python examples/method_comparison/report.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("", "benchmarks")]  # modules of other examples
from command_line import new_parser
from experiments import Experiment, experiment_names, load_experiments, missing_packages
from jobs import Job, Line, add_line, do_missing, read_lines
from perform import perform
from version import modules_of, version

HERE = Path(__file__).parent
# Modules with `jobs`, and where their results come from.
MODULES = {"families": "family_methods", "few_samples": "few_sample_methods", "convection": "convection"}
LONGEST = ("families", "text_large", "pde_widths", "convection")  # begun first, so that two processes end together
# A name, its jobs, which are given the file of the lines, and the modules that they depend on.
Part = tuple[str, Callable[[Path], Iterable[Job]], tuple[str, ...]]


def of_experiment(experiment: Experiment, outputs: Path) -> Part:
    do = partial(perform, bases=outputs / "bases")

    def jobs(path: Path) -> Iterator[Job]:
        return experiment.jobs(do, partial(read_lines, path))

    return experiment.name, jobs, modules_of(experiment.task)


def of_module(name: str, smoke: bool, outputs: Path) -> Part:
    folder = outputs / name / version(MODULES[name])
    return name, partial(importlib.import_module(name).jobs, smoke, folder), (MODULES[name],)


def run_all(
    parts: Iterable[Part],
    results: Path,
    outputs: Path,
    stale: bool = False,
    confirm: bool = False,
    only: Sequence[str] = (),
) -> int:
    """Does what is not there; with `stale`, also what is there by older code. With `confirm`, the first seed or split
    of it again at the stored rates, and prints how far that is from the stored lines. Returns the exit code."""
    found = not only

    def chosen(jobs: Iterable[Job]) -> Iterator[Job]:
        nonlocal found
        for names, compute in jobs:
            search, values = "seeds" in names, {*map(str, names.values())}
            first = names.get("seed", 0) == 0 and names.get("split", 1) == 1
            if (first or not confirm) and all(word in values or (search and word.isdigit()) for word in only):
                found |= not search
                yield names, compute

    for name, jobs, modules in parts:
        stored = results / f"{name}.jsonl" if confirm else None
        path = (outputs / "again" if confirm else results) / f"{name}.jsonl"
        for search in (line for line in read_lines(stored) if "tuning" in line) if stored else ():
            add_line(path, search, {})

        def counts(line: Line, modules: tuple[str, ...] = modules) -> bool:
            return not stale or line.get("version") == version(*modules)

        outputs.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(outputs / f"{name}.lock", timeout=0):
                code = do_missing(path, partial(chosen, jobs(path)), counts, stored)
        except Timeout:
            print(f"{name}: another process does it")
            found, code = True, 0
        if code:
            return code
    if not found:
        sys.exit(f"argument --only: no job has all of {list(only)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help=f"all if none is given: {', '.join([*MODULES, *experiment_names()])}")
    add("--only", nargs="+", default=[], help="jobs with all of these: case, method, seed, ...")
    add("--smoke", action="store_true", help="a few steps of each, into outputs/")
    add("--stale", action="store_true", help="again what is there by older code, too")
    add("--confirm", action="store_true", help="a seed again, into outputs/, and how far it is from the stored lines")
    add("--results", type=Path, help="where the .jsonl files are; default: results/ beside this file")
    add("--outputs", type=Path, default=Path("outputs/method_comparison"), help="bases, and results of --smoke")
    args = parser.parse_args(argv)
    outputs = args.outputs / "smoke" if args.smoke else args.outputs
    results = args.results or (outputs if args.smoke else HERE / "results")
    try:
        files = [name for name in args.names if name not in MODULES]
        experiments = load_experiments(files, smoke=args.smoke) if files or not args.names else []
        for experiment in experiments:
            if commands := missing_packages(experiment):
                raise ValueError(f"{experiment.name} needs data: {'; '.join(commands)}; or name what does not")
    except ValueError as error:
        parser.error(str(error))
    kept = outputs / "again" if args.confirm else outputs
    parts = [of_module(name, args.smoke, kept) for name in MODULES if name in (args.names or MODULES)]
    parts += [of_experiment(experiment, outputs) for experiment in experiments]
    parts.sort(key=lambda part: LONGEST.index(part[0]) if part[0] in LONGEST else len(LONGEST))
    return run_all(parts, results, outputs, args.stale, args.confirm, args.only)


if __name__ == "__main__":
    sys.exit(main())
