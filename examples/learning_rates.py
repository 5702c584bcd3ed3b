"""Learning rates for the core and the factors: a coordinate check and a sweep over widths.

    python examples/learning_rates.py
    python examples/learning_rates.py --widths 16 64 --seeds 1 --steps 20

A Chebyshev KAN [4, w, w, 1] is trained on one function and adapted to another, for every width, optimizer, rule of
learning rates, initialisation, seed and base rate. Writes learning_rates.json (each finished run is in it at once, and
an interrupted study goes on from there) and a picture, and prints the best losses and the growth of the first steps
with the width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from functools import lru_cache
from pathlib import Path

import torch
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from pictures import band, plain_log, shades
from reporting import write_atomically
from torch import Tensor
from tqdm import tqdm

from peft_lotra import LoTRAConfig, initialize_lotra_weights
from peft_lotra.training.learning_rates import lotra_parameter_groups

RULES = ("LR-1", "LR-2", "LR-3", "LR-4", "adam")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
INITIALISATIONS = ("random", "gradient")
# In the picture. The rates of the factors are for n inputs, m outputs and n_d basis functions.
NAMES = {"sgd": "SGD", "adam": "Adam"}
STARTS = {"random": "random factors", "gradient": "factors from gradients"}
RATES_OF = {
    "LR-1": "U1 at η/n, U3 at η/n_d",
    "LR-2": "U1 at η/n",
    "LR-3": "U3 at η/n_d",
    "LR-4": "η for all",
    "adam": "η/n, η/√m, η/n_d",
}
TOP = 2  # of the picture; above it a run has diverged
# Half decades around the best rate of each optimizer; the rates of the core.
RATES = {"sgd": (3e-2, 1e-1, 3e-1, 1e0, 3e0), "adam": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
RATIOS = (1 / 16, 1 / 4, 1, 4, 16)  # η_U1 or η_U3 over its value in LR-1
COORDINATE_STEPS = 5
BATCH, DEGREE, RANKS = 64, 6, 4  # no width may be 7, the number of basis functions, or U1 and U3 share a group


def source(x: Tensor) -> Tensor:
    return (torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] + 0.5 * torch.cos(3 * x[:, 3:])).detach()


def target(x: Tensor) -> Tensor:
    return (torch.sin(2.6 * x[:, :1]) + 1.5 * x[:, 1:2] * x[:, 2:3] + 0.5 * torch.cos(2 * x[:, 3:])).detach()


def batches(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield 2 * torch.rand(BATCH, 4, generator=generator) - 1


@lru_cache(maxsize=1)
def base_state(width: int, seed: int) -> dict[str, Tensor]:
    """A KAN trained on the source function."""
    torch.manual_seed(seed)
    kan = ChebyshevKAN((4, width, width, 1), DEGREE)
    optimizer = torch.optim.Adam(kan.parameters(), lr=0.1 / width)
    for _, x in zip(range(200), batches(seed), strict=False):
        optimizer.zero_grad()
        (kan(x) - source(x)).square().mean().backward()
        optimizer.step()
    return kan.state_dict()


def adapted(width: int, seed: int, initialisation: str) -> PeftModel:
    kan = ChebyshevKAN((4, width, width, 1), DEGREE)
    kan.load_state_dict(base_state(width, seed))
    torch.manual_seed(seed + 1)
    model = get_peft_model(kan, LoTRAConfig(r=RANKS, coefficients={"coefficients": "i o d"}))
    if initialisation == "gradient":
        x = torch.cat(list(itertools.islice(batches(seed + 2), 4)))
        initialize_lotra_weights(model, lambda: loss_of(model, x).backward(), progressbar=False)
    return model


def loss_of(model: torch.nn.Module, x: Tensor) -> Tensor:
    return (model(x) - target(x)).square().mean()


def groups(model: PeftModel, rate: float, rule: str, ratios: dict[str, float]) -> list[dict]:
    """The parameter groups of a rule, with the rate of each component multiplied by its ratio."""
    found = lotra_parameter_groups(model, lr=rate, lr_rule=rule)
    for group in found:
        for component, ratio in ratios.items():
            if component in group["name"]:
                group["lr"] *= ratio
    return found


def run(case: dict, steps: int) -> dict:
    """The loss after adaptation (infinite if it diverged), and how far the output moved in the first steps."""
    model = adapted(case["width"], case["seed"], case["initialisation"])
    ratios = {"i": case.get("ratio_U1", 1), "d": case.get("ratio_U3", 1)}
    optimizer = OPTIMIZERS[case["optimizer"]](groups(model, case["rate"], case["rule"], ratios))
    probe, moved = next(batches(7)), []
    with torch.no_grad():
        start = model(probe)
    losses = []
    for step, x in zip(range(steps), batches(case["seed"] + 3), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"loss": math.inf, "moved": moved}
        if step < COORDINATE_STEPS:
            with torch.no_grad():
                moved.append((model(probe) - start).square().mean().sqrt().item())
    return {"loss": statistics.median(losses[-5:]), "moved": moved}


def cases(args: argparse.Namespace) -> list[dict]:
    keys = ("width", "seed", "optimizer", "initialisation", "rule", "rate")
    # Widths and seeds are the outer loops, because `base_state` keeps one base.
    sweep = [
        dict(zip(keys, (width, seed, optimizer, initialisation, rule, rate), strict=True))
        for width, seed in itertools.product(args.widths, range(args.seeds))
        for optimizer in args.optimizers
        for initialisation, rule, rate in itertools.product(INITIALISATIONS, args.rules, RATES[optimizer])
    ]
    ratio = [
        {**dict(zip(keys, (args.ratio_width, seed, optimizer, "random", "LR-1", rate), strict=True)), name: ratio}
        for seed, optimizer in itertools.product(range(args.seeds), args.optimizers)
        for rate, name, ratio in itertools.product(RATES[optimizer], ("ratio_U1", "ratio_U3"), RATIOS)
    ]
    return sweep + ratio


def all_runs(args: argparse.Namespace) -> list[dict]:
    path = args.output_dir / "learning_rates.json"
    settings = {"steps": args.steps, "batch": BATCH, "degree": DEGREE, "ranks": RANKS}
    done: list[dict] = []
    if path.exists():
        record = json.loads(path.read_text())
        done = record["runs"] if record["settings"] == settings else []
    known = {json.dumps(row["case"], sort_keys=True): row for row in done}
    wanted = cases(args)
    with tqdm(wanted, desc="runs", dynamic_ncols=True) as bar:
        for number, case in enumerate(bar):
            key = json.dumps(case, sort_keys=True)
            if key in known:
                continue
            bar.set_postfix_str(" ".join(map(str, case.values())), refresh=False)
            known[key] = {"case": case, **run(case, args.steps)}
            if number % 20 == 0:
                save(path, settings, list(known.values()))
    save(path, settings, list(known.values()))
    return [known[json.dumps(case, sort_keys=True)] for case in wanted]


def save(path: Path, settings: dict, runs: list[dict]) -> None:
    write_atomically(path, lambda p: p.write_text(json.dumps({"settings": settings, "runs": runs}) + "\n"))


def best(runs: list[dict], **where) -> tuple[float, float]:
    """(least loss, its rate) over the rates, of medians over the seeds."""
    by_rate: dict[float, list[float]] = {}
    for row in runs:
        if all(row["case"].get(key) == value for key, value in where.items()):
            by_rate.setdefault(row["case"]["rate"], []).append(row["loss"])
    return min((statistics.median(losses), rate) for rate, losses in by_rate.items())


def growth(runs: list[dict], rate: float, **where) -> float:
    """The exponent with which the output's movement in the first steps grows with the width; 0 means Θ(1)."""
    by_width: dict[int, list[float]] = {}
    for row in runs:
        case = row["case"]
        if case["rate"] == rate and row["moved"] and all(case.get(key) == value for key, value in where.items()):
            by_width.setdefault(case["width"], []).append(row["moved"][-1])
    points = [(math.log(w), math.log(max(statistics.median(moved), 1e-30))) for w, moved in sorted(by_width.items())]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def report(runs: list[dict], args: argparse.Namespace) -> None:
    widths = args.widths
    plain = {"ratio_U1": None, "ratio_U3": None}
    for optimizer, initialisation in itertools.product(args.optimizers, INITIALISATIONS):
        print(f"\n{optimizer}, {initialisation} initialisation: least loss (rate of the core), by width")
        print(f"{'rule':8}" + "".join(f"{width:>18}" for width in widths) + f"{'growth':>10}")
        for rule in args.rules:
            where = {"optimizer": optimizer, "initialisation": initialisation, "rule": rule} | plain
            found = [best(runs, width=width, **where) for width in widths]
            slope = growth(runs, RATES[optimizer][0], **where)
            print(f"{rule:8}" + "".join(f"{loss:>10.2e} ({rate:g})" for loss, rate in found) + f"{slope:>10.2f}")
    print("\nη_U1 and η_U3 as multiples of their values in LR-1: least loss")
    print(f"{'':14}" + "".join(f"{ratio:>10g}" for ratio in RATIOS))
    for optimizer, name in itertools.product(args.optimizers, ("ratio_U1", "ratio_U3")):
        found = [best(runs, optimizer=optimizer, **{name: ratio})[0] for ratio in RATIOS]
        print(f"{optimizer:5}{name:9}" + "".join(f"{loss:>10.2e}" for loss in found))


