"""Writes the tables and pictures of all pages from the lines in results/, between the markers of the pages.

    python examples/method_comparison/report.py
    python examples/method_comparison/report.py --ratio "LoTRA 1/10, LM" "full, LM"    # the ratio of their medians

Nothing is run. Each row is a method, with the median over seeds and the range.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean, median

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("", "benchmarks")]  # modules of other examples
from command_line import new_parser
from drawings import PDE_LABELS, draw_families, draw_few_samples, draw_pdes
from family_tasks import ALL_CASES, CASES, WIDER
from few_sample_methods import METHODS
from found import FAMILY_ENTRIES, PDES, Entry, Experiments, Family, FewSamples, Line, Run
from matplotlib.figure import Figure
from reporting import write_atomically

HERE = Path(__file__).parent
NONE = "–"
SAMPLES = (1, 3, 5, 10, 50)
DRAWN = {
    "fluids": "fluids", "fluids_20": "20 fluids known", "fluids_5": "5 fluids known", "oscillators": "oscillators",
}  # fmt: skip


def short(value: float) -> str:
    """Two digits of an error; three of what is above 1."""
    if not isfinite(value):
        return "diverged"
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def spread(values: Sequence[float], show: Callable[[float], str] = short) -> str:
    """median (least–greatest)"""
    text = show(median(values))
    return f"{text} ({show(min(values))}–{show(max(values))})" if len(values) > 1 else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def updated(text: str, name: str, content: str) -> str:
    """The text with `content` between the markers of `name`.

    Raises:
        ValueError: if one of them is missing, or there twice.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page should have one {begin} and one {end}: add them where the table shall stand")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def number(value: float) -> str:
    """Two digits, and no exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def metrics(runs: Sequence[Run], show: Callable[[float], str] = short) -> str:
    return spread([run.metric for run in runs], show)


def seconds(runs: Sequence[Run]) -> str:
    return number(median(run.seconds for run in runs))


def of_text(found: dict[str, list[Run]]) -> str:
    rows = [
        [label, f"{runs[0].trained:,}", metrics(runs, lambda value: f"{value:.2f}"), seconds(runs)]
        for label, runs in found.items()
    ]
    return table(["", "numbers", "nats", "CPU s"], rows)


def by_case(found: dict[str, dict[str, list[Run]]], cell: Callable[[Sequence[Run]], str]) -> list[list[str]]:
    """A row for each label, and a cell for each case."""
    labels = dict.fromkeys(label for of in found.values() for label in of)
    return [[label, *(cell(of[label]) if label in of else NONE for of in found.values())] for label in labels]


def of_pdes(found: dict[str, dict[str, list[Run]]]) -> str:
    """Errors on all PDEs, and the seconds on the first; other sizes, and LoRA by Adam and LM, are in the picture."""
    first, cells = next(iter(found.values())), {label: row for label, *row in by_case(found, metrics)}
    rows = [
        [f"{label} ({first[label][0].trained:,})", *cells[label], seconds(first[label])]
        for label in PDE_LABELS
        if label in first
    ]
    return table(["(numbers)", *found, "CPU s, Poisson"], rows)


def of_widths(found: dict[str, dict[str, list[Run]]], bases: dict[str, dict[str, list[Run]]]) -> str:
    """Errors and seconds; before them the error of each base where it was trained, and at the target."""
    rows = [
        [label, *(spread([run.before for run in next(iter(of.values()))]) for of in part.values())]
        for label, part in {"the base, where it was trained": bases, "the base, as it is": found}.items()
    ]
    rows += by_case(found, lambda runs: f"{metrics(runs)}, {seconds(runs)} s")
    return table(["", *found], rows)


def of_families(families: dict[str, Family], costs: str = "") -> str:
    """Medians of all families; before them numbers and seconds of one of them, if named."""
    rows = []
    for label, entry in FAMILY_ENTRIES.items():
        cells = [short(median(e)) if (e := family.errors(entry)) else NONE for family in families.values()]
        if {*cells} != {NONE}:
            rows.append([label, *(costs_of(families[costs], entry) if costs else []), *cells])
    header = ["numbers once", "CPU s once", "numbers for a task", "CPU s for a task"] if costs else []
    titles = (f"{ALL_CASES[case].title} ({family.seeds})" for case, family in families.items())
    return table(["(seeds)", *header, *titles], rows)


def costs_of(family: Family, entry: Entry) -> list[str]:
    """Numbers and seconds once, and for a task."""
    lines = family.lines[entry.method]
    ((offline, online),) = {(line["numbers"]["offline"], line["numbers"]["online"]) for line in lines}
    once = median(line["offline_seconds"] for line in lines)
    spent = [f"{online:,}", number(median(s for s, _ in family.values(entry)))] if entry.step != 0 else [NONE] * 2
    return [f"{offline:,}" if offline else NONE, f"{once:.0f}" if once else NONE, *spent]


def of_convection(lines: Sequence[Line]) -> str:
    rows, ranges = [], list(dict.fromkeys(line["range"] for line in lines))
    for method in dict.fromkeys(line["method"] for line in lines):
        cells = []
        for name in ranges:
            found = [line for line in lines if (line["range"], line["method"]) == (name, method)]
            courses = [task["marks"] for line in found for task in line["tasks"]]
            first = [course[0][2] for course in courses if course[0][0] == 0]
            cells += [spread(first) if first else NONE, spread([course[-1][2] for course in courses])]
        once, of_task = found[0]["once"], found[0]["tasks"][0]["numbers"]
        spent = number(median(line["seconds"] for line in found))
        rows.append([f"{method} ({len(found)})", f"{once:,}" if once else NONE, f"{of_task:,}", spent, *cells])
    header = ["(seeds)", "numbers once", "for a task", f"CPU s once, {ranges[-1]}"]
    return table([*header, *(f"β in {name}, {when}" for name in ranges for when in ("as it is", "tuned"))], rows)


def of_fluids(domain: FewSamples) -> str:
    rows = []
    for method in METHODS:
        lines = domain.of(method)
        once, task = lines[0]["numbers"]
        inside = [part for line in lines for part in line["samples"]["5"].get("inside", [])]
        spent = domain.seconds(method, 5)
        errors = [f"{domain.median(method, n):.2g}" for n in SAMPLES]
        cells = [f"{100 * mean(inside):.0f} %" if inside else NONE, number(1000 * spent)]
        rows.append([method, f"{once:,}", f"{task:,}" if task else NONE, *errors, *cells])
    return table(["", "numbers once", "for a task", *(f"n = {n}" for n in SAMPLES), "in 95 %", "ms"], rows)


def pages(results: Path) -> tuple[dict[str, dict[str, str]], dict[str, Figure]]:
    """The tables of each page by their markers, and the pictures by their names."""
    experiments = Experiments(results)
    pdes = {name: experiments.of_pde(pde) for name, pde in PDES.items()}
    families, wider = (
        {case: Family(case, experiments.lines("families")) for case in cases} for cases in (CASES, WIDER)
    )
    domains = {name: FewSamples(name, experiments.lines("few_samples")) for name in DRAWN}
    images = experiments.of("images_kan") | experiments.of("images_resnet") | experiments.of("images_wide")
    tables = {
        "pages/pdes.md": {"PDEs": of_pdes(pdes)},
        "pages/widths.md": {
            "widths": of_widths(experiments.of_widths(), experiments.of("pde_bases")),
            "families": of_families(wider),
        },
        "pages/transformers_and_images.md": {
            "digits": table(["", *images], by_case(images, lambda runs: metrics(runs, lambda value: f"{value:.0f}"))),
            "large": of_text(experiments.of("text_large")[""]),
        },
        "families.md": {
            "families": of_families(families, costs="elliptic"),
            "convection": of_convection(experiments.lines("convection")),
        },
        "few_samples.md": {"fluids": of_fluids(domains["fluids"])},
    }
    figures = {
        "pdes": draw_pdes(pdes),
        "families": draw_families({ALL_CASES[case].title: family for case, family in families.items()}),
        "few_samples": draw_few_samples({title: domains[name] for name, title in DRAWN.items()}),
    }
    return tables, figures


def medians(results: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """(error or loss, seconds) of each label in each case; images and convection are left out."""
    experiments = Experiments(results)
    runs = {name: experiments.of_pde(pde) for name, pde in PDES.items()} | experiments.of_widths()
    runs["characters"] = experiments.of("text_large")[""]
    found = {}
    for case, by_label in runs.items():
        found[case] = {k: (median(r.metric for r in of), median(r.seconds for r in of)) for k, of in by_label.items()}
    for case, of_case in ALL_CASES.items():
        family = Family(case, experiments.lines("families"))
        found[f"family, {of_case.title}"] = {
            label: (median(family.errors(entry)), median(seconds for seconds, _ in values))
            for label, entry in FAMILY_ENTRIES.items()
            if (values := family.values(entry))
        }
    for name in DRAWN:
        domain = FewSamples(name, experiments.lines("few_samples"))
        for n in domain.lines[0]["samples"]:
            found[f"{name}, n = {n}"] = {k: (domain.median(k, n), domain.seconds(k, n)) for k in domain.methods}
    return found


def ratios(found: dict[str, dict[str, tuple[float, float]]], one: str, other: str) -> list[str]:
    """A line for each case that has both labels: the metric and the seconds of one over those of the other.

    Raises:
        ValueError: if no case has both.
    """
    both = {case: (of[one], of[other]) for case, of in found.items() if one in of and other in of}
    if not both:
        known = sorted({label for of in found.values() for label in of})
        raise ValueError(f"argument --ratio: no case has both {one!r} and {other!r}; there are {known}")
    return [
        f"{case}: {number(a / b)} ×" + (f", in {number(s / t)} × the seconds" if s and t else "")
        for case, ((a, s), (b, t)) in both.items()
    ]


def report(results: Path, source: Path, folder: Path) -> list[Path]:
    """Writes the pages of `source` with their tables into `folder`, and the pictures; returns the files written.

    Raises:
        ValueError: if a line or a marker is missing, before anything is written.
    """
    tables, figures = pages(results)
    texts = {}
    for name, contents in tables.items():
        text = (source / name).read_text()
        for marker, content in contents.items():
            text = updated(text, marker, content)
        texts[folder / name] = text
    pictures = {folder / "images" / f"{name}.png": figure for name, figure in figures.items()}
    for path in (*texts, *pictures):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_atomically(path, lambda partial, text=text: partial.write_text(text))
    for path, figure in pictures.items():
        write_atomically(path, lambda partial, figure=figure: figure.savefig(partial, dpi=90, format="png"))
    return [*texts, *pictures]


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the .jsonl files")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the pages and pictures are written")
    parser.add_argument(
        "--ratio",
        nargs=2,
        metavar=("ROW", "OTHER"),
        help="print the ratio of two rows instead, for each case that has both",
    )
    args = parser.parse_args(argv)
    try:
        if args.ratio:
            print(*ratios(medians(args.results), *args.ratio), sep="\n")
            return 0
        for path in report(args.results, HERE, args.folder):
            print(f"Written: {path}")
    except ValueError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
