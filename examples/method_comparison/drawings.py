"""The pictures of an experiment: courses, finals, ratios and spectra. What they leave out, the tables have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import inf, isfinite, nan
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pdes import PDES
from pictures import band, by_step, plain_log
from rows import Case, Row

COLUMNS = 3  # panels of a row
LINES = 6  # of a panel with courses
SLOWER = 4  # from this ratio of seconds on, the axis of seconds is logarithmic
LEAST_SHARE = 0.01  # of the spectra; below it a layer has no more directions


def panels(count: int, height: float = 3.2, **options: bool) -> tuple[Figure, list[Axes]]:
    """A figure that is no wider than a page, with so many panels."""
    columns = min(COLUMNS, count) if count != 4 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(max(7.5, 3.7 * columns), 0.8 + height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes[count:]:
        ax.axis("off")
    for ax in axes[:count]:
        ax.grid(alpha=0.3)
    return figure, axes[:count]


def titles(figure: Figure, axes: Sequence[Axes], cases: Sequence[Case]) -> None:
    figure.suptitle(cases[0].experiment.title)
    for ax, case in zip(axes, cases, strict=True):
        family, _, rest = case.name.partition(", ")
        name = PDES[family].title if family in PDES else family
        ax.set_title(", ".join(filter(None, (name, rest))))
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(case.task.metric)


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """One below all panels, of what any of them has."""
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9)


def drawn(case: Case) -> list[tuple[str, Row]]:
    """The rows that the pictures of the experiment have."""
    labels = case.experiment.drawn or list(case.experiment.methods)
    return [(label, case.rows[label]) for label in labels if label in case.rows]


def clock(case: Case) -> str:
    return "CPU seconds" if "cpu" in case.reference.results[0]["environment"]["device"] else "seconds"


def numbers(case: Case, values: Sequence[float | None]) -> list[float]:
    """What diverged is worst."""
    worst = -inf if case.task.higher_is_better else inf
    return [worst if value is None else value for value in values]


def courses(cases: Sequence[Case]) -> Figure:
    """The metric over seconds: medians over the seeds, with their range."""
    figure, axes = panels(len(cases))
    titles(figure, axes, cases)
    shown = list(dict.fromkeys(label for case in cases for label, _ in drawn(case)[:LINES]))
    for ax, case in zip(axes, cases, strict=True):
        last = []
        for label, row in drawn(case)[:LINES]:
            marks = [[(k, s, *numbers(case, [m])) for k, s, m in result["marks"]] for result in row.results]
            times, values = by_step(marks)
            band(ax, times, values, label, f"C{shown.index(label) % 10}")  # a method has one colour in all panels
            last.append(times[-1])
        if case.zero_shot is not None:
            zero = median(result["zero_shot"] for result in case.reference.results)
            ax.axhline(zero, color="0.5", ls=":", label="zero-shot")
        if min(last) > 0 and max(last) > SLOWER * min(last):
            ax.set_xscale("symlog", linthresh=min(last) / 3, linscale=0.5)
            ax.set_xlim(left=0)
            ticks = [0, *(part * 10.0**k for k in range(-2, 5) for part in (1, 3))]
            ticks = [tick for tick in ticks if not 0 < tick < min(last) / 3 and tick <= max(last)]
            ax.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
        if not case.task.higher_is_better:
            ax.set_yscale("log")
            plain_log(ax.yaxis)
        ax.set_xlabel(clock(case))
    legend(figure, axes)
    return figure


def finals(cases: Sequence[Case]) -> Figure:
    """The last metric of every method: median and range over the seeds, beside the reference."""
    labels = [label for label in cases[0].experiment.drawn or cases[0].experiment.methods]
    figure, axes = panels(len(cases), height=0.8 + 0.21 * len(labels), sharey=True)
    titles(figure, axes, cases)
    for ax, case in zip(axes, cases, strict=True):
        ax.axvline(case.middle(case.reference.finals), color="0.3", ls=":", label=case.reference.label)
        for label, row in drawn(case):
            values, place = [v for v in row.finals if v is not None], len(labels) - labels.index(label)
            colour, kind = ("C0", "LoTRA") if label.startswith("LoTRA") else ("C1", "other methods")
            colour, kind = ("0.3", None) if row is case.reference else (colour, kind)
            if values:
                ax.hlines(place, min(values), max(values), color=colour, alpha=0.35, lw=5, label=kind)
                ax.plot(case.middle(row.finals), place, "|", color=colour, ms=11, mew=2.5)
        ax.set_yticks(range(len(labels), 0, -1), labels=labels, fontsize=9)
        if not case.task.higher_is_better:
            ax.set_xscale("log")
            plain_log(ax.xaxis)
        ax.set(xlabel=case.task.metric, ylabel=None)
    legend(figure, axes)
    return figure


def ratios(cases: Sequence[Case]) -> Figure:
    """The last metric over the trained numbers: median and range, a line for what differs in nothing else."""
    figure, axes = panels(len(cases))
    titles(figure, axes, cases)
    for ax, case in zip(axes, cases, strict=True):
        series: dict[str, list[Row]] = {}
        for label, row in drawn(case):
            if row is not case.reference:
                series.setdefault(re.sub(r" \d+/\d+", "", label), []).append(row)
        for k, (name, rows) in enumerate(series.items()):
            rows = sorted(rows, key=lambda row: row.trainable)
            known = [[v for v in row.finals if v is not None] or [nan] for row in rows]
            middle = [median(numbers(case, row.finals)) for row in rows]
            middle = [m if isfinite(m) else nan for m in middle]
            x = [row.trainable * 1.04 ** (k - (len(series) - 1) / 2) for row in rows]  # side by side
            ax.vlines(x, [min(v) for v in known], [max(v) for v in known], color=f"C{k}", alpha=0.4, lw=3)
            ax.plot(x, middle, "o-", ms=5, color=f"C{k}", label=name)
        values = [v for v in case.reference.finals if v is not None]
        ax.axhline(case.middle(case.reference.finals), color="0.3", ls="--", label=case.reference.label)
        ax.axhspan(min(values), max(values), color="0.3", alpha=0.1, lw=0)
        ax.set_xscale("log")
        plain_log(ax.xaxis)
        if not case.task.higher_is_better:
            ax.set_yscale("log")
            plain_log(ax.yaxis)
        ax.set_xlabel("trained numbers")
    legend(figure, axes)
    return figure


def spectra(cases: Sequence[Case]) -> Figure:
    """The singular values of the reference's updates, unfolded along the modes, over the greatest of each: a panel for
    a layer, medians over cases and seeds with their range."""
    found = [result["spectra"] for case in cases for result in case.reference.results if "spectra" in result]
    layers = list(zip(*found, strict=True))
    figure, axes = panels(max(1, len(layers)), sharey=True)
    figure.suptitle(f"{cases[0].experiment.title}: the update of “{cases[0].reference.label}”")
    # Of different widths: where two lines coincide, both are seen.
    styles = {"inputs": ("-", 5, "C0"), "outputs": ("-", 2, "C1"), "basis functions": (":", 2.5, "k")}
    for number, (ax, runs) in enumerate(zip(axes, layers, strict=False), start=1):
        for (mode, (style, width, colour)), of_mode in zip(styles.items(), zip(*runs, strict=True), strict=True):
            shares = list(zip(*([s / values[0] for s in values] for values in of_mode), strict=True))
            places = range(1, len(shares) + 1)
            ax.plot(places, [median(v) for v in shares], style, lw=width, color=colour, label=mode)
            ax.fill_between(places, [min(v) for v in shares], [max(v) for v in shares], color=colour, alpha=0.15, lw=0)
            if len(shares) == 1:
                ax.plot(1, 1, "o", color=colour, ms=width + 2)
        ax.set(title=f"layer {number}", xlabel="number of the singular value", yscale="log", ylim=(LEAST_SHARE, 1.3))
        ax.xaxis.get_major_locator().set_params(integer=True)
        plain_log(ax.yaxis)
    axes[0].set_ylabel("singular value / the greatest")
    legend(figure, axes)
    return figure


PICTURES: dict[str, Callable[[Sequence[Case]], Figure]] = {
    "courses": courses, "finals": finals, "ratios": ratios, "spectra": spectra,
}  # fmt: skip
