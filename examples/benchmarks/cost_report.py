"""Tables and a picture of the costs of steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layers import KINDS
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from measuring import median_ratio
from methods import DENSE, FLOOR, FULL, LORA_MODULES, LORA_PARAMETERS, LOTRA
from pictures import COLOURS

DRAWN = {
    FLOOR: {"color": COLOURS["frozen"]},
    LOTRA: {"color": COLOURS["adapter"]},
    DENSE: {"color": COLOURS["dense"]},
    LORA_PARAMETERS: {"color": COLOURS["LoRA"]},
    LORA_MODULES: {"color": COLOURS["LoRA"], "linestyle": "--"},
}
TICKS = (0.125, 0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 4, 8, 16, 32)  # of the picture's ratios


@dataclass
class Row:
    """One method on one layer. Values that were not measured, or are not possible, stay None or empty."""

    part: str
    layer: str
    width: int
    basis: int
    batch: int
    r: list[int]
    method: str
    dtype: str = "fp32"
    mode: str = "eager"
    trainable: int | None = None
    flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)  # forward, or forward and backward, by round
    seconds_with_adam: list[float] = field(default_factory=list)
    refused: str | None = None

    @property
    def title(self) -> str:
        layer, r = KINDS[self.layer].title, tuple(self.r)
        sizes = f"n = m = {self.width}, n_d = {self.basis}, batch {self.batch}, r = {r}"
        return f"{layer}, {sizes}, {self.dtype}, {self.mode}"


def ratio(row: Row, reference: Row, cost: str) -> float | None:
    """`row`'s cost over `reference`'s. For times it is the median over the rounds."""
    cost_of_row, cost_of_reference = getattr(row, cost), getattr(reference, cost)
    if not cost_of_row or not cost_of_reference:
        return None
    if isinstance(cost_of_row, list):
        return median_ratio(cost_of_row, cost_of_reference)
    return cost_of_row / cost_of_reference


def format_rows(rows: Sequence[Row]) -> str:
    """The table of one part for one layer and width."""
    by_name, part = {row.method: row for row in rows}, rows[0].part
    if part == "step":
        floor, full, lotra = by_name[FLOOR], by_name[FULL], by_name[LOTRA]
        header = ["training step", "trainable", "FLOPs/floor", "/full", "saved MB", "/floor", "peak MB", "/full"]
        header += ["ms", "/floor", "/full", "with Adam /full", "LoTRA's time/its"]
        lines = [
            [
                _number(row.trainable), _ratio(row, floor, "flops"), _ratio(row, full, "flops"),
                _megabytes(row.saved_bytes), _ratio(row, floor, "saved_bytes"),
                _megabytes(row.peak_bytes), _ratio(row, full, "peak_bytes"),
                _milliseconds(row), _ratio(row, floor, "seconds"), _ratio(row, full, "seconds"),
                _ratio(row, full, "seconds_with_adam"), _ratio(lotra, row, "seconds"),
            ]
            for row in rows
        ]  # fmt: skip
    else:
        base = by_name["base" if part == "inference" else FULL]
        header = [part, f"FLOPs/{base.method}", "ms", f"/{base.method}"]
        lines = [[_ratio(row, base, "flops"), _milliseconds(row), _ratio(row, base, "seconds")] for row in rows]
    names = [row.method for row in rows]
    notes = [f"{row.method}: refused ({row.refused})" for row in rows if row.refused]
    return "\n".join([_table([header, *([name, *line] for name, line in zip(names, lines, strict=True))]), *notes])


def format_growth(records: Sequence[dict[str, Any]]) -> str:
    """The exponents for one layer."""
    lines = [["LoTRA − frozen layer", "over", "FLOPs ∝ size^", "time ∝ size^"]]
    for record in records:
        sizes = " ".join(map(str, record["sizes"]))
        exponents = [record[f"{cost}_exponent"] for cost in ("flops", "seconds")]
        lines.append([record["over"], sizes, *("–" if p is None else f"{p:.2f}" for p in exponents)])
    return _table(lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Costs relative to full fine-tuning over the width: a step's time, FLOPs and peak memory, a column per layer."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    costs = {"seconds": "time", "flops": "FLOPs", "peak_bytes": "peak memory"}
    figure = Figure(figsize=(1.5 + 3.2 * len(layers), 9), layout="constrained")
    figure.suptitle("A training step of one KAN layer over full fine-tuning's (peak memory with Adam, time without)")
    panels = figure.subplots(len(costs), len(layers), squeeze=False, sharex="col", sharey="row")
    methods = [name for name in DRAWN if any(row.method == name for row in rows)]
    for column, layer in enumerate(layers):
        own = [row for row in rows if row.layer == layer]
        full = {row.width: row for row in own if row.method == FULL}
        for axes, cost in zip(panels[:, column], costs, strict=True):
            axes.axhline(1, color=COLOURS["full"], linestyle=":", label=FULL)
            for method in methods:
                points = [(row.width, ratio(row, full[row.width], cost)) for row in own if row.method == method]
                points = [(width, value) for width, value in points if value is not None]
                style = {"marker": "o", "markersize": 4, **DRAWN[method]}
                if method == LOTRA:
                    style |= {"linewidth": 4, "zorder": 1.5}  # thick and below the others, where lines coincide
                axes.plot(*(zip(*points, strict=True) if points else ([], [])), label=method, **style)
            # Logarithmic, so that half as much and twice as much are equally far from the line.
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(sorted(full), labels=map(str, sorted(full)))
            axes.yaxis.set_major_locator(FixedLocator(TICKS))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        panels[0, column].set_title(f"{KINDS[layer].title} (batch {own[0].batch}, n_d = {own[0].basis})")
        panels[-1, column].set_xlabel("width n = m")
    for axes, name in zip(panels[:, 0], costs.values(), strict=True):
        axes.set_ylabel(f"{name} / full fine-tuning")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(template.format(*line) for line in lines)


def _ratio(row: Row, reference: Row, cost: str) -> str:
    value = ratio(row, reference, cost)
    return "–" if value is None else f"{value:.3f}"


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}"


def _milliseconds(row: Row) -> str:
    return f"{1e3 * statistics.median(row.seconds):.2f}" if row.seconds else "–"
