"""Properties of a fluid that nobody has fitted, from 1 to 10 measurements, learned from other fluids.

    python examples/fluids.py
    python examples/fluids.py --fluid R125 Krypton --samples 5 --suggest
    python examples/fluids.py --data my.csv

The command trains one KAN with a family adapter on some 40 real fluids: base, factors, cores and a code of a few
numbers for each fluid. It then takes fluids that it never saw, and finds their codes from a few noisy samples, with an
error bar, by `fit_task`. Beside it stand full fine-tuning of a KAN that was trained on the same fluids, an adapter of
its own, a KAN from scratch, and the principle of corresponding states: a KAN whose further input is the acentric
factor. It writes a table, a picture and the trained family.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import fluids_data
import torch
from chebyshev_kan import ChebyshevKAN
from command_line import check_device, check_seed, exit_code, make_output_dir, new_parser, positive_int
from fluids_data import Fluids, Tasks
from fluids_pictures import draw
from peft import get_peft_model
from reporting import write_atomically
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

from peft_lotra import LoTRAConfig, at_task, base_state_dict, fit_gauss_newton, fit_task, normalize_codes, task_noise

WIDTH, DEGREE, RANKS, CODE = 12, 4, (5, 5, None), 3
RATE, BATCH, LARGE_BATCH, ITERATIONS = 2e-2, 256, 800, 20  # of Adam; of Levenberg–Marquardt, which follows
NOISE = 3e-3  # of a sample, in units of the fluid's own spread
COUNTS = (1, 3, 5, 10)
HELD_OUT, CALIBRATION = 12, 8  # fluids that nothing is trained on: reported ones, and those that choose and calibrate
CALIBRATION_SAMPLES = 40
# Of the rivals, Adam's rates and the numbers of steps among which the fluids for calibration choose.
RIVAL_RATES, RIVAL_MARKS = (1e-3, 3e-3, 1e-2), (0, 10, 30, 100, 300)

Outputs = Callable[[Any, Tensor, Tensor], Tensor]  # of a network, inputs, and the tasks' places among those seen


@dataclass
class Split:
    seen: list[str]
    calibration: list[str]
    new: list[str]


def split_tasks(tasks: Tasks, seed: int, new: list[str]) -> Split:
    """Random tasks for training, calibration and report; those that are asked for are the report's."""
    generator = torch.Generator().manual_seed(seed)
    names = [list(tasks.x)[k] for k in torch.randperm(len(tasks.x), generator=generator)]
    others = [name for name in names if name not in new]
    scale = min(1.0, len(names) / (5 * HELD_OUT))  # a table with few tasks is split in the same proportions
    held, calibrating = (max(1, round(scale * count)) for count in (HELD_OUT, CALIBRATION))
    if not new:
        new, others = others[:held], others[held:]
    return Split(others[calibrating:], others[:calibrating], new)


