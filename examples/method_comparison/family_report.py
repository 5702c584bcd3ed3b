"""The tables and pictures of families.md, from the lines that `families.py` has written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil, inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from family_tasks import CASES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import plain_log
from report import number, updated
from reporting import write_atomically
from rows import NONE, table

Line = dict[str, Any]


class Entry(NamedTuple):
    """A row of the tables: a method after `step` online iterations, or at its end."""

    label: str
    method: str
    step: int | None = None


AS_IT_IS, CORE = Entry("family, as it is", "family", 0), Entry("family, core, 5 iterations", "family", 5)
ALONE = Entry("LoTRA alone, LM", "LoTRA alone, LM")
ADAM, FULL = Entry("everything, Adam", "full, Adam"), Entry("everything, LM", "full, LM")
INPUT = Entry("parameter as an input, as it is", "parameter as an input", 0)
INPUT_ONCE = Entry("parameter as an input, 1 iteration", "parameter as an input", 1)
INPUT_AFTER = Entry("parameter as an input, 2 iterations", "parameter as an input", 2)
BASIS = Entry("basis of 16 KANs", "basis of 16 KANs")
NEAREST = Entry("nearest adapter, 5 iterations", "nearest adapter", 5)
ENTRIES = [
    AS_IT_IS,
    Entry("family, core, 1 iteration", "family", 1),
    Entry("family, core, 2 iterations", "family", 2),
    CORE,
    ALONE,
    Entry("LoTRA alone, LM, more points", "LoTRA alone, LM, more points"),
    FULL,
    ADAM,
    INPUT,
    INPUT_ONCE,
    INPUT_AFTER,
    Entry("diagonals of the parameter, as it is", "diagonals of the parameter", 0),
    Entry("diagonals of the parameter, 5 iterations", "diagonals of the parameter", 5),
    Entry("basis of 8 KANs", "basis of 8 KANs"),
    BASIS,
    Entry("basis of 8 adapters", "basis of 8 adapters"),
    Entry("basis of 16 adapters", "basis of 16 adapters"),
    Entry("basis of 16 exact solutions", "basis of 16 exact solutions"),
    Entry("nearest adapter, as it is", "nearest adapter", 0),
    NEAREST,
    Entry("interpolated adapters", "interpolated adapters"),
]
# Lines of the pictures: entries over the parameter, methods over seconds.
DRAWN = {
    AS_IT_IS: ("C0", "o-"), CORE: ("C1", "s-"), ALONE: ("C2", "^-"), FULL: ("C4", "D"), ADAM: ("C3", "v"),
    INPUT: ("C5", "o--"), INPUT_AFTER: ("C6", "s--"), BASIS: ("C7", "x-"), NEAREST: ("C8", "+-"),
}  # fmt: skip

Values = dict[tuple[int, tuple[float, ...]], tuple[float, float]]  # by seed and parameters: (CPU seconds, error)


class Found:
    """The lines of a case, by method."""

    def __init__(self, name: str, lines: Iterable[Line]) -> None:
        self.name, self.case = name, CASES[name]
        self.lines: dict[str, list[Line]] = {}
        for line in sorted(lines, key=lambda line: line["seed"]):
            if line["case"] == name:
                self.lines.setdefault(line["method"], []).append(line)

    def tasks(self, method: str, inside: bool = True) -> Iterator[tuple[int, tuple[float, ...], list[list[Any]]]]:
        """(seed, parameters, course)"""
        for line in self.lines.get(method, []):
            for task in line["tasks"]:
                if task["inside"] == inside:
                    yield line["seed"], tuple(task["parameters"]), task["marks"]

    def values(self, entry: Entry, inside: bool = True) -> Values:
        """After the entry's step, or the last one before if the method ended earlier."""
        found = {}
        for seed, parameters, marks in self.tasks(entry.method, inside):
            _, seconds, error = [m for m in marks if entry.step is None or m[0] <= entry.step][-1]
            found[seed, parameters] = (seconds, inf if error is None else error)
        return found

    def once(self, method: str, key: str) -> float:
        return median(line[key] for line in self.lines[method])

    def numbers(self, method: str) -> dict[str, int]:
        return self.lines[method][0]["numbers"]


