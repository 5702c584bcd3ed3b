"""The tables and the picture of few_samples.md, from the lines that `few_samples.py` has written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from family_report import seconds, times
from few_sample_methods import METHODS
from few_sample_tasks import TITLES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import updated
from reporting import write_atomically
from rows import NONE, table

Line = dict[str, Any]

OURS = ("family, code of 3", "family, code of 5", "family, code of 8", "family, code of 5, then its core")
BASES = ("pooled", "one task")
# What the aims compare with, by the part of a new task's error that a family's code may have.
AIMS: list[tuple[str, float, tuple[str, ...]]] = [
    (
        "own adapter, everything, from scratch",
        0.3,
        tuple(
            label
            for by in ("LM", "Adam")
            for label in (
                *(f"{base}, {what}, {by}" for base in BASES for what in ("own adapter", "everything")),
                f"from scratch, {by}",
            )
        ),
    ),
    (
        "code as inputs, learned basis, Gaussian process, MAML, CAVIA",
        0.7,
        (
            *(f"code as inputs, {k}" for k in (3, 5)),
            *(f"learned basis, {k}" for k in (5, 16)),
            *("Gaussian process", "MAML", "CAVIA", "Reptile"),
        ),
    ),
    (
        "CoDA, GEPS, by our fit",
        1.1,
        ("CoDA, code of 3", "GEPS, code of 8"),
    ),
    ("CoDA, GEPS, by Adam", 0.7, ("CoDA, code of 3, Adam", "GEPS, code of 8, Adam")),
    ("gappy POD", 1.0, ("gappy POD",)),
]
DRAWN = {
    "family, code of 5": ("C3", "o-"),
    "family, code of 5, then its core": ("C2", "o-"),
    "GEPS, code of 8": ("C1", "v--"),
    "code as inputs, 5": ("C4", "^--"),
    "learned basis, 16": ("C5", "<--"),
    "gappy POD": ("C8", "P--"),
    "known input, everything, LM": ("C9", "x--"),
    "MAML": ("C6", "d--"),
    "pooled, everything, LM": ("C0", "s--"),
    "from scratch, LM": ("0.5", "D:"),
}


class Case:
    """The lines of a domain."""

    def __init__(self, name: str, lines: Iterable[Line]) -> None:
        self.name = name
        own = [line for line in lines if line["domain"] == name]
        self.rates = {line["method"]: line["tried"] for line in own if "tried" in line}
        self.lines = [line for line in own if "samples" in line]
        self.methods = [method for method in METHODS if self.of(method)]
        self.counts = list(dict.fromkeys(n for line in self.lines for n in line["samples"]))

    def of(self, method: str) -> list[Line]:
        return [line for line in self.lines if line["method"] == method]

    def errors(self, method: str, n: str, splits: Iterable[int] | None = None) -> list[float]:
        """Of all unseen tasks of these splits, or of all."""
        lines = [line for line in self.of(method) if splits is None or line["split"] in splits]
        return [error for line in lines for error in line["samples"][n]["errors"]]

    def median(self, method: str, n: str) -> float:
        return median(self.errors(method, n))

    def ratio(self, ours: str, others: Iterable[str], n: str) -> float:
        """Our median error over that of the best of the others, each on the splits that both have."""
        ratios = []
        for other in others:
            both = {line["split"] for line in self.of(ours)} & {line["split"] for line in self.of(other)}
            if both:
                ratios.append(median(self.errors(ours, n, both)) / median(self.errors(other, n, both)))
        return max(ratios)


def table_of(case: Case) -> str:
    best = {n: min(case.median(method, n) for method in case.methods) for n in case.counts}
    rows = []
    for method in case.methods:
        lines = case.of(method)
        once, task = lines[0]["numbers"]
        values = [case.median(method, n) for n in case.counts]
        cells = [f"{value:.2g}" if value < 0.1 else f"{value:.2f}" for value in values]
        marked = [
            f"**{cell}**" if value == best[n] else cell
            for cell, value, n in zip(cells, values, case.counts, strict=True)
        ]
        middle = case.counts[len(case.counts) // 2]
        spent = median(line["samples"][middle]["seconds"] for line in lines)
        rows.append(
            [
                method,
                str(sum(len(line["tasks"]) for line in lines)),
                f"{once:,}",
                f"{task:,}" if task else NONE,
                *marked,
                seconds(1000 * spent),
            ]
        )
    header = ["", "unseen tasks", "numbers once", "for a task", *(f"n = {n}" for n in case.counts), "ms for a task"]
    return "\n\n".join(filter(None, (table(header, rows), rates(case), hardest(case))))


def hardest(case: Case) -> str:
    """The unseen tasks with the largest errors of the code of 5 with its core, at a middle and at the last number."""
    ours = "family, code of 5, then its core"
    if ours not in case.methods:
        return ""
    n = case.counts[len(case.counts) // 2]
    errors: dict[str, list[float]] = {}
    for line in case.of(ours):
        for k, task in enumerate(line["tasks"]):
            errors[task] = [line["samples"][count]["errors"][k] for count in (n, case.counts[-1])]
    worst = sorted(errors, key=lambda task: -errors[task][0])[:5]
    found = "; ".join(f"{task}: {errors[task][0]:.2g}, {errors[task][1]:.2g}" for task in worst)
    return f"Hardest for the code of 5 with its core, errors at n = {n} and {case.counts[-1]}: {found}."


def rates(case: Case) -> str:
    parts = []
    for name, tried in case.rates.items():
        chosen = min(tried, key=tried.get)
        parts.append(f"{name} {chosen}{' (edge)' if chosen in (next(iter(tried)), list(tried)[-1]) else ''}")
    return f"Rates of Adam on the tasks seen: {', '.join(parts)}." if parts else ""


def aims(case: Case) -> str:
    """The median error of each family over that of the best of a group."""
    rows = []
    for label, limit, group in AIMS:
        if not set(group) & set(case.methods):
            continue
        for ours in OURS:
            if ours in case.methods:
                ratios = [case.ratio(ours, group, n) for n in case.counts]
                few = [ratio for ratio, n in zip(ratios, case.counts, strict=True) if n in ("1", "3", "5")]
                reached = "yes" if max(few) <= limit else "**no**"
                rows.append([ours, label, *map(times, ratios), f"≤ {limit:g} ×", reached])
    header = ["", "to the best of", *(f"n = {n}" for n in case.counts), "aim at 1, 3, 5", "reached"]
    return table(header, rows)


def intervals(case: Case) -> str:
    rows = []
    for method in case.methods:
        parts = [[line["samples"][n].get("inside") for line in case.of(method)] for n in case.counts]
        if parts[0][0]:
            rows.append([method, *(f"{100 * mean(sum(part, [])):.0f} %" for part in parts)])
    return table(["points within intervals of 95 %", *(f"n = {n}" for n in case.counts)], rows)


def draw(cases: list[Case]) -> Figure:
    """The median over the samples, and the middle half of the tasks of the first of `DRAWN`."""
    columns = min(4, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(3.6 * columns + 2.8, 3.6 * rows), layout="constrained")
    drawn: dict[str, Any] = {}
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(cases) :]:
        axes.set_axis_off()
    for axes, case in zip(every, cases, strict=False):
        draw_case(axes, case)
        drawn = {line.get_label(): line for line in axes.get_lines()} | drawn
    order = [label for label in DRAWN if label in drawn]
    figure.legend([drawn[label] for label in order], order, loc="outside right center", fontsize=8)
    return figure


def draw_case(axes: Axes, case: Case) -> None:
    counts = [int(n) for n in case.counts]
    for method, (colour, style) in DRAWN.items():
        if method in case.methods:
            axes.plot(counts, [case.median(method, n) for n in case.counts], style, color=colour, label=method, ms=5)
            if method in OURS:
                quarters = np.array([np.quantile(case.errors(method, n), (0.25, 0.75)) for n in case.counts])
                axes.fill_between(counts, *quarters.T, color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="noisy samples of a new task", title=TITLES[case.name])
    axes.set_ylabel("RMS error / spread of the task")
    axes.set_xticks(counts, counts, minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def report(lines: list[Line], page: Path) -> list[Path]:
    """Writes what there are lines of; returns the files written."""
    cases = [case for name in TITLES if (case := Case(name, lines)).lines]
    if not cases:
        raise SystemExit("There are no results yet: run few_samples.py first")
    text, images = page.read_text() if page.exists() else "# Few samples of a new task\n", page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    picture, figure = images / "few_samples.png", draw(cases)
    write_atomically(picture, lambda partial: figure.savefig(partial, dpi=90, format="png"))
    seen = f"![Errors over the number of samples of a new task](images/{picture.name})"
    text = updated(text, "overview", "Errors over samples", seen)
    for case in cases:
        title = TITLES[case.name]
        content = "\n\n".join((table_of(case), aims(case), intervals(case)))
        text = updated(text, case.name, title, content)
    write_atomically(page, lambda partial: partial.write_text(text.rstrip() + "\n"))
    return [picture, page]
