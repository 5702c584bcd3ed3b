"""Run the experiments whose results are not there yet: every method, case and seed, and the search for rates.

    python examples/method_comparison/run.py
    python examples/method_comparison/run.py --smoke
    python examples/method_comparison/run.py pde_elliptic images_kan --jobs 2
    python examples/method_comparison/run.py --confirm
    python examples/method_comparison/run.py pde_elliptic --stale

An experiment's results are results/<experiment>.jsonl. A run is done once for all experiments that it is part of, and
again if a setting changes; with --stale, also if the code has changed that it depends on. --confirm does one run of
each method again whose results are by older code: if its course is the same to the last digit, they count as results
of the code as it is. Stop it when you like, the same command goes on: every run is kept below outputs/. Tables and
pictures come from `python examples/method_comparison/report.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from command_line import exit_code, new_parser, positive_int
from compared_methods import FROM_SCRATCH
from experiments import Experiment, Run, experiment_names, load_experiments, missing_packages
from lines import Results, confirm_lines, is_older, older_methods, write_lines
from perform import base_path, perform, train_base
from tqdm import tqdm

HERE = Path(__file__).parent


def do_all(
    job: Any, runs: list[Run], executor: ProcessPoolExecutor | None, cache: Path, bases: Path, title: str
) -> None:
    """`job` for every run, in the executor's processes or in this one, behind one progress bar."""
    with tqdm(total=len(runs), desc=title, unit="run", dynamic_ncols=True, disable=not runs) as bar:

        def done(run: Run, wait: Callable[[], None]) -> None:
            try:
                wait()
            except BrokenProcessPool:
                raise SystemExit(f"A process ended early (out of memory?), at the latest in {asdict(run)}.") from None
            except Exception as error:
                raise RuntimeError(f"this run failed: {asdict(run)}") from error
            bar.set_postfix_str(f"{run.method['method']}, seed {run.seed}", refresh=False)
            bar.update()

        if executor is None:
            for run in runs:
                done(run, partial(job, run, cache, bases))
        else:
            futures = {executor.submit(job, run, cache, bases): run for run in runs}
            for future in as_completed(futures):
                done(futures[future], future.result)


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """None where one job at a time is enough."""
    if jobs == 1:
        yield None
        return
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _worker)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a word


def missing(experiments: list[Experiment], title: str, results: Path, cache: Path, stale: bool) -> list[Run]:
    """The runs without a result, or with `stale` without one of the code as it is, each once."""
    by_key = {}
    for experiment in experiments:
        found = Results(experiment.name, results, cache)
        every = experiment.all_final_runs(found) if title == "runs" else experiment.all_tuning_runs(found)
        by_key |= {run.key: run for run in every if run not in found or stale and is_older(run, found[run])}
    return list(by_key.values())


def run_all(experiments: list[Experiment], jobs: int, results: Path, outputs: Path, stale: bool = False) -> None:
    """Bases, then the search for learning rates, then the reported runs; only what is not there."""
    cache, bases = outputs / "runs", outputs / "bases"
    try:
        with processes(jobs) as executor:
            for title in ("learning rates", "runs"):
                while runs := missing(experiments, title, results, cache, stale):  # a search may go on
                    needed = {base_path(run, bases): run for run in runs if run.method["method"] not in FROM_SCRATCH}
                    untrained = [run for path, run in needed.items() if not path.exists()]
                    do_all(train_base, untrained, executor, cache, bases, f"bases for {title}")
                    do_all(perform, runs, executor, cache, bases, title)
    finally:
        for experiment in experiments:
            write_lines(experiment, results, cache)


def confirm_all(experiments: list[Experiment], jobs: int, results: Path, outputs: Path) -> list[str]:
    """One run again of each method with results by older code; those whose run gives the same then count as new.

    Returns:
        A line of text for each such method.
    """
    cache, bases = outputs / "runs", outputs / "bases"
    chosen = {experiment.name: older_methods(experiment, results) for experiment in experiments}
    runs = {run.key: run for of_methods in chosen.values() for run in of_methods.values()}
    again = Results("", cache, cache)  # single runs only
    waiting = [run for run in runs.values() if run not in again or is_older(run, again[run])]
    needed = {base_path(run, bases): run for run in waiting if run.method["method"] not in FROM_SCRATCH}
    untrained = [run for path, run in needed.items() if not path.exists()]
    with processes(jobs) as executor:
        do_all(train_base, untrained, executor, cache, bases, "bases")
        do_all(perform, waiting, executor, cache, bases, "runs")
    again = Results("", cache, cache)  # anew, since it remembers what it has read
    return [text for e in experiments for text in confirm_lines(e, results, chosen[e.name], again)]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help=f"experiments; all if none is given: {', '.join(experiment_names())}")
    add("--smoke", action="store_true", help="a few steps of each, into outputs/")
    add("--large", action="store_true", help="the larger sizes of the files, for an accelerator; into outputs/")
    older = parser.add_mutually_exclusive_group()
    older.add_argument("--stale", action="store_true", help="again what is there by older code, too")
    older.add_argument(
        "--confirm", action="store_true", help="of what is there by older code, one run of each method, to compare"
    )
    add("--jobs", type=positive_int, default=1, help="runs at a time, each in one thread")
    add("--results", type=Path, help="where the .jsonl files are; default: results/ beside this file")
    add(
        "--outputs",
        type=Path,
        default=Path("outputs/method_comparison"),
        help="bases, single runs, and results of --smoke and --large",
    )
    args = parser.parse_args(argv)
    try:
        args.experiments = load_experiments(args.names, smoke=args.smoke, large=args.large)
    except ValueError as error:
        parser.error(str(error))
    for experiment in args.experiments:
        if commands := missing_packages(experiment):
            parser.error(f"{experiment.name} needs data: {'; '.join(commands)}; or name the experiments without it")
    sizes = [name for name in ("smoke", "large") if getattr(args, name)]
    args.results = args.results or (args.outputs / "_".join(sizes) if sizes else HERE / "results")
    return args


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = parse_arguments(argv)

    def work() -> None:
        if args.confirm:
            print(*confirm_all(args.experiments, args.jobs, args.results, args.outputs), sep="\n")
        else:
            run_all(args.experiments, args.jobs, args.results, args.outputs, args.stale)

    return exit_code(
        work,
        "The runs that were done are stored; the same command goes on from there.",
    )


if __name__ == "__main__":
    sys.exit(main())
