"""The picture of fluids.py: errors over samples, one new task with error bars, the map of all tasks by their codes."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from fluids_data import Fluids, Tasks
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import COLOURS, OPTIMIZERS, plain_log, shades
from torch import nn

from peft_lotra.combination import container_of_codes
from peft_lotra.layers.lotra import adapted_tensors

LABELS = {"core": "LoTRA family, code and core", "code": "LoTRA family, code alone"}
DRAWN = {"core": "core", "code": "family", "an adapter of its own": "adapter", "full fine-tuning": "full"}
DRAWN |= {"from scratch": "scratch", "acentric factor": "told"}
KINDS = {"noble gas": "s", "quantum fluid": "D", "hydrocarbon": "^", "refrigerant": "v", "other": "o"}
KNOWN = "0.55"  # colour of the tasks that the family was trained on
FAR = 1.7  # a code with a number beyond this stands apart
WIDE, HIGH = 0.16, 0.03  # room for a name, as shares of the picture
ISOTHERMS = (0, 3, 10)  # of a task on a grid: which values of the first input are drawn


def draw(
    tasks: Tasks, model: nn.Module, split: Any, samples: Any, found: Any, others: Any, counts: tuple[int, ...]
) -> Figure:
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, errors in {**{train: found["errors"][train] for train in LABELS}, **others}.items():
        values, color = [errors[count] for count in counts], COLOURS[DRAWN[name]]
        style = f"o{OPTIMIZERS['LM']}" if name in LABELS else f"s{OPTIMIZERS['Adam']}"
        left.plot(counts, [median(v) for v in values], style, color=color, label=LABELS.get(name, name), ms=4)
        low, high = ([torch.tensor(v).quantile(share).item() for v in values] for share in (0.25, 0.75))
        left.fill_between(counts, low, high, color=color, alpha=0.13, lw=0)
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
        for level, color in zip(levels[list(ISOTHERMS)], shades(len(ISOTHERMS)), strict=True):
            rows = (x[:, 0] == level).nonzero()[:, 0]
            at = x[rows, 1]
            axes.plot(at, y[rows, -1], color=color, lw=1, label=f"truth, {tasks.inputs[0]} = {level:.2f}")
            axes.plot(at, middle[rows, -1], "--", color=color, lw=1)
            axes.fill_between(
                at, middle[rows, -1] - half[rows], middle[rows, -1] + half[rows], color=color, alpha=0.2, lw=0
            )
        axes.plot(x[taken, 1], noisy, "k*", ms=8, label=f"the {count} samples, at any {tasks.inputs[0]}")
        axes.set(xlabel=tasks.inputs[1], ylabel=tasks.outputs[-1])
    else:
        axes.errorbar(y[:, -1], middle[:, -1], half, fmt=".", color=COLOURS["core"], alpha=0.4, label="all rows")
        axes.plot(y[taken, -1], noisy, "k*", ms=8, label=f"the {count} samples")
        axes.axline((float(y[0, -1]), float(y[0, -1])), slope=1, color="0.5", lw=0.8)
        axes.set(xlabel=f"{tasks.outputs[-1]}, measured", ylabel="predicted")
    axes.set_title(f"{name} from {count} sample{'s' * (count > 1)}: predicted, 95 %")
    axes.legend(fontsize=8)


def code_map(axes: Axes, tasks: Tasks, model: nn.Module, split: Any, found: Any) -> None:
    """The first two numbers of all codes. New tasks and those that stand apart have names."""
    codes = container_of_codes(adapted_tensors(model).values(), "default")["default"].detach().cpu()
    places = {name: code.tolist() for name, code in found["codes"].items()}
    places |= dict(zip(split.seen, codes.tolist(), strict=True))
    of_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in places:
        of_kind[tasks.constants[name].kind if isinstance(tasks, Fluids) else "other"].append(name)
    at = {name: (place[0], place[1] if len(place) > 1 else 0.0) for name, place in places.items()}
    for kind, names in of_kind.items():
        axes.plot([], [], KINDS[kind], color=KNOWN, ms=5, label=kind if isinstance(tasks, Fluids) and names else None)
        for name in names:
            color = COLOURS["core"] if name in found["codes"] else KNOWN
            axes.plot(*at[name], KINDS[kind], color=color, ms=5, zorder=3 if name in found["codes"] else 2)
    axes.plot([], [], "o", color=COLOURS["core"], ms=5, label="new")
    axes.margins(x=0.16)
    across, up = (high - low for low, high in (axes.get_xlim(), axes.get_ylim()))
    written: list[tuple[float, float]] = []
    for name, (x, y) in at.items():
        new = name in found["codes"]
        apart = name in (*of_kind["noble gas"], *of_kind["quantum fluid"]) or max(abs(x), abs(y)) > FAR
        beside = any(abs(x - x0) < WIDE * across and abs(y - y0) < HIGH * up for x0, y0 in written)
        if (new or apart) and not beside:
            written.append((x, y))
            color = COLOURS["core"] if new else "k"
            axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=7, color=color)
    axes.set(xlabel="first number of the code", ylabel="second number of the code", title="All tasks by their codes")
    axes.legend(fontsize=8)
