"""Tables and pictures of the results: a page for each experiment, and an overview of all of them in README.md.

    python examples/method_comparison/report.py
    python examples/method_comparison/report.py --smoke
    python examples/method_comparison/report.py pde_elliptic --older

Every experiment has a page, pages/<experiment>.md, with a row for each method. The first method of an experiment is
the reference that the others are compared with. Only the lines of results/*.jsonl are read. If no experiment is named,
README.md gets the overview and the aims, between its markers.

A missing result is an error, and so is one by older code: every line names the version of what it depends on.
`run.py --stale` does these runs again. With --older they are reported, and the page says how many they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from aims import aims, rows_by, within_a_tenth
from command_line import new_parser
from drawings import PICTURES
from experiments import Experiment, experiment_names, load_experiments
from lines import Results, is_older
from reporting import write_atomically
from rows import NONE, Case, Row, case_of, table

HERE = Path(__file__).parent
WIDE = 3  # cases; more of them have a table in common
ADAPTERS = {"LoTRA": ("lotra",), "PEFT's methods": ("lora", "lora_parameters", "loha", "lokr")}


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


def memory(row: Row) -> str:
    """The most that tensors take during a step, in MB."""
    return f"{row.results[0]['step_bytes'] / 1e6:.3g}" if "step_bytes" in row.results[0] else NONE


def table_of_case(case: Case) -> str:
    """Same steps and same seconds, beside the reference."""
    clock = "CPU s" if "cpu" in case.reference.results[0]["environment"]["device"] else "s"
    rows = []
    if case.zero_shot is not None:
        zero = [result["zero_shot"] for result in case.reference.results]
        rows.append(["zero-shot", "0", NONE, spread(case, zero), case.relative(zero), NONE, NONE, NONE, NONE])
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
                memory(row),
                spread(case, same),
                case.relative(same),
            ]
        )
    first = next(iter(case.experiment.methods))
    header = ["", "trainable", "rate", f"{case.task.metric}, last step", f"to {first}", clock, "MB"]
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


def overview(experiments: list[Experiment], results: Mapping[str, Results]) -> str:
    """For every case: the reference and the best of full fine-tuning, of adapters within a tenth, and from scratch."""
    rows, others = [], []
    for experiment in experiments:
        link = f"[{experiment.title}](pages/{experiment.name}.md)"
        if next(iter(experiment.methods.values()))["method"] != "full":
            others.append(link)
            continue
        for name in experiment.cases:
            case = case_of(experiment, name, results[experiment.name])
            of_adapters = [within_a_tenth(rows_by(case, methods)) for methods in ADAPTERS.values()]
            found = [[case.reference], rows_by(case, ("full",)), *of_adapters, rows_by(case, ("scratch",))]
            title = link + (f", {name}" if name else "")
            if optimizers := useless_base(case):
                title += f" † {', '.join(optimizers)}"
            rows.append([title, *(in_short(case, case.best(some)) for some in found)])
    header = ["task", "reference", "best full fine-tuning", *(f"{name}, ≤ 1/10" for name in ADAPTERS), "from scratch"]
    text = table(header, rows) + (
        "\n\n† By this optimizer training from scratch is as good as full fine-tuning, at most 1.1 × its error or a "
        "point below it: the base does not help."
    )
    return text + (f"\n\nPages without full fine-tuning: {', '.join(others)}." if others else "")


def in_short(case: Case, row: Row | None) -> str:
    """Its last metric, its seconds and its name."""
    return f"{number(case.middle(row.finals))} in {row.seconds:.1f} s ({row.label})" if row else NONE


def useless_base(case: Case) -> list[str]:
    """The optimizers by which training from scratch is as good as full fine-tuning."""
    found = []
    for optimizer, name in {"adam": "Adam", "soap": "SOAP", "lm": "LM"}.items():
        scratch, full = (rows_by(case, (method,), (optimizer,)) for method in ("scratch", "full"))
        if scratch and full:
            ours, theirs = (case.middle(rows[0].finals) for rows in (scratch, full))
            if ours >= theirs - 1 if case.task.higher_is_better else ours <= 1.1 * theirs:
                found.append(name)
    return found


def by_older_code(experiment: Experiment, found: Results) -> tuple[int, int]:
    """How many runs are by older code, and how many there are."""
    runs = [*experiment.all_tuning_runs(found), *experiment.all_final_runs(found)]
    return sum(is_older(run, found[run]) for run in runs), len(runs)


def page(experiment: Experiment, found: Results, images: Path, options: str) -> tuple[str, list[Path]]:
    """The experiment's page, and the pictures on it, which are written."""
    cases, pictures = [case_of(experiment, name, found) for name in experiment.cases], []
    content = [f"# {experiment.title}", experiment.about, tables(cases)]
    for picture in experiment.pictures:
        path = images / f"{experiment.name}_{picture}.png"
        figure = PICTURES[picture](cases)
        write_atomically(path, lambda p, f=figure: f.savefig(p, dpi=90, format="png"))
        content.append(f"![{experiment.title}: {picture}](../images/{path.name})")
        pictures.append(path)
    content.append(experiment.reading and f"**Reading.** {experiment.reading}")
    older, count = by_older_code(experiment, found)
    if older:
        command = f"run.py {experiment.name}{options} --stale"
        content.append(f"By older code: {older} of {count} runs; `{command}` does them again.")
    content.append("[All experiments](../README.md)")
    return "\n\n".join(filter(None, content)) + "\n", pictures


