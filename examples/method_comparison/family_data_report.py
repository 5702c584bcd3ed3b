"""The section "Families from data" of families.md, from the lines that `family_data.py` has written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from family_data_methods import METHODS
from family_data_tasks import FAMILIES
from family_report import band, seconds, spread, times
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import updated
from reporting import write_atomically
from rows import NONE, table

Line = dict[str, Any]
Values = dict[tuple[int, str], float]  # by seed and task


class Row(NamedTuple):
    """A method before (0) or after (1) its few samples; its line in the picture, if it has one."""

    label: str
    method: str
    when: int = 1
    style: tuple[str, str] | None = None


RIVALS = {"ranges": "parameter as an input", "names": "a head for each task"}
ALONE, FULL, CORE = "LoTRA alone", "full", "family, core"
ROWS = [
    Row("family, as it is", CORE, 0, ("C0", "o-")),
    Row("family, its core", CORE, 1, ("C1", "s-")),
    Row("family, parameter unknown: that alone", "family, unknown parameter", 1, ("C8", "+-")),
    Row("family, parameter unknown: the core from there", "family, unknown, core"),
    Row("{rival}, as it is", "rival", 0, ("C5", "o--")),
    Row("{rival}, everything", "rival", 1, ("C6", "s--")),
    Row("{rival}, parameter unknown: that alone", "rival, unknown parameter"),
    Row("{rival}, the new head alone", "rival, last layer", 1, ("C5", "o--")),
    Row("one adapter for all, as it is", "one adapter", 0),
    Row("one adapter for all, all of it", "one adapter"),
    Row("base, as it is", FULL, 0),
    Row("LoTRA alone", ALONE, 1, ("C2", "^-")),
    Row("LoRA alone", "LoRA alone", 1, ("C7", "x-")),
    Row("everything alone", FULL, 1, ("C4", "D-")),
]


class Case:
    """The lines of a family, those of tuning apart."""

    def __init__(self, name: str, lines: Iterable[Line]) -> None:
        self.name, self.tasks = name, FAMILIES[name](0)
        of_case = [line for line in lines if line["case"] == name]
        self.lines = [line for line in of_case if "tasks" in line]
        self.tuning = {(line["stage"], line["method"]): line["tried"] for line in of_case if "tried" in line}
        self.kind = self.tasks.kinds[0]
        self.places = list(dict.fromkeys(task["place"] for line in self.lines for task in line["tasks"]))

    def label(self, row: Row) -> str:
        return row.label.format(rival=RIVALS[self.kind])

    def of(self, method: str) -> list[Line]:
        return [line for line in self.lines if line["method"] == method]

    def rows(self) -> list[Row]:
        """Of tasks with names, only what comes after their samples."""
        return [row for row in ROWS if self.of(row.method) and (row.when or self.kind == "ranges")]

    def values(self, row: Row, place: str | None = None) -> Values:
        return {
            (line["seed"], str(self.parameter(task))): task["metrics"][row.when]
            for line in self.of(row.method)
            for task in line["tasks"]
            if place in (None, task["place"])
        }

    @staticmethod
    def parameter(task: dict[str, Any]) -> Any:
        return next(value for key, value in task.items() if key not in ("place", "metrics", "seconds"))

    def compared(self, ours: Values, theirs: Values) -> float:
        """The median of differences in points, or of ratios of errors, at the same seed and task."""
        pairs = [(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()]
        return median(a / b if self.tasks.regression else a - b for a, b in pairs)

    def value_of(self, stage: str, line: Line) -> str:
        """The chosen one; whether it is the first or last of those tried."""
        method = line["method"] if stage == "weight decay" else METHODS[line["method"]].once
        tried = list(self.tuning.get((stage, method), {}))
        if not tried:
            return NONE
        text = f"{line[stage]:g}"
        return text + (" (edge)" if text in (tried[0], tried[-1]) else "")


def table_of(case: Case) -> str:
    unit, alone = "relative L2 error" if case.tasks.regression else "accuracy in %", Row("", ALONE)
    rows = []
    for row in case.rows():
        line = case.of(row.method)[0]
        every = [task["seconds"] for line in case.of(row.method) for task in line["tasks"]]
        ratio = case.compared(case.values(row), case.values(alone))
        rows.append(
            [
                case.label(row),
                f"{line['numbers']['once']:,}" if METHODS[row.method].once != "base" else NONE,
                seconds(median(line["once"]["seconds"] for line in case.of(row.method))),
                f"{line['numbers']['task']:,}" if row.when else NONE,
                seconds(median(every)) if row.when else NONE,
                case.value_of("weight decay", line) if row.when else NONE,
                *(spread(list(case.values(row, place).values())) for place in case.places),
                times(ratio) if case.tasks.regression else f"{ratio:+.1f}",
            ]
        )
    header = ["", "numbers once", "CPU s once", "numbers for a task", "CPU s for a task", "weight decay"]
    places = [f"{unit}, {place}" for place in case.places]
    return f"{table([*header, *places, 'to LoTRA alone'], rows)}\n\n{notes(case)}"


def notes(case: Case) -> str:
    once = {"family": CORE, RIVALS[case.kind]: "rival", "base": FULL}
    parts = [f"Seeds: {len({line['seed'] for line in case.lines})}."]
    for label, method in once.items():
        if lines := case.of(method):
            rate = case.value_of("rate", lines[0])
            at = "" if rate == NONE else f", Adam's rate {rate}"
            parts.append(
                f"{label[0].upper()}{label[1:]} on what it was trained on, fresh samples: "
                f"{spread([line['once']['metric'] for line in lines])}{at}."
            )
    return " ".join(parts)


def aims(case: Case) -> str:
    """Of a new angle."""
    rows = []
    for place in case.places:
        for label, method, limit in (("an adapter of its own", ALONE, 5.0), ("full fine-tuning", FULL, 0.0)):
            ours, theirs = case.values(Row("", CORE), place), case.values(Row("", method), place)
            value = case.compared(ours, theirs)
            reached = "yes" if value >= limit else "**no**"
            rows.append([f"the core, points above {label}", place, f"{value:+.1f}", f"≥ {limit:+.0f}", reached])
    return table(["aim for a new angle, 40 samples", "where", "measured", "limit", "reached"], rows)


def draw(cases: list[Case]) -> Figure:
    """The metric over the parameter, or of every named task; between the least and the greatest of the seeds."""
    figure = Figure(figsize=(4.6 * len(cases) + 2.6, 4.4), layout="constrained")
    drawn: dict[str, Any] = {}
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False).flat, cases, strict=True):
        rows = [row for row in case.rows() if row.style]
        (draw_ranges if case.kind == "ranges" else draw_names)(axes, case, rows)
        axes.set(title=case.tasks.title)
        axes.grid(alpha=0.3)
        if case.kind == "ranges":
            drawn |= {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}
    figure.legend(handles=list(drawn.values()), loc="outside right center", fontsize=8)
    return figure


def draw_ranges(axes: Axes, case: Case, rows: list[Row]) -> None:
    for row in rows:
        points: dict[float, list[float]] = {}
        for (_, parameter), value in case.values(row).items():
            points.setdefault(float(parameter), []).append(value)
        band(axes, points, *row.style, case.label(row))
    (symbol,) = case.tasks.family
    for low, high in case.tasks.trained:
        axes.axvspan(low, high, color="0.9", zorder=0, label="_")
    axes.set(xlabel={"angle": "angle in degrees (grey: trained on)", "mu": "μ (grey: trained on)"}[symbol])
    axes.set_ylabel("relative L2 error" if case.tasks.regression else "accuracy in %")
    if case.tasks.regression:
        axes.set_yscale("log")


def draw_names(axes: Axes, case: Case, rows: list[Row]) -> None:
    for k, row in enumerate(reversed(rows)):
        values = list(case.values(row).values())
        axes.plot(values, [k] * len(values), ".", color=row.style[0], alpha=0.4)
        axes.plot(median(values), k, "|", color=row.style[0], ms=16, mew=2.5)
    axes.set_yticks(range(len(rows)), [case.label(row) for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("accuracy in %, every new task and seed")


def report(lines: list[Line], page: Path) -> list[Path]:
    """Writes what there are lines of; returns the files written."""
    cases = [case for name in FAMILIES if (case := Case(name, lines)).lines]
    if not cases:
        raise SystemExit("There are no results yet: run family_data.py first")
    text, images = page.read_text() if page.exists() else "", page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    picture, figure = images / "families_data.png", draw(cases)
    write_atomically(picture, lambda partial: figure.savefig(partial, dpi=90, format="png"))
    seen = f"![Families from data: new tasks of which there are few samples](images/{picture.name})"
    text = updated(text, "data overview", "Families from data", seen)
    for case in cases:
        parts = [aims(case), table_of(case)] if case.name == "angle" else [table_of(case)]
        text = updated(text, f"data {case.name}", case.tasks.title, "\n\n".join(parts))
    write_atomically(page, lambda partial: partial.write_text(text.rstrip() + "\n"))
    return [picture, page]