def train(
    model: nn.Module, outputs: Outputs, samples: Training, steps: int, what: str, rate: float = RATE, more: int = 0
) -> None:
    """Fit what has gradients to random samples: Adam with a cosine schedule, then `more` iterations of LM.

    The rivals have none of the latter: with it they fit the fluids seen better, and new ones worse.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in (bar := tqdm(range(steps), what, leave=False, mininterval=1)):
        x, y, task = samples.batch(BATCH)
        value = (outputs(model, x, task) - y).square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if bar.n % 100 == 0:
            bar.set_postfix(rms=f"{value.item() ** 0.5:.4f}", refresh=False)
    if more:
        fit_gauss_newton(
            model,
            lambda net, batch: outputs(net, batch[0], batch[2]) - batch[1],
            lambda iteration: samples.batch(LARGE_BATCH),
            iterations=more,
            loss_tolerance=0,
        )


class Training:
    """Random samples of the tasks that are seen."""

    def __init__(self, tasks: Tasks, seen: list[str], seed: int, device: str) -> None:
        self.x = torch.cat([tasks.x[name] for name in seen]).to(device)
        self.y = torch.cat([tasks.y[name] for name in seen]).to(device)
        self.task = torch.cat([torch.full((len(tasks.x[name]),), k) for k, name in enumerate(seen)]).to(device)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(self.x), (size,), generator=self.generator).to(self.x.device)
        return self.x[rows], self.y[rows], self.task[rows]


def trained_family(tasks: Tasks, split: Split, args: argparse.Namespace) -> nn.Module:
    """A KAN and a family adapter over all seen tasks, trained together; in fp64, with normalised codes."""
    torch.manual_seed(args.seed)
    kan = ChebyshevKAN((len(tasks.inputs), WIDTH, WIDTH, len(tasks.outputs)), DEGREE)
    code = min(CODE, len(split.seen) - 1)
    config = LoTRAConfig(r=RANKS, coefficients={"coefficients": "i o d"}, family=split.seen, family_code=code)
    model = get_peft_model(kan, config).to(args.device)
    model.requires_grad_(True)  # the base, too: there is no KAN yet that it should stay close to
    samples = Training(tasks, split.seen, args.seed, args.device)
    train(model, lambda net, x, task: net(x, lotra_task=task), samples, args.steps, "family", more=ITERATIONS)
    model.requires_grad_(False).double()
    normalize_codes(model)
    return model


def residual(net: Callable[..., Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return net(x) - y


class Samples:
    """Noisy samples of every task that was not trained on: the first ones of a random order."""

    def __init__(self, tasks: Tasks, names: list[str], seed: int, device: str) -> None:
        generator = torch.Generator().manual_seed(seed + 1)
        self.x = {name: tasks.x[name].double().to(device) for name in names}
        self.y = {name: tasks.y[name].double().to(device) for name in names}
        self.spread = {name: y.std(0) for name, y in self.y.items()}
        self.rows = {name: torch.randperm(len(x), generator=generator).to(device) for name, x in self.x.items()}
        self.noise = {
            name: NOISE * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device) * self.spread[name]
            for name, y in self.y.items()
        }

    def first(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[name][:count]
        return self.x[name][rows], (self.y[name] + self.noise[name])[rows]

    def error(self, name: str, y: Tensor) -> float:
        """Root mean square of all outputs, each in units of its standard deviation in this task."""
        return ((y - self.y[name]) / self.spread[name]).square().mean().sqrt().item()


def rivals(
    tasks: Tasks, split: Split, samples: Samples, args: argparse.Namespace
) -> dict[str, dict[int, list[float]]]:
    """Errors of the reported tasks, by method and number of samples. The rest of the file shows how LoTRA is used."""
    sizes = (len(tasks.inputs), WIDTH, WIDTH, len(tasks.outputs))
    torch.manual_seed(args.seed)
    pooled = ChebyshevKAN(sizes, DEGREE).to(args.device)
    of_all = Training(tasks, split.seen, args.seed, args.device)

    train(pooled, lambda net, x, task: net(x), of_all, args.steps, "one KAN for all", 1e-2)
    pooled.double()
    adapted = get_peft_model(pooled, LoTRAConfig(r=RANKS, coefficients={"coefficients": "i o d"}))
    found = {"an adapter of its own": tuned(adapted, split, samples)}
    plain = adapted.unload()
    plain.requires_grad_(True)
    found["full fine-tuning"] = tuned(plain, split, samples)
    found["from scratch"] = tuned(ChebyshevKAN(sizes, DEGREE).double().to(args.device), split, samples)
    if isinstance(tasks, Fluids):
        found["acentric factor"] = dict.fromkeys(COUNTS, corresponding_states(tasks, split, samples, args))
    return found


def tuned(model: nn.Module, split: Split, samples: Samples) -> dict[int, list[float]]:
    """Adam on each task's samples from the same start: all tasks, numbers of samples and rates side by side.

    The rate and the number of steps are those with the lowest median error on the tasks for calibration, for each
    number of samples. That is more than anybody has who stops early by a part of a few samples.
    """
    names, most = split.calibration + split.new, max(COUNTS)
    runs = [(rate, count, name) for rate in RIVAL_RATES for count in COUNTS for name in names]
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    own = {
        name: p.detach().expand(len(runs), *p.shape).clone() for name, p in model.named_parameters() if p.requires_grad
    }
    given = [samples.first(name, most) for _, _, name in runs]
    x, y = (torch.stack(part) for part in zip(*given, strict=True))
    counts = torch.tensor([count for _, count, _ in runs], device=x.device)
    weights = (torch.arange(most, device=x.device) < counts[:, None]) / counts[:, None]
    rates = torch.tensor([rate for rate, *_ in runs]).to(x)

    def outputs(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, {**own, **fixed}, (x,))

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return (weights[:, None] * (outputs(own, x) - y).square()).sum()

    slopes = vmap(grad(loss))
    means, squares = ({name: torch.zeros_like(p) for name, p in own.items()} for _ in range(2))
    found: dict[tuple[int, float, int], list[float]] = {}
    for step in tqdm(range(max(RIVAL_MARKS) + 1), "rivals", leave=False):
        if step in RIVAL_MARKS:
            for k, (rate, count, name) in enumerate(runs):
                with torch.no_grad():
                    y_all = outputs({key: p[k] for key, p in own.items()}, samples.x[name])
                found.setdefault((count, rate, step), []).append(samples.error(name, y_all))
        for name, slope in slopes(own, x, y, weights).items():  # Adam, with a rate for each run
            means[name].mul_(0.9).add_(slope, alpha=0.1)
            squares[name].mul_(0.999).addcmul_(slope, slope, value=0.001)
            size = (squares[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            rate_of = rates.reshape(-1, *[1] * (slope.dim() - 1))
            own[name] = own[name] - rate_of * means[name] / (1 - 0.9 ** (step + 1)) / size
    calibrating = len(split.calibration)
    errors = {}
    for count in COUNTS:
        tried = [values for (of, *_), values in found.items() if of == count]
        errors[count] = min(tried, key=lambda values: median(values[:calibrating]))[calibrating:]
    return errors


def corresponding_states(fluids: Fluids, split: Split, samples: Samples, args: argparse.Namespace) -> list[float]:
    """Errors of a KAN whose third input is the acentric factor. It takes no samples of the fluid."""
    torch.manual_seed(args.seed)
    kan = ChebyshevKAN((3, WIDTH, WIDTH, 3), DEGREE).to(args.device)
    training = Training(fluids, split.seen, args.seed, args.device)
    factors = torch.tensor([fluids.constants[name].acentric_factor for name in split.seen], device=args.device)

    def outputs(net: Callable[..., Tensor], x: Tensor, task: Tensor) -> Tensor:
        return net(torch.cat([x, factors[task, None]], 1))

    train(kan, outputs, training, args.steps, "acentric factor", 1e-2)
    kan.double()
    with torch.no_grad():
        return [
            samples.error(
                name,
                kan(torch.cat([x, x.new_full((len(x), 1), fluids.constants[name].acentric_factor)], 1)),
            )
            for name in split.new
            for x in [samples.x[name]]
        ]


def fits(model: nn.Module, split: Split, samples: Samples, counts: tuple[int, ...]) -> dict[str, Any]:
    """The new tasks from their first samples, by the code alone and with the core: errors, intervals, codes."""
    calibration = {name: samples.first(name, CALIBRATION_SAMPLES) for name in split.calibration}
    noise = task_noise(model, residual, calibration)
    found: dict[str, Any] = {"errors": {}, "inside": {}, "codes": {}, "last": {}, "seconds": []}
    for train in ("code", "core"):
        for count in counts:
            errors, inside = [], []
            for name in split.new:
                start = time.perf_counter()
                fit = fit_task(model, None, residual, samples.first(name, count), noise=noise, train=train)
                found["seconds"] += [time.perf_counter() - start] * (train == "code")
                mean, deviation = fit.predict(samples.x[name])
                errors.append(samples.error(name, mean))
                inside.append(((mean - samples.y[name]).abs() < 1.96 * deviation).double().mean().item())
                if train == "core":
                    found["codes"][name], found["last"][name] = fit.code, (fit, mean, deviation, count)
            found["errors"].setdefault(train, {})[count] = errors
            found["inside"].setdefault(train, {})[count] = inside
    with torch.no_grad(), at_task(model, code=torch.zeros_like(fit.code)):
        found["before"] = [samples.error(name, model(samples.x[name])) for name in split.new]
    return found


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
    tasks, new = args.tasks, args.fluid
    split = split_tasks(tasks, args.seed, new)
    counts = COUNTS if args.samples is None else (args.samples,)
    samples = Samples(tasks, split.calibration + split.new, args.seed, args.device)
    print(
        f"{len(split.seen)} tasks to learn from, {len(split.calibration)} to calibrate, {len(split.new)} new: "
        + ", ".join(split.new)
    )
    start = time.perf_counter()
    model = trained_family(tasks, split, args)
    numbers = model.get_nb_trainable_parameters()[1]
    print(f"Family: {numbers:,} numbers, {time.perf_counter() - start:.0f} s")
    found = fits(model, split, samples, counts)
    others = rivals(tasks, split, samples, args) if args.samples is None and not new else {}
    print(table(found, others, counts, split, float(median(found["seconds"]))))
    if args.suggest:
        print(suggestions(tasks, split, samples, found))
    save(model, args.output_dir)
    record = {
        "split": vars(split),
        "numbers": numbers,
        "before": found["before"],
        "errors": {**found["errors"], **others},
        "inside": found["inside"],
    }
    write_atomically(args.output_dir / "fluids.json", lambda path: path.write_text(json.dumps(record) + "\n"))
    figure = draw(tasks, model, split, samples, found, others, counts)
    write_atomically(args.output_dir / "fluids.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    print(f"Written: {args.output_dir}/fluids.png, .json, and the KAN with its adapter, kan.pt and family/")


def table(
    found: dict[str, Any],
    others: dict[str, dict[int, list[float]]],
    counts: tuple[int, ...],
    split: Split,
    seconds: float,
) -> str:
    """Medians over the new tasks."""
    rows = {
        "LoTRA family, code and core": found["errors"]["core"],
        "LoTRA family, code alone": found["errors"]["code"],
        **others,
    }
    lines = [
        f"\nError of {len(split.new)} new tasks, median, over samples of each (1 is the spread of the task's values):"
    ]
    lines.append(f"{'':30}" + "".join(f"{count:>9}" for count in counts))
    for label, errors in rows.items():
        lines.append(f"{label:30}" + "".join(f"{median(errors[count]):9.3f}" for count in counts))
    lines.append(f"without a sample, at the mean of all codes: {median(found['before']):.3f}")
    inside = [sum(shares) / len(shares) for by_count in found["inside"].values() for shares in by_count.values()]
    lines.append(f"of intervals of 95 %, {min(inside):.0%} to {max(inside):.0%} hold the true value")
    lines.append(f"a code takes {1e3 * seconds:.0f} ms")
    return "\n".join(lines)


def suggestions(tasks: Tasks, split: Split, samples: Samples, found: dict[str, Any]) -> str:
    """The next three samples of each new task."""
    lines = ["\nMeasure next:"]
    for name in split.new:
        fit, *_, count = found["last"][name]
        rows = fit.suggest(samples.x[name], min(3, len(samples.x[name])))
        x, _ = tasks.unscaled(samples.x[name][rows].cpu().to(tasks.low), samples.y[name][rows].cpu().to(tasks.low))
        named = [zip(tasks.inputs, row, strict=True) for row in x.tolist()]
        places = [", ".join(f"{column} {value:.3g}" for column, value in row) for row in named]
        lines.append(f"  {name}, after {count}: " + "; ".join(places))
    return "\n".join(lines)


def save(model: nn.Module, folder: Path) -> None:
    """The adapter, and the KAN without it: `PeftModel.from_pretrained(kan, folder / "family")` puts them together."""
    model.save_pretrained(folder / "family")
    write_atomically(folder / "kan.pt", lambda path: torch.save(base_state_dict(model), path))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--fluid", nargs="+", default=[], help="new fluids: of the table, or of CoolProp if that is installed")
    add("--data", type=Path, help="tasks of your own, as CSV: see fluids_data.from_csv")
    add("--samples", type=positive_int, help="of each new task, in place of 1, 3, 5 and 10, without the rivals")
    add("--suggest", action="store_true", help="print which samples to take next")
    add("--steps", type=positive_int, default=1000, help="of Adam on the fluids seen")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--output-dir", type=Path, default=Path("outputs/fluids"))
    args = parser.parse_args(argv)
    check_seed(parser, args)
    check_device(parser, args)
    try:
        args.tasks, args.fluid = with_fluids(args)
    except (ValueError, ImportError, FileNotFoundError) as error:
        parser.error(str(error))
    make_output_dir(parser, args)
    return args


def with_fluids(args: argparse.Namespace) -> tuple[Tasks, list[str]]:
    """The tasks, with those that are asked for, and the names that these have there."""
    tasks = fluids_data.load() if args.data is None else fluids_data.from_csv(args.data)
    names = []
    for name in args.fluid:
        if name not in tasks.x:
            if args.data is not None:
                raise ValueError(f"argument --fluid: {name!r} is none of the tasks of {args.data}")
            more = fluids_data.from_coolprop(name)
            (name,) = more.x  # the name that CoolProp has for it
            tasks.x.update(more.x)
            tasks.y.update(more.y)
            tasks.constants.update(more.constants)  # type: ignore[attr-defined]
        names.append(name)
    if len(tasks.x) - len(names) < 4:
        raise ValueError(f"argument --data: there should be tasks to learn from, but {len(tasks.x)} are there")
    fewest = min(len(x) for x in tasks.x.values())
    if fewest < (args.samples or max(COUNTS)):
        raise ValueError(f"argument --samples: a task has {fewest} samples only")
    return tasks, names


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
