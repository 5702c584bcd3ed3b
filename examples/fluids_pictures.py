"""The picture of fluids.py: errors over samples, one new task with error bars, the map of all tasks by their codes."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from fluids_data import Fluids, Tasks
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import plain_log
from torch import nn

from peft_lotra.combination import container_of_codes
from peft_lotra.layers.lotra import adapted_tensors

LABELS = {"core": "LoTRA family, code and core", "code": "LoTRA family, code alone"}
COLORS = {"noble gas": "C0", "quantum fluid": "C3", "hydrocarbon": "C2", "refrigerant": "C4", "other": "0.45"}
ISOTHERMS = (0, 3, 10)  # of a task on a grid: which values of the first input are drawn


def draw(
    tasks: Tasks, model: nn.Module, split: Any, samples: Any, found: Any, others: Any, counts: tuple[int, ...]
) -> Figure:
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    courses = {**{LABELS[train]: found["errors"][train] for train in LABELS}, **others}
    for k, (label, errors) in enumerate(courses.items()):
        values = [errors[count] for count in counts]
        left.plot(counts, [median(v) for v in values], "o-" if k < 2 else "s--", color=f"C{k}", label=label, ms=4)
        low, high = ([torch.tensor(v).quantile(share).item() for v in values] for share in (0.25, 0.75))
        left.fill_between(counts, low, high, color=f"C{k}", alpha=0.13, lw=0)
    left.set(xscale="log", yscale="log", xlabel="samples of the new task", ylabel="error, in units of the spread")
    left.set_title(f"{len(split.new)} new tasks: medians and quartiles")
    left.set_xticks(counts, map(str, counts), minor=False)
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.set_ylim(top=left.get_ylim()[1] * 8)
    left.legend(fontsize=8, loc="upper center", ncols=2)
    plain_log(left.yaxis)
    errors = found["errors"]["core"][counts[-1]]
    typical = split.new[errors.index(sorted(errors)[(len(errors) - 1) // 2])]
    one_task(middle, tasks, typical, samples, found)
    code_map(right, tasks, model, split, found)
    return figure


def one_task(axes: Axes, tasks: Tasks, name: str, samples: Any, found: Any) -> None:
    """The last output of one new task over the last input, at a few values of the first; or over all rows."""
    _, mean, deviation, count = found["last"][name]
    x, y = tasks.unscaled(samples.x[name].cpu().to(tasks.low), samples.y[name].cpu().to(tasks.low))
    _, middle = tasks.unscaled(samples.x[name].cpu().to(tasks.low), mean.cpu().to(tasks.low))
    half = 1.96 * deviation[:, -1].cpu() * tasks.std[-1]
    taken = samples.rows[name][:count].cpu()
    noisy = y[taken, -1] + (samples.noise[name].cpu()[taken, -1] * tasks.std[-1])
    levels = x[:, 0].unique()
    if isinstance(tasks, Fluids) and len(levels) > max(ISOTHERMS):
        for k, level in enumerate(levels[list(ISOTHERMS)]):
            rows = (x[:, 0] == level).nonzero()[:, 0]
            at, color = x[rows, 1], f"C{k}"
            axes.plot(at, y[rows, -1], color=color, lw=1, label=f"truth, {tasks.inputs[0]} = {level:.2f}")
            axes.plot(at, middle[rows, -1], "--", color=color, lw=1)
            axes.fill_between(
                at, middle[rows, -1] - half[rows], middle[rows, -1] + half[rows], color=color, alpha=0.2, lw=0
            )
        axes.plot(x[taken, 1], noisy, "k*", ms=8, label=f"the {count} samples, at any {tasks.inputs[0]}")
        axes.set(xlabel=tasks.inputs[1], ylabel=tasks.outputs[-1])
    else:
        axes.errorbar(y[:, -1], middle[:, -1], half, fmt=".", color="C0", alpha=0.4, label="all rows")
        axes.plot(y[taken, -1], noisy, "k*", ms=8, label=f"the {count} samples")
        axes.axline((float(y[0, -1]), float(y[0, -1])), slope=1, color="0.5", lw=0.8)
        axes.set(xlabel=f"{tasks.outputs[-1]}, measured", ylabel="predicted")
    axes.set_title(f"{name} from {count} sample{'s' * (count > 1)}: predicted, 95 %")
    axes.legend(fontsize=8)


def code_map(axes: Axes, tasks: Tasks, model: nn.Module, split: Any, found: Any) -> None:
    """The first two numbers of all codes; new tasks have a ring. Names of those that stand apart, or are new."""
    codes = container_of_codes(adapted_tensors(model).values(), "default")["default"].detach().cpu()
    places = dict(zip(split.seen, codes.tolist(), strict=True))
    places |= {name: code.tolist() for name, code in found["codes"].items()}
    seen_kinds = set()
    for name, place in places.items():
        kind = tasks.constants[name].kind if isinstance(tasks, Fluids) else "other"
        first = kind not in seen_kinds
        seen_kinds.add(kind)
        at = (place[0], place[1] if len(place) > 1 else 0.0)
        label = kind if first and isinstance(tasks, Fluids) else None
        axes.plot(*at, "o", color=COLORS[kind], ms=4, label=label)
        if name in found["codes"]:
            axes.plot(*at, "o", mfc="none", mec="k", ms=9, label="new" if name == split.new[0] else None)
        if name in found["codes"] or kind in ("noble gas", "quantum fluid") or max(map(abs, at)) > 1.7:
            axes.annotate(name, at, xytext=(4, 2), textcoords="offset points", fontsize=7, color=COLORS[kind])
    axes.set(xlabel="first number of the code", ylabel="second number of the code", title="All tasks by their codes")
    axes.legend(fontsize=8)