def ratio(ours: Values, theirs: Values, part: int = 1) -> float | None:
    """The median of ratios at the same seed and parameters; `part` 0: of seconds, 1: of errors."""
    pairs = [ours[key][part] / theirs[key][part] for key in ours.keys() & theirs.keys() if theirs[key][part]]
    return median(pairs) if pairs else None


def times(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f} ×" if 0.1 <= value < 10 else f"{value:.2g} ×" if value < 10 else f"{value:.0f} ×"


def spread(values: list[float]) -> str:
    """median (least–greatest)"""
    return f"{number(median(values))} ({number(min(values))}–{number(max(values))})"


def seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}"


def table_of(found: Found) -> str:
    alone, core = found.values(ALONE), found.values(CORE)
    rows = []
    for entry in ENTRIES:
        values = found.values(entry)
        if not values:
            continue
        numbers, at_once = found.numbers(entry.method), entry.step == 0 or entry.method == "interpolated adapters"
        rows.append(
            [
                entry.label,
                f"{numbers['offline']:,}" if numbers["offline"] else NONE,
                seconds(found.once(entry.method, "offline_seconds")),
                NONE if at_once else f"{numbers['online']:,}",
                NONE if at_once else seconds(median(s for s, _ in values.values())),
                spread([error for _, error in values.values()]),
                times(ratio(values, alone)),
                times(ratio(values, core)),
            ]
        )
    header = ["", "numbers once", "CPU s once", "numbers for a task", "CPU s for a task", "relative L2 error"]
    text = table([*header, "to LoTRA alone", "to the core"], rows)
    return f"{text}\n\n{notes(found)}{outside(found)}"


def notes(found: Found) -> str:
    parts = [f"Seeds: {len(found.lines.get('family', []))}."]
    bases = [line["details"]["base error"] for line in found.lines.get("family", [])]
    if bases:
        parts.append(f"The base at its own parameters: {', '.join(map(number, bases))}.")
    if ALONE.method in found.lines and "family" in found.lines:
        more = found.once("family", "offline_seconds") - found.once(ALONE.method, "offline_seconds")
        less = median(s for s, _ in found.values(ALONE).values()) - median(s for s, _ in found.values(CORE).values())
        if less > 0:
            parts.append(f"The fit is paid back after {ceil(more / less)} tasks, against LoTRA alone.")
    for method, lines in found.lines.items():
        if lines[0]["details"].get("errors of the networks") and method.startswith("basis of 16"):
            own = [error for line in lines for error in line["details"]["errors of the networks"]]
            alone = median(s for line in lines for s in line["details"]["solution seconds"])
            parts.append(
                f"{method[0].upper()}{method[1:]}: theirs at their own parameters {spread(own)}; "
                f"{1000 * alone:.1f} ms of its seconds are the solution, the rest derivatives at the points."
            )
    return " ".join(parts)


def outside(found: Found) -> str:
    """Errors at parameters outside of the range."""
    rows = []
    wanted = sorted({parameters for _, parameters, _ in found.tasks("family", inside=False)})
    for entry in ENTRIES:
        values = found.values(entry, inside=False)
        if values:
            cells = [[error for (_, at), (_, error) in values.items() if at == parameters] for parameters in wanted]
            rows.append([entry.label, *map(spread, cells)])
    if not rows:
        return ""
    header = ["outside of the range", *(", ".join(f"{value:g}" for value in parameters) for parameters in wanted)]
    return "\n\n" + table(header, rows)


