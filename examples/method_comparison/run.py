"""Run the experiments whose results are not there yet: every method, case and seed, and the search for rates.

    python examples/method_comparison/run.py
    python examples/method_comparison/run.py --smoke
    python examples/method_comparison/run.py pde_elliptic images_kan
    python examples/method_comparison/run.py pde_elliptic --stale

Every search and every run is a line of results/<experiment>.jsonl, and every base a file below outputs/: stop it when
you like, the same command goes on. A run is done again if a setting changes; with --stale, also if the code has
changed that it depends on. Tables and pictures come from `python examples/method_comparison/report.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from command_line import new_parser
from experiments import Experiment, experiment_names, load_experiments, missing_packages
from jobs import Line, add_line, do_missing, read_lines
from perform import perform
from version import modules_of, version

HERE = Path(__file__).parent


def run_all(
    experiments: list[Experiment], results: Path, outputs: Path, stale: bool = False, confirm: bool = False
) -> int:
    """Does what is not there; with `stale`, also what is there by older code. With `confirm`, one seed of it again at
    the stored rates, and prints how far that is from the stored lines. Returns the exit code."""
    for experiment in experiments:
        stored = results / f"{experiment.name}.jsonl" if confirm else None
        path = (outputs / "again" if confirm else results) / f"{experiment.name}.jsonl"
        if stored:
            experiment = replace(experiment, seeds=experiment.seeds[:1])
            for search in (line for line in read_lines(stored) if "tuning" in line):
                add_line(path, search, {})

        def counts(line: Line, task: str = experiment.task) -> bool:
            return not stale or line["version"] == version(*modules_of(task))

        do = partial(perform, bases=outputs / "bases")
        jobs = partial(experiment.jobs, do, partial(read_lines, path))
        if code := do_missing(path, jobs, counts, stored):
            return code
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help=f"experiments; all if none is given: {', '.join(experiment_names())}")
    add("--smoke", action="store_true", help="a few steps of each, into outputs/")
    add("--stale", action="store_true", help="again what is there by older code, too")
    add(
        "--confirm", action="store_true", help="one seed again, into outputs/, and how far it is from the stored lines"
    )
    add("--results", type=Path, help="where the .jsonl files are; default: results/ beside this file")
    add("--outputs", type=Path, default=Path("outputs/method_comparison"), help="bases, and results of --smoke")
    args = parser.parse_args(argv)
    try:
        experiments = load_experiments(args.names, smoke=args.smoke)
    except ValueError as error:
        parser.error(str(error))
    for experiment in experiments:
        if commands := missing_packages(experiment):
            parser.error(f"{experiment.name} needs data: {'; '.join(commands)}; or name the experiments without it")
    results = args.results or (args.outputs / "smoke" if args.smoke else HERE / "results")
    return run_all(experiments, results, args.outputs, args.stale, args.confirm)


if __name__ == "__main__":
    sys.exit(main())
