"""Does it help to align an adapter with the first gradient? The loss after some Adam steps, for three initialisations.

    python examples/initializations.py
    python examples/initializations.py --tasks elliptic --seeds 3 --steps 100

The tasks are three PDEs (with bases from pde_transfer.py's output directory, or trained in the same way) and the
regression task of learning_rates.py. The command prints medians over the seeds, and for how many seeds an
initialisation beats the random one. It writes all losses as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import learning_rates
import torch
from command_line import exit_code, make_output_dir, new_parser, positive_int
from pde_transfer import LEARNING_RATES, attach_lotra, trained_base
from pdes import LINEAR, PDES
from peft import PeftModel
from reporting import write_atomically
from torch import Tensor
from tqdm import tqdm

from peft_lotra import initialize_lotra_weights

METHODS = ("random", "gradient", "gradient_hosvd")
TASKS = (*LINEAR, "regression")
GRADIENT_BATCHES = 4  # those from which the gradient of an initialisation is taken
Losses = Iterator[Callable[[PeftModel], Tensor]]


def task(args: argparse.Namespace, name: str) -> tuple[Callable[[int], PeftModel], Callable[[int], Losses], float]:
    """A function from a seed to an adapted model, a function from a seed to an endless series of losses, the rate."""
    if name == "regression":

        def regression_losses(seed: int) -> Losses:
            return (lambda model, x=x: learning_rates.loss_of(model, x) for x in learning_rates.batches(seed))

        return lambda seed: learning_rates.adapted(64, seed, "random"), regression_losses, 1e-2
    family = PDES[name]
    target = family(family.target_parameter)
    settings = argparse.Namespace(**vars(args) | {"pde": name, "kan": "chebyshev", "seed": 0, "device": "cpu"})
    load = trained_base(settings, family(family.base_parameter), target.grid())

    def model(seed: int) -> PeftModel:
        base = load()
        torch.manual_seed(seed)
        return attach_lotra(base, None, args.compression_ratio)

    def losses(seed: int) -> Losses:
        generator = torch.Generator().manual_seed(seed)
        while True:
            points = target.sample(generator)
            yield lambda model, points=points: target.loss(model, points)

    return model, losses, LEARNING_RATES["chebyshev"]["lotra"]


def final_loss(model: PeftModel, losses: Losses, method: str, steps: int, rate: float) -> float:
    """The median loss of the last five of `steps` Adam steps."""
    first = [next(losses) for _ in range(GRADIENT_BATCHES)]
    if method != "random":

        def train_step() -> None:
            for loss in first:
                loss(model).backward()

        initialize_lotra_weights(model, train_step, method=method, progressbar=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    course = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next(losses)(model)
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    return statistics.median(course[-5:])


def run(args: argparse.Namespace) -> None:
    results: dict[str, dict[str, list[float]]] = {}
    for name in args.tasks:
        make, losses, rate = task(args, name)
        found = results[name] = {method: [] for method in METHODS}
        for seed in tqdm(range(args.seeds), desc=name, unit="seed", dynamic_ncols=True):
            for method in METHODS:  # the same points and the same random factors for all
                found[method].append(final_loss(make(seed), losses(seed), method, args.steps, rate))
    print(f"\nLoss after {args.steps} Adam steps, median over {args.seeds} seeds (share of seeds below random)\n")
    print(f"{'task':12}" + "".join(f"{method:>24}" for method in METHODS))
    for name, found in results.items():
        cells = []
        for method in METHODS:
            pairs = list(zip(found[method], found["random"], strict=True))
            share = "" if method == "random" else f" ({sum(a < b for a, b in pairs)}/{len(pairs)})"
            cells.append(f"{statistics.median(found[method]):.2e}{share}".rjust(24))
        print(f"{name:12}" + "".join(cells))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    path = args.output_dir / "initializations.json"
    write_atomically(path, lambda p: p.write_text(json.dumps({"settings": settings, "losses": results}, indent=1)))
    print(f"\nWritten: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--tasks", choices=TASKS, nargs="+", default=list(TASKS), help="what to adapt to")
    add("--seeds", type=positive_int, default=5, help="of random factors and points")
    add("--steps", type=positive_int, default=50, help="Adam steps of each run")
    add("--base-steps", type=positive_int, default=1500, help="training steps of the PDEs' bases")
    add("--output-dir", type=Path, default=Path("outputs/pde_transfer"), help="that of pde_transfer.py")
    parser.set_defaults(compression_ratio=0.1)
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "The bases that were done will be used again.")


if __name__ == "__main__":
    sys.exit(main())
