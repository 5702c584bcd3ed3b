"""Tables and pictures of the results, written into README.md between its markers, and into images/.

    python examples/method_comparison/report.py
    python examples/method_comparison/report.py --smoke --readme outputs/method_comparison/smoke/README.md

Every experiment has a part of README.md between `<!-- begin NAME -->` and `<!-- end NAME -->`, with a row for each
method. The first method of an experiment is the reference that the others are compared with. Only the lines of
results/*.jsonl are read; the tables of aims and rates are written when no experiment is named.

A result that lacks is an error. One by older code (every line names the version of what it depends on) is not: to do
all runs again takes hours, and many changes of the code change no result. Below a table then stands how many runs are
by older code; `run.py --stale` does them again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from aims import aims
from command_line import new_parser
from drawings import PICTURES
from experiments import Experiment, experiment_names, load_experiments
from lines import Results, is_older
from rates import rates
from reporting import write_atomically
from rows import NONE, Case, Row, case_of, table

HERE = Path(__file__).parent
WIDE = 3  # cases; more of them have a table in common


def number(value: float | None) -> str:
    if value is None or value in (float("inf"), float("-inf")):
        return "diverged"
    return f"{value:.2e}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.3g}"


def spread(case: Case, values: list[float | None]) -> str:
    """median (least–greatest)"""
    text = number(case.middle(values))
    known = [value for value in values if value is not None]
    return f"{text} ({number(min(known))}–{number(max(known))})" if len(known) > 1 else text


def size(row: Row) -> str:
    """The trained numbers, and the stored ones where they are more."""
    result = row.results[0]
    text = f"{row.trainable:,} ({row.trainable / result['coefficients']:.1%})"
    if result.get("stored", 0) > row.trainable:
        text += f", {result['stored']:,} stored"
    return text + (" above the budget" if result["above_budget"] else "")


def rate(row: Row) -> str:
    return NONE if row.lr is None else f"{row.lr:g}{' (edge)' if row.edge else ''}"


def table_of_case(case: Case) -> str:
    """Same steps and same seconds, beside the reference."""
    clock = "CPU s" if "cpu" in case.reference.results[0]["environment"]["device"] else "s"
    rows = []
    if case.zero_shot is not None:
        zero = [result["zero_shot"] for result in case.reference.results]
        rows.append(["zero-shot", "0", NONE, spread(case, zero), case.relative(zero), NONE, NONE, NONE])
    for label, row in case.rows.items():
        same = row.at(case.reference.seconds)
        rows.append(
            [
                label,
                size(row),
                rate(row),
                spread(case, row.finals),
                case.relative(row.finals),
                f"{row.seconds:.1f}",
                spread(case, same),
                case.relative(same),
            ]
        )
    first = next(iter(case.experiment.methods))
    header = ["", "trainable", "rate", f"{case.task.metric}, last step", f"to {first}", clock]
    return table([*header, f"{case.task.metric} at the {clock} of {first}", f"to {first}"], rows)


def table_of_cases(cases: list[Case], values: Callable[[Case, Row], list[float | None]]) -> str:
    rows = []
    for label in cases[0].experiment.methods:
        found = [case.rows.get(label) for case in cases]
        first = next((row for row in found if row), None)
        cells = [
            f"{spread(case, values(case, row))}, {case.relative(values(case, row))}" if row else "not run"
            for case, row in zip(cases, found, strict=True)
        ]
        rows.append([label, size(first) if first else NONE, *cells])
    return table(["", "trainable", *(case.name for case in cases)], rows)


def tables(cases: list[Case]) -> str:
    if len(cases) <= WIDE:
        return "\n\n".join((f"**{case.name}**\n\n" if case.name else "") + table_of_case(case) for case in cases)
    first, metric = next(iter(cases[0].experiment.methods)), cases[0].task.metric
    same = table_of_cases(cases, lambda case, row: row.at(case.reference.seconds))
    return (
        f"{metric[0].upper()}{metric[1:]} after the last step; beside it, relative to {first}:\n\n"
        f"{table_of_cases(cases, lambda case, row: row.finals)}\n\n"
        f"The same at the seconds that {first} has taken:\n\n{same}"
    )


def updated(text: str, name: str, title: str, content: str) -> str:
    """The text with `content` between the markers of `name`, which are added at the end if they are not there.

    Raises:
        ValueError: if one is missing, or there twice.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n".lstrip()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the README should have one {begin} and one {end}: add them where the results shall stand")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def lacking(experiment: Experiment, found: Results) -> int:
    """How many runs are not there; of the search for rates, as long as some of these are not."""
    searched = sum(run not in found for run in experiment.all_tuning_runs(found))
    return searched or sum(run not in found for run in experiment.all_final_runs(found))