def draw(runs: list[dict], args: argparse.Namespace) -> Figure:
    """Loss over the rate, a line for each width, medians over the seeds with their range; a row per optimizer and
    initialisation, a column per rule."""
    rows = list(itertools.product(args.optimizers, INITIALISATIONS))
    figure = Figure(figsize=(1 + 3.2 * len(args.rules), 1.2 + 2.7 * len(rows)), layout="constrained")
    figure.suptitle(f"Loss after {args.steps} steps over the learning rate, by rule and width (large dots: the least)")
    panels = figure.subplots(len(rows), len(args.rules), sharex="row", sharey="row", squeeze=False)
    colours = shades(len(args.widths))
    for (optimizer, initialisation), row in zip(rows, panels, strict=True):
        for rule, ax in zip(args.rules, row, strict=True):
            for width, colour in zip(args.widths, colours, strict=True):
                where = {"optimizer": optimizer, "initialisation": initialisation, "rule": rule, "width": width}
                points: dict[float, list[float]] = {rate: [] for rate in RATES[optimizer]}
                for entry in runs:
                    if entry["case"].items() >= where.items() and len(entry["case"]) == 6:
                        points[entry["case"]["rate"]].append(entry["loss"])
                band(ax, list(points), list(points.values()), f"width {width:,}", colour, "o-")
                loss, rate = min((statistics.median(losses), rate) for rate, losses in points.items())
                ax.plot(rate, loss, "o", color=colour, ms=9)
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(RATES[optimizer], labels=[f"{rate:g}" for rate in RATES[optimizer]])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f"{NAMES[optimizer]}, {STARTS[initialisation]}\nmean squared error")
        row[0].set_ylim(top=TOP)
        plain_log(row[0].yaxis)
    for rule, above, below in zip(args.rules, panels[0], panels[-1], strict=True):
        above.set_title(f"{rule}: {RATES_OF[rule]}")
        below.set_xlabel("learning rate η of the core")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(args.widths))
    return figure


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--widths", type=positive_int, nargs="+", default=[16, 64, 256, 1024], help="of the hidden layers")
    add("--ratio-width", type=positive_int, default=64, help="width at which single rates are varied")
    add("--optimizers", choices=list(OPTIMIZERS), nargs="+", default=list(OPTIMIZERS), help="those to train with")
    add("--rules", choices=RULES, nargs="+", default=list(RULES), help="rules of learning rates to compare")
    add("--seeds", type=positive_int, default=3, help="runs of each setting")
    add("--steps", type=positive_int, default=60, help="training steps of each run")
    add("--output-dir", type=Path, default=Path("outputs/learning_rates"), help="where everything is written")
    args = parser.parse_args(argv)
    if any(width < RANKS or width == DEGREE + 1 for width in (*args.widths, args.ratio_width)):
        parser.error(f"argument --widths: should be at least {RANKS} and not {DEGREE + 1}, got {args.widths}")
    make_output_dir(parser, args)
    return args


def study(args: argparse.Namespace) -> None:
    runs = all_runs(args)
    report(runs, args)
    figure = draw(runs, args)
    write_atomically(args.output_dir / "learning_rates.png", lambda p: figure.savefig(p, dpi=90, format="png"))
    print(f"\nWritten: {args.output_dir}/learning_rates.json, .png")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: study(parse_arguments(argv)), "The runs that were done will be used again.")


if __name__ == "__main__":
    sys.exit(main())
