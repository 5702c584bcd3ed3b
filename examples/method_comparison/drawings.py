"""The pictures of the pages: each method has one colour, and each optimizer one marker, in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite
from statistics import median, quantiles

from found import CORE, FAMILY_ENTRIES, Family, FewSamples, Run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import by_step, plain_log

COLOURS = {
    "family": "C3", "core": "C1", "LoTRA": "C0", "full": "0.2", "from scratch": "0.6", "small KAN": "C5", "LoRA": "C2",
    "input": "C4", "basis": "C8", "other": "C9",
}  # fmt: skip
LONGER = "LM, longer"
MARKERS = {"Adam": "o", "SOAP": "^", "L-BFGS": "v", "LM": "s", LONGER: "s"}
PDE_LABELS = {  # in the order of the table
    **{f"small KAN from scratch, {by}": ("small KAN", by) for by in ("LM", LONGER, "L-BFGS")},
    **{f"from scratch, {by}": ("from scratch", by) for by in ("Adam", "LM")},
    **{f"full, {by}": ("full", by) for by in ("Adam", "SOAP", "L-BFGS", "LM")},
    **{f"LoTRA 1/10, {by}": ("LoTRA", by) for by in ("Adam", "SOAP", "LM", LONGER)},
    **{f"LoRA, {by}": ("LoRA", by) for by in ("Adam", "SOAP", "LM")},
    CORE: ("core", "LM"),
}
OTHER_SIZES = {f"{method} {size}, LM": (method, "LM") for method in ("small KAN", "LoTRA") for size in ("1/16", "1/4")}
FEW_LABELS = {
    "family, code of 5": ("family", "-"), "family, code of 5, then its core": ("core", "-"),
    "GEPS, code of 8": ("other", "--"), "code as inputs, 5": ("input", "--"), "learned basis, 16": ("basis", "--"),
    "gappy POD": ("basis", ":"), "known input, everything, LM": ("input", ":"),
    "pooled, own adapter, LM": ("LoTRA", "--"), "pooled, everything, LM": ("full", "--"),
    "from scratch, LM": ("from scratch", ":"),
}  # fmt: skip


def range_of(axes: Axes, x: float, values: Sequence[float], colour: str, marker: str, label: str) -> None:
    """A marker at the median, and a bar over the range."""
    axes.vlines(x, min(values), max(values), color=colour, alpha=0.4, lw=3)
    axes.plot(x, median(values), marker, color=colour, ms=6, label=label, ls="none")


def draw_pdes(found: dict[str, dict[str, list[Run]]]) -> Figure:
    """A row for each PDE: the error over the trained numbers, and its course over CPU seconds."""
    figure = Figure(figsize=(10.5, 3.1 * len(found) + 0.8), layout="constrained")
    for (left, right), (name, by_label) in zip(figure.subplots(len(found), 2), found.items(), strict=True):
        for label, (method, optimizer) in (PDE_LABELS | OTHER_SIZES).items():
            runs, colour, marker = by_label.get(label, []), COLOURS[method], MARKERS[optimizer]
            if runs and optimizer != LONGER:
                shown = label if label in PDE_LABELS else ""
                range_of(left, runs[0].trained, [run.metric for run in runs], colour, marker, shown)
            if runs and label not in OTHER_SIZES:
                times, values = by_step([run.course for run in runs])
                middle = [median(of_step) for of_step in values]
                new = slice(5 * (optimizer == LONGER), None)  # until then it is the course of the shorter run
                right.plot(times[new], middle[new], f"{marker}-", color=colour, ms=3, lw=1.2)
        left.set(xlabel="trained numbers", ylabel="relative L2 error", title=name, xlim=(250, 14000))
        right.set(xlabel="CPU seconds", title=name, xlim=(0.1, None))
        for axes in (left, right):
            axes.set(xscale="log", yscale="log")
            plain_log(axes.xaxis, axes.yaxis)
            axes.grid(alpha=0.3)
    legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {label: handle for legend in legends for handle, label in legend}
    labels = [label for label in PDE_LABELS if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def draw_families(found: dict[str, Family]) -> Figure:
    """Each case's errors by method: all tasks and seeds, with the median."""
    columns = 3
    rows = ceil(len(found) / columns)
    figure = Figure(figsize=(3 * columns + 2.2, 2.6 * rows), layout="constrained")
    every = figure.subplots(rows, columns, sharex=True, sharey=True)
    shown = list(reversed(FAMILY_ENTRIES))
    for axes, (title, family) in zip(every.flat, found.items(), strict=False):
        for place, label in enumerate(shown):
            errors = [error for error in family.errors(FAMILY_ENTRIES[label]) if isfinite(error)]
            if errors:
                colour = COLOURS[FAMILY_ENTRIES[label].colour]
                axes.plot(errors, [place] * len(errors), ".", color=colour, alpha=0.4)
                axes.plot(median(errors), place, "|", color=colour, ms=14, mew=2.5)
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log")
        axes.set_yticks(range(len(shown)), shown, fontsize=8)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
    plain_log(every.flat[0].xaxis)
    for axes in every.flat[len(found) :]:
        axes.axis("off")
    figure.supxlabel("relative L2 error")
    return figure


def draw_few_samples(found: dict[str, FewSamples]) -> Figure:
    """The median over the number of samples, and the middle half of the tasks of the families."""
    figure = Figure(figsize=(9.5, 3.2 * ceil(len(found) / 2) + 0.9), layout="constrained")
    drawn = {}
    for axes, (name, domain) in zip(figure.subplots(ceil(len(found) / 2), 2).flat, found.items(), strict=True):
        counts = [int(n) for n in domain.lines[0]["samples"]]
        for method, (kind, style) in FEW_LABELS.items():
            if method in domain.methods:
                middle = [domain.median(method, n) for n in counts]
                (drawn[method],) = axes.plot(counts, middle, f"o{style}", color=COLOURS[kind], ms=4)
                if method.startswith("family"):
                    low, _, high = zip(*(quantiles(domain.errors(method, n)) for n in counts), strict=True)
                    axes.fill_between(counts, low, high, color=COLOURS[kind], alpha=0.15, lw=0)
        axes.set(xscale="log", xlabel="noisy samples of a new task", yscale="log", title=name)
        axes.set_ylabel("error / spread of the task")
        axes.set_xticks(counts, counts)
        axes.set_xticks([], minor=True)
        plain_log(axes.yaxis)
        axes.grid(alpha=0.3)
    order = [method for method in FEW_LABELS if method in drawn]
    figure.legend([drawn[method] for method in order], order, loc="outside lower center", ncols=3, fontsize=9)
    return figure