def aims(cases: dict[str, Found]) -> str:
    """What was aimed at, beside what was measured."""
    rows = []

    def add(aim: str, name: str, value: float | None, limit: float, show: Any = times) -> None:
        reached = "not run" if value is None else "yes" if value <= limit else "**no**"
        rows.append([aim, name, NONE if value is None else show(value), f"≤ {show(limit)}", reached])

    def middle(name: str, entry: Entry, part: int) -> float | None:
        values = cases[name].values(entry)
        return median(value[part] for value in values.values()) if values else None

    def relative(name: str, ours: Entry, theirs: Entry, part: int = 1) -> float | None:
        return ratio(cases[name].values(ours), cases[name].values(theirs), part)

    for name, to_adam, core_to_adam in (("elliptic", 1.0, 0.1), ("hyperbolic", 0.1, 0.02)):
        if name in cases:
            add("as it is, to LoTRA alone by LM", name, relative(name, AS_IT_IS, ALONE), 2)
            add("as it is, to everything by Adam", name, relative(name, AS_IT_IS, ADAM), to_adam)
            add("its core, 5 iterations, to LoTRA alone by LM", name, relative(name, CORE, ALONE), 0.3)
            add("its core, 5 iterations, to everything by Adam", name, relative(name, CORE, ADAM), core_to_adam)
            add("seconds of 5 iterations of the core, to LoTRA alone", name, relative(name, CORE, ALONE, 0), 0.4)
    for name, found in cases.items():
        if INPUT.method in found.lines:
            add("as it is, to the parameter as an input, same seconds once", name, relative(name, AS_IT_IS, INPUT), 1)
            ours, theirs = found.values(CORE), found.values(INPUT_ONCE)
            less = (
                f"its core, 5 iterations, to 1 iteration of that on everything ({times(ratio(ours, theirs, 0))} its s)"
            )
            add(less, name, ratio(ours, theirs), 1)
    for name in ("front", "advection"):
        if name in cases:
            add("as it is", name, middle(name, AS_IT_IS, 1), 3e-4, number)
            add("its core, 5 iterations", name, middle(name, CORE, 1), 6e-5, number)
            add("seconds of 5 iterations of the core", name, middle(name, CORE, 0), 0.8, number)
            add("as it is, to the basis of 16 KANs", name, relative(name, AS_IT_IS, BASIS), 0.1)
            add("its core, 5 iterations, to the basis of 16 KANs", name, relative(name, CORE, BASIS), 0.1)
    if "two parameters" in cases:
        add("as it is", "two parameters", middle("two parameters", AS_IT_IS, 1), 3e-3, number)
        add("its core, 5 iterations", "two parameters", middle("two parameters", CORE, 1), 4e-4, number)
    return table(["aim for the family", "case", "measured", "limit", "reached"], rows)


def band(ax: Axes, points: dict[float, list[float]], colour: str, style: str, label: str) -> None:
    """The median over x, and between the least and the greatest."""
    x = sorted(points)
    finite = [[value for value in points[k] if isfinite(value)] or [float("nan")] for k in x]
    ax.plot(x, [median(values) for values in finite], style, color=colour, label=label, ms=5)
    low, high = [min(v) for v in finite], [max(v) for v in finite]
    if style[-1] == "-":
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    else:
        ax.vlines(x, low, high, color=colour, alpha=0.4)