def report(
    experiments: list[Experiment],
    folder: Path,
    readme: Path,
    options: str = "",
    whole: bool = True,
    with_older: bool = False,
) -> list[Path]:
    """Writes the pages and their pictures, and returns the files.

    `whole`: also overview and aims in the README.

    Args:
        options: those of run.py that it has run with.
        with_older: also results by older code.

    Raises:
        ValueError: if a result is missing or by older code, before anything is written.
    """
    results = {experiment.name: Results(experiment.name, folder) for experiment in experiments}
    run = "python examples/method_comparison/run.py"
    missing = {e.name: count for e in experiments if (count := lacking(e, results[e.name]))}
    if missing:
        files = ", ".join(f"{name}.jsonl lacks {count} runs" for name, count in missing.items())
        raise ValueError(f"{folder}: {files}: {run} {' '.join(missing)}{options}; or name the experiments to report")
    old = {e.name: by_older_code(e, results[e.name])[0] for e in experiments}
    if any(old.values()) and not with_older:
        files = ", ".join(f"{name}.jsonl has {count} runs" for name, count in old.items() if count)
        names = " ".join(name for name, count in old.items() if count)
        raise ValueError(f"{folder}: {files} by older code: {run} {names}{options} --stale; or --older reports them")
    text = readme.read_text() if readme.exists() else ""
    for (name, title), table_of in (
        {("overview", "Overview"): overview, ("aims", "Aims"): aims}.items() if whole else ()
    ):
        if content := table_of(experiments, results):
            text = updated(text, name, title, content)
    written, images, pages = [], readme.parent / "images", readme.parent / "pages"
    for path in (images, pages):
        path.mkdir(parents=True, exist_ok=True)
    for experiment in experiments:
        content, pictures = page(experiment, results[experiment.name], images, options)
        path = pages / f"{experiment.name}.md"
        write_atomically(path, lambda p, content=content: p.write_text(content))
        written += [*pictures, path]
    if whole:
        write_atomically(readme, lambda p: p.write_text(text.rstrip() + "\n"))
        written.append(readme)
    return written


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help=f"experiments; all if none is given: {', '.join(experiment_names())}")
    for size in ("smoke", "large"):
        add(f"--{size}", action="store_true", help=f"what run.py --{size} has done")
    add("--older", action="store_true", help="also results by older code")
    add("--results", type=Path, help="where the .jsonl files are; default: as in run.py")
    add("--outputs", type=Path, default=Path("outputs/method_comparison"), help="that of run.py")
    add("--readme", type=Path, help="file with the markers, made if it is not there; pages and pictures go beside it")
    args = parser.parse_args(argv)
    try:
        args.experiments = load_experiments(args.names, smoke=args.smoke, large=args.large)
    except ValueError as error:
        parser.error(str(error))
    sizes = [name for name in ("smoke", "large") if getattr(args, name)]
    args.options = "".join(f" --{size}" for size in sizes)
    folder = args.outputs / "_".join(sizes)
    args.results = args.results or (folder if sizes else HERE / "results")
    args.readme = args.readme or (folder if sizes else HERE) / "README.md"
    args.readme.parent.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        for path in report(args.experiments, args.results, args.readme, args.options, not args.names, args.older):
            print(f"Written: {path}")
    except ValueError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
