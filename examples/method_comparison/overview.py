"""The picture and the table of examples/results.md: error over trained numbers on one target, from results/.

    python examples/method_comparison/overview.py

The Poisson equation at λ = 1.3. All methods begin with a Chebyshev KAN of width 32 that solves it at λ = 1; the
family is one adapter for 1 ≤ λ ≤ 1.6 that has not been trained at 1.3. Medians and ranges over the seeds.
LoTRA with half as many numbers as the KAN is left out: by Adam two of three seeds diverge. LoRA is PEFT's on bare
parameters, which has no form with a tenth of the numbers. By Adam LoTRA keeps its factors orthonormal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from command_line import new_parser
from matplotlib.figure import Figure
from pictures import plain_log
from report import updated
from reporting import write_atomically
from rows import table

HERE = Path(__file__).parent
TARGET = 1.3
CASES = {"pde_elliptic": "λ = 1.3", "compression": "elliptic"}  # experiments with this target, and its name there
LOTRA, FULL, LORA, FAMILY, CORE = "LoTRA", "full fine-tuning", "LoRA", "family, as it is", "family, its core"
SMALL = "small KAN from scratch"
LABELS = {
    "full, Adam": (FULL, "Adam"),
    "full, LM": (FULL, "LM"),
    "small KAN from scratch, LM": (SMALL, "LM"),
    "LoRA target_parameters 1/10, Adam": (LORA, "Adam"),
    **{f"LoTRA 1/{k}, Adam, orthonormal": (LOTRA, "Adam") for k in (4, 8, 10, 16)},
    **{f"LoTRA 1/{k}, LM": (LOTRA, "LM") for k in (4, 10, 16)},
}
COLOURS = {FULL: "0.3", LORA: "C1", SMALL: "C5", LOTRA: "C0", FAMILY: "C2", CORE: "C3"}
MARKERS = {"Adam": "o", "LM": "s"}
LEFT = {LOTRA, FULL, SMALL}  # their names stand to the left of their points
TABLE = {
    "full fine-tuning, Adam": (FULL, "Adam"),
    "full fine-tuning, LM": (FULL, "LM"),
    "a small KAN from scratch, LM": (SMALL, "LM"),
    "an adapter, LM": (LOTRA, "LM"),
    "a family's core, LM": (CORE, "LM"),
}
TENTH = 878  # of LoTRA's numbers, the row of the table

Found = dict[tuple[str, str], dict[int, list[tuple[float, float]]]]  # by method and numbers: (error, CPU seconds)


def results(folder: Path) -> Iterator[tuple[tuple[str, str], int, int, float, float]]:
    """((method, optimizer), trained numbers, seed, error, CPU seconds) of every run with the target."""
    labels: set[str] = set()  # of the experiments before, whose runs go before those of the same method
    for name, case in CASES.items():
        lines = [*map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())]
        labels, earlier = labels | {line["label"] for line in lines}, labels
        for line in lines:
            if line["case"] == case and line["label"] in LABELS.keys() - earlier and "marks" in line:
                _, seconds, error = line["marks"][-1]
                yield LABELS[line["label"]], line["trainable"], line["seed"], error, seconds
    if lacking := LABELS.keys() - labels:
        raise ValueError(f"no line of {list(CASES)} has the labels {sorted(lacking)}: they have been renamed")
    for line in map(json.loads, (folder / "families.jsonl").read_text().splitlines()):
        if (line["case"], line["method"]) == ("elliptic", "family"):
            (marks,) = (task["marks"] for task in line["tasks"] if task["parameters"] == [TARGET])
            (_, _, before), (_, seconds, after) = marks[0], marks[-1]
            yield (FAMILY, "LM"), line["numbers"]["offline"], line["seed"], before, line["offline_seconds"]
            yield (CORE, "LM"), line["numbers"]["online"], line["seed"], after, seconds


def points(folder: Path) -> Found:
    found: Found = {}
    for (method, numbers, _), value in sorted({(m, n, seed): rest for m, n, seed, *rest in results(folder)}.items()):
        found.setdefault(method, {}).setdefault(numbers, []).append(tuple(value))
    return found


def draw(found: Found) -> Figure:
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    axes = figure.subplots()
    for (method, optimizer), own in found.items():
        errors, colour = [[error for error, _ in runs] for runs in own.values()], COLOURS[method]
        axes.vlines(list(own), [min(e) for e in errors], [max(e) for e in errors], color=colour, alpha=0.35, lw=4)
        fill = "none" if method == FAMILY else colour  # nothing is trained for this target
        middle = [median(e) for e in errors]
        axes.plot(list(own), middle, f"{MARKERS[optimizer]}-", color=colour, markerfacecolor=fill, ms=8)
        note = f"{method}, {optimizer}" if method != FAMILY else f"{method}: trained once, for all λ"
        offset, side = ((-9, -5), "right") if method in LEFT else ((9, -3), "left")
        place = {"xytext": offset, "textcoords": "offset points", "ha": side}
        axes.annotate(note, (min(own), middle[0]), color=colour, **place)
    for optimizer, marker in MARKERS.items():
        axes.plot([], [], marker, color="0.6", ms=8, label=optimizer)
    axes.set(xscale="log", yscale="log", xlim=(250, 14000), xlabel="trained numbers", ylabel="relative L2 error")
    axes.set_title(f"Poisson equation: from λ = 1 to λ = {TARGET}")
    plain_log(axes.xaxis, axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    return figure


def short(error: float) -> str:
    return f"{error:.1e}".replace("e-0", "e-")


def table_of(found: Found) -> str:
    (once,) = (median(seconds for _, seconds in runs) for runs in found[FAMILY, "LM"].values())
    rows = []
    for name, method in TABLE.items():
        numbers = TENTH if method[0] == LOTRA else max(found[method])
        errors, seconds = zip(*found[method][numbers], strict=True)
        text = f"{short(median(errors))} ({short(min(errors))}–{short(max(errors))})"
        after = f", after {once:.0f} once, for all λ" if method[0] == CORE else ""
        rows.append([name, f"{numbers:,}", text, f"{median(seconds):.2g}{after}"])
    return table(["", "trained numbers", "relative L2 error", "CPU seconds"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the .jsonl files")
    parser.add_argument("--page", type=Path, default=HERE.parent / "results.md", help="with the table's markers")
    parser.add_argument("--picture", type=Path, default=HERE / "images" / "overview.png", help="to write")
    args = parser.parse_args(argv)
    found = points(args.results)
    figure, text = draw(found), updated(args.page.read_text(), "overview", "Overview", table_of(found))
    write_atomically(args.picture, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    write_atomically(args.page, lambda partial: partial.write_text(text))
    print(f"Written: {args.picture}, {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