def draw(found: Found) -> Figure:
    """The error over the parameter, seeds together, and over the seconds for a task, parameters and seeds together."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    one = len(found.case.ranges) == 1
    order = {parameters: k for k, parameters in enumerate(found.case.held_out(), start=1)}
    for entry, (colour, style) in DRAWN.items():
        points: dict[float, list[float]] = {}
        for (_, parameters), (_, error) in found.values(entry).items():
            points.setdefault(parameters[0] if one else order[parameters], []).append(error)
        if points:
            band(left, points, colour, style if one else style[0], entry.label)
    drawn = {ALONE: "C2", FULL: "C4", ADAM: "C3", CORE: "C1", INPUT_AFTER: "C6", NEAREST: "C8", BASIS: "C7"}
    for entry, colour in drawn.items():
        marks: dict[int, list[tuple[float, float]]] = {}
        for _, _, course in found.tasks(entry.method):
            for step, clock, error in course:
                marks.setdefault(step, []).append((clock, inf if error is None else error))
        if marks:
            courses = {median(s for s, _ in of_step): [e for _, e in of_step] for of_step in marks.values()}
            band(right, courses, colour, "x-" if len(courses) == 1 else ".-", entry.label)
    symbol = found.case.pde_class.symbol
    left.set(title=found.case.title, xlabel=symbol, yscale="log")
    left.set_ylabel("relative L2 error")
    if not one:
        left.set_xticks(list(order.values()), [", ".join(map(str, values)) for values in order])
    right.set(title="for one task more", xlabel="CPU seconds", yscale="log")
    right.set_xscale("symlog", linthresh=0.3, linscale=0.4)
    right.set_xticks([0, 0.3, 1, 3, 10, 30], ["0", "0.3", "1", "3", "10", "30"])
    right.set_xlim(left=-0.02)
    for axes in (left, right):
        plain_log(axes.yaxis)
        axes.grid(alpha=0.3)
    figure.legend(handles=left.get_lines(), loc="outside right center", fontsize=8)
    return figure


def overview(cases: dict[str, Found]) -> Figure:
    """Every case's errors by entry: all tasks and seeds, with the median."""
    columns = min(4, len(cases))
    rows = ceil(len(cases) / columns)
    figure = Figure(figsize=(3.3 * columns + 2.2, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    shown = [entry for entry in DRAWN if any(found.values(entry) for found in cases.values())]
    for ax, found in zip(axes.flat, cases.values(), strict=False):
        for k, entry in enumerate(reversed(shown)):
            errors = [e for _, e in found.values(entry).values() if isfinite(e)]
            if errors:
                ax.plot(errors, [k] * len(errors), ".", color=DRAWN[entry][0], alpha=0.4)
                ax.plot(median(errors), k, "|", color=DRAWN[entry][0], ms=16, mew=2.5)
        ax.set_title(found.case.title, fontsize=10)
        ax.set(xscale="log", yticks=range(len(shown)))
        ax.set_yticklabels([entry.label for entry in reversed(shown)], fontsize=8)
        ax.tick_params(labelbottom=True)
        ax.grid(alpha=0.3)
    plain_log(axes.flat[0].xaxis)
    for ax in axes.flat[len(cases) :]:
        ax.axis("off")
    figure.supxlabel("relative L2 error")
    return figure


def variants(every: dict[str, Found]) -> str:
    """How the errors of a family depend on its settings."""
    rows, varied = [], {found.case.variant_of for found in every.values()} - {""}
    for found in every.values():
        if "family" not in found.lines or not (found.case.variant_of or found.name in varied):
            continue
        numbers, once = found.numbers("family"), seconds(found.once("family", "offline_seconds"))
        errors = [spread([error for _, error in found.values(entry).values()]) for entry in (AS_IT_IS, CORE)]
        rows.append([found.name, f"{numbers['offline']:,}", once, f"{numbers['online']:,}", *errors])
    header = ["family", "numbers once", "CPU s once", "numbers for a task", "as it is", "its core, 5 iterations"]
    return table(header, rows)


def report(lines: list[Line], page: Path) -> list[Path]:
    """Writes what there are lines of; returns the files written."""
    text, images, written = page.read_text() if page.exists() else "", page.parent / "images", []
    every = {name: Found(name, lines) for name in CASES if any(line["case"] == name for line in lines)}
    cases = {name: found for name, found in every.items() if not found.case.variant_of}
    if not cases:
        raise SystemExit("There are no results yet: run families.py first")
    images.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)

    def picture(name: str, figure: Figure) -> str:
        path = images / f"families_{name.replace(', ', '_').replace(' ', '_')}.png"
        write_atomically(path, lambda partial: figure.savefig(partial, dpi=90, format="png"))
        written.append(path)
        return f"images/{path.name}"

    text = updated(text, "aims", "Aims", aims(cases))
    seen = f"![Errors of all tasks and seeds; the bar is their median]({picture('overview', overview(cases))})"
    text = updated(text, "overview", "All cases", seen)
    if len(cases) < len(every):
        text = updated(text, "variants", "Ranks, degree, and tasks seen", variants(every))
    for name, found in cases.items():
        title = found.case.title
        content = f"{table_of(found)}\n\n![{title}: errors]({picture(name, draw(found))})"
        text = updated(text, name, title, content)
    write_atomically(page, lambda partial: partial.write_text(text.rstrip() + "\n"))
    return [*written, page]