def older_code(experiments: list[Experiment], results: Mapping[str, Results], options: str) -> str:
    """A line on the runs by older code; empty if there are none."""
    older = count = 0
    for experiment in experiments:
        found = results[experiment.name]
        runs = [*experiment.all_tuning_runs(found), *experiment.all_final_runs(found)]
        count += len(runs)
        older += sum(is_older(run, found[run]) for run in runs)
    if not older:
        return ""
    name = f" {experiments[0].name}" if len(experiments) == 1 else ""
    return f"\n\nOlder code: {older} of {count} runs; `run.py{name}{options} --stale` does them again."


def report(
    experiments: list[Experiment], folder: Path, readme: Path, options: str = "", whole: bool = True
) -> list[Path]:
    """Writes the tables and pictures, `whole`: those of aims and rates, too; returns the files written.

    Raises:
        ValueError: if a result lacks, before anything is written; `options` are those of run.py that it has run with.
    """
    results = {experiment.name: Results(experiment.name, folder) for experiment in experiments}
    lacks = [(e.name, count) for e in experiments if (count := lacking(e, results[e.name]))]
    if lacks:
        files = ", ".join(f"{name}.jsonl lacks {count} runs" for name, count in lacks)
        command = " ".join(["python examples/method_comparison/run.py", *(name for name, _ in lacks)])
        raise ValueError(f"{folder}: {files}: {command}{options}; or name the experiments to report")
    text = readme.read_text() if readme.exists() else ""
    written, images = [], readme.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for experiment in experiments:
        cases = [case_of(experiment, name, results[experiment.name]) for name in experiment.cases]
        content = tables(cases) + older_code([experiment], results, options)
        for picture in experiment.pictures:
            path = images / f"{experiment.name}_{picture}.png"
            figure = PICTURES[picture](cases)
            write_atomically(path, lambda p, f=figure: f.savefig(p, dpi=90, format="png"))
            content += f"\n\n![{experiment.title}: {picture}](images/{path.name})"
            written.append(path)
        text = updated(text, experiment.name, experiment.title, content)
    common = {("aims", "Aims"): aims, ("rates", "Learning rates"): rates} if whole else {}
    for (name, title), table_of in common.items():
        if content := table_of(experiments, results):
            text = updated(text, name, title, content + older_code(experiments, results, options))
    write_atomically(readme, lambda p: p.write_text(text.rstrip() + "\n"))
    return [*written, readme]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help=f"experiments; all if none is given: {', '.join(experiment_names())}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="what run.py --smoke has done")
    size.add_argument("--large", action="store_true", help="what run.py --large has done")
    add("--results", type=Path, help="where the .jsonl files are; default: as in run.py")
    add("--outputs", type=Path, default=Path("outputs/method_comparison"), help="that of run.py")
    add("--readme", type=Path, help="file with the markers, made if it is not there; pictures go beside it")
    args = parser.parse_args(argv)
    try:
        args.experiments = load_experiments(args.names, smoke=args.smoke, large=args.large)
    except ValueError as error:
        parser.error(str(error))
    size = "smoke" if args.smoke else "large" if args.large else None
    args.options = f" --{size}" if size else ""
    args.results = args.results or (args.outputs / size if size else HERE / "results")
    args.readme = args.readme or (args.outputs / size if size else HERE) / "README.md"
    args.readme.parent.mkdir(parents=True, exist_ok=True)
    return args


def main() -> int:
    args = parse_arguments()
    try:
        for path in report(args.experiments, args.results, args.readme, args.options, not args.names):
            print(f"Written: {path}")
    except ValueError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
