"""Run the experiments whose results are not there yet: every method, case and seed, and the search for rates.

    python examples/method_comparison/run.py
    python examples/method_comparison/run.py --smoke
    python examples/method_comparison/run.py pde_elliptic slim_functions --jobs 2

A run is a file below results/, named by its settings: it is done once, and again if a setting changes. Stop it when
you like, the same command goes on. Tables and pictures come from `python examples/method_comparison/report.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from accelerate import Accelerator
from command_line import exit_code, new_parser, positive_int
from compared_methods import FROM_SCRATCH, above_budget, apply_method, count_coefficients, stored, trainable
from experiments import Experiment, Run, digest, experiment_names, load_experiments, missing_packages
from reporting import write_atomically
from torch import nn
from tqdm import tqdm
from training import Stopwatch, measured, train_by_lm, train_by_steps

from peft_lotra import update_spectrum

HERE = Path(__file__).parent
BASE_SEED = 7_000  # added for the points of a base, so that they are not those of the target


def perform(run: Run, results: Path, bases: Path) -> None:
    """Does a run and writes its result."""
    torch.set_num_threads(1)  # what others do on the machine then hardly changes the seconds
    device, task = Accelerator().device, run.make_task()
    objective, watch = task.objective("target", run.seed, device), Stopwatch(device)
    method, fresh = run.method, task.build(run.seed)
    scratch = method["method"] in FROM_SCRATCH
    model = (fresh if scratch else trained_base(run, bases, device)).to(device)
    coefficients = count_coefficients(model, task, method)
    numbers, zero_shot = trainable(model), None if scratch else measured(model, objective)
    with watch:
        model = apply_method(model, method, task, objective, run.seed + 1)
    if method.get("optimizer") == "lm":
        marks = train_by_lm(model, objective, method, run.steps, watch)
    else:
        marks = train_by_steps(model, objective, method, method["lr"], run.steps, watch)
    result = {
        "run": asdict(run),
        "metric": task.metric,
        "zero_shot": zero_shot,
        "parameters": numbers,
        "coefficients": coefficients,
        "trainable": trainable(model),
        "stored": stored(model),
        "above_budget": above_budget(model, method, coefficients),
        "marks": [(step, round(seconds, 4), metric) for step, seconds, metric in marks],
        "details": objective.details(model.eval()),
        "environment": environment(device),
    }
    if method["method"] == "full":
        found = update_spectrum(trained_base(run, bases, device), model, task.coefficients(model)).values()
        result["spectra"] = [[[float(f"{x:.4g}") for x in s] for s in spectrum.singular_values] for spectrum in found]
    write_json(run.path(results), result)


def base_path(run: Run, bases: Path) -> Path:
    return bases / f"{run.task}-{digest([run.task, run.make_task().base_settings(), run.seed])}.pt"


def train_base(run: Run, results: Path, bases: Path) -> None:
    """Trains the base that a run needs, and keeps it."""
    torch.set_num_threads(1)
    device, task = Accelerator().device, run.make_task()
    model, objective = task.build(run.seed).to(device), task.objective("base", run.seed + BASE_SEED, device)
    *_, last = train_by_steps(model, objective, {"method": "full"}, task.base_lr, task.base_steps, Stopwatch(device))
    if last.metric is None:
        raise ValueError(f"the base of {run.settings} has diverged: lower `base_lr`, {task.base_lr}")
    path = base_path(run, bases)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: torch.save(model.state_dict(), partial))


def trained_base(run: Run, bases: Path, device: torch.device) -> nn.Module:
    model = run.make_task().build(run.seed)
    model.load_state_dict(torch.load(base_path(run, bases), map_location="cpu", weights_only=True))
    return model.to(device)


def environment(device: torch.device) -> dict[str, str]:
    kind = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"torch": torch.__version__, "device": f"{device.type}, {kind}"}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content, ensure_ascii=False) + "\n"))


def do_all(
    job: Any, runs: list[Run], executor: ProcessPoolExecutor | None, results: Path, bases: Path, title: str
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
                done(run, partial(job, run, results, bases))
        else:
            futures = {executor.submit(job, run, results, bases): run for run in runs}
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


def missing(runs: Iterable[Run], results: Path) -> list[Run]:
    """Those without a result, each once."""
    by_path = {run.path(results): run for run in runs}
    return [run for path, run in by_path.items() if not path.exists()]


def run_all(experiments: list[Experiment], jobs: int, results: Path, bases: Path) -> None:
    """Bases, then the search for learning rates, then the reported runs; only what is not there."""
    with processes(jobs) as executor:
        for title, wanted in (("learning rates", Experiment.all_tuning_runs), ("runs", Experiment.all_final_runs)):
            runs = missing((run for experiment in experiments for run in wanted(experiment, results)), results)
            needed = {base_path(run, bases): run for run in runs if run.method["method"] not in FROM_SCRATCH}
            untrained = [run for path, run in needed.items() if not path.exists()]
            do_all(train_base, untrained, executor, results, bases, f"bases for {title}")
            do_all(perform, runs, executor, results, bases, title)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help=f"experiments; all if none is given: {', '.join(experiment_names())}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="a few steps of each, into outputs/")
    size.add_argument("--large", action="store_true", help="the larger sizes of the files, for an accelerator")
    add("--jobs", type=positive_int, default=1, help="runs at a time, each in one thread")
    add("--results", type=Path, help="where results are kept; default: results/ beside this file")
    add("--outputs", type=Path, default=Path("outputs/method_comparison"), help="bases, and results of --smoke")
    args = parser.parse_args(argv)
    try:
        args.experiments = load_experiments(args.names, smoke=args.smoke, large=args.large)
    except ValueError as error:
        parser.error(str(error))
    for experiment in args.experiments:
        if commands := missing_packages(experiment):
            parser.error(f"{experiment.name} needs data: {'; '.join(commands)}; or name the experiments without it")
    args.results = args.results or (args.outputs / "smoke" if args.smoke else HERE / "results")
    return args


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = parse_arguments()
    return exit_code(
        lambda: run_all(args.experiments, args.jobs, args.results, args.outputs / "bases"),
        "The runs that were done are stored; the same command goes on from there.",
    )


if __name__ == "__main__":
    sys.exit(main())
