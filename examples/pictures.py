"""What the pictures of several examples share: colours with a meaning, plain ticks, and medians with bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# What is trained has one colour in all pictures, and the optimizer is the style of the line. The pictures of
# method_comparison/ have more methods, and tables of their own.
COLOURS = {
    "adapter": "C0",  # LoTRA for one task
    "family": "C2",  # one adapter for many tasks, as it is or by its codes
    "core": "C3",  # a family whose core is fitted to one task
    "full": "0.3",  # all parameters of the base
    "LoRA": "C1",
    "dense": "C8",  # A + Δ as one tensor
    "scratch": "C5",  # a network without a base
    "told": "C4",  # a network that gets the task's parameter as an input
    "frozen": "0.6",  # the base as it is
}
OPTIMIZERS = {"LM": "-", "Adam": "--"}

PER_DECADE = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # where ticks may stand; the fewest that are enough
ENOUGH, LEAST = 3, 1e-3  # ticks of an axis; the least number that is written without an exponent


def shades(count: int) -> list[tuple[float, ...]]:
    """Colours of lines that have an order, such as widths: from dark to light, and of no method."""
    return [tuple(colour) for colour in colormaps["viridis"]([0.9 * k / max(1, count - 1) for k in range(count)])]


def plain(value: float) -> str:
    """0.002, 30, 1,000; below a thousandth 2e-4."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= LEAST or value <= 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    return f"{value / 10**exponent:.2g}e{exponent}"


def plain_log(*axes: Axis) -> None:
    """A few ticks with plain numbers on logarithmic axes. Call it last: the ticks are those for the limits of now."""
    for axis in axes:
        axis.axes.autoscale_view()
        low, high = sorted(axis.get_view_interval())
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for parts in PER_DECADE:
            ticks = [part * 10.0**decade for decade in decades for part in parts]
            ticks = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
            if len(ticks) >= ENOUGH:
                break
        else:
            ticks = [
                tick for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high
            ]
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        axis.set_minor_locator(NullLocator())


def band(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, color: str, style: str = "-"
) -> None:
    """The median of `values` at every `x`, and their range around it. An infinite value leaves the picture."""
    axes.plot(x, [median(of_one) for of_one in values], style, color=color, label=label, lw=1.8, ms=4)
    finite = [[value for value in of_one if math.isfinite(value)] or [math.nan] for of_one in values]
    axes.fill_between(x, [min(v) for v in finite], [max(v) for v in finite], color=color, alpha=0.15, lw=0)


def by_step(courses: Sequence[Sequence[tuple[int, float, float]]]) -> tuple[list[float], list[list[float]]]:
    """The median time and all values at every step that all courses (step, time, value) have."""
    steps = [{step: (time, value) for step, time, value in course} for course in courses]
    common = [step for step in steps[0] if all(step in other for other in steps)]
    times = [median(course[step][0] for course in steps) for step in common]
    return times, [[course[step][1] for course in steps] for step in common]
