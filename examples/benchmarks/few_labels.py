"""Few labels: an adapter by Levenberg–Marquardt on cross-entropy, with and without weight decay, and by Adam.

    python examples/benchmarks/few_labels.py

A KAN that has learned upright digits gets 200 labelled digits turned by 40°, and 100 more for validation: they choose
Adam's rate (of three) and step, LM's iteration, and its weight decay (of four). Accuracies are on 800 other
turned digits. The command writes few_labels.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from peft import get_peft_model
from reporting import write_atomically
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, fit_gauss_newton

RATES, DECAYS = (3e-3, 1e-2, 3e-2), (1e-3, 1e-2, 1e-1, 1.0)
Part = tuple[Tensor, Tensor]  # images and labels


def digits(angle: float) -> Part:
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits

    data = load_digits()
    images = rotate(data.images, angle, (1, 2), reshape=False, order=1) / 8 - 1
    return torch.as_tensor(images).float().flatten(1), torch.as_tensor(data.target)


def adam(model: nn.Module, part: Part, rate: float, seed: int, validation: Part | None = None) -> float:
    """400 steps; with validation, the parameters with its lowest loss are kept, and that loss is returned."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, source = torch.optim.Adam(trained, rate), torch.Generator().manual_seed(seed)
    lowest, best = math.inf, [p.detach().clone() for p in trained]
    for step in range(400):
        rows = torch.randint(len(part[0]), (64,), generator=source)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(part[0][rows]), part[1][rows]).backward()
        optimizer.step()
        if validation is not None and step % 10 == 9:
            with torch.no_grad():
                loss = nn.functional.cross_entropy(model(validation[0]), validation[1]).item()
            if loss < lowest:
                lowest, best = loss, [p.detach().clone() for p in trained]
    if validation is not None:
        with torch.no_grad():
            for p, value in zip(trained, best, strict=True):
                p.copy_(value)
    return lowest


def lm(model: nn.Module, part: Part, decay: float, validation: Part) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`data` give")
        result = fit_gauss_newton(
            model, lambda net, batch: (net(batch[0]), batch[1]), part, loss="cross_entropy", weight_decay=decay,
            iterations=30, validation=validation, patience=6, progressbar=False,
        )  # fmt: skip
    return min(result.validation_losses)


def accuracy(model: nn.Module, part: Part) -> float:
    with torch.no_grad():
        return (model(part[0]).argmax(1) == part[1]).double().mean().item()


def solve(seed: int) -> dict[str, Any]:
    """Accuracies and CPU seconds, by method."""
    upright, turned = digits(0), digits(40)
    order = torch.randperm(len(upright[1]), generator=torch.Generator().manual_seed(seed))
    before, train, held, test = order[:700], order[700:900], order[900:1000], order[1000:]

    def of(data: Part, rows: Tensor) -> Part:
        return data[0][rows], data[1][rows]

    torch.manual_seed(seed)
    base = ChebyshevKAN((64, 32, 10), 4)
    adam(base, of(upright, before), 3e-3, seed)
    fits = {
        "Adam": [
            lambda model, rate=rate: adam(model, of(turned, train), rate, seed, of(turned, held)) for rate in RATES
        ],
        "LM": [lambda model: lm(model, of(turned, train), 0.0, of(turned, held))],
        "LM, weight decay": [
            lambda model, decay=decay: lm(model, of(turned, train), decay, of(turned, held)) for decay in DECAYS
        ],
    }
    found: dict[str, Any] = {"before": {"accuracy": accuracy(base, of(turned, test)), "seconds": 0.0}}
    for label, ways in fits.items():
        start, tried = time.process_time(), []
        for fit in ways:
            torch.manual_seed(seed)
            model = get_peft_model(copy.deepcopy(base), LoTRAConfig(coefficients={"coefficients": "i o d"}))
            loss = fit(model)
            tried.append((loss, accuracy(model, of(turned, test))))
        found[label] = {"accuracy": min(tried)[1], "seconds": time.process_time() - start}
    return found


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = [solve(seed) for seed in range(args.seeds)]
    for label in rows[0]:
        values, seconds = ([row[label][key] for row in rows] for key in ("accuracy", "seconds"))
        print(f"{label}: {median(values):.1%} ({min(values):.1%} to {max(values):.1%}), {median(seconds):.1f} CPU s")
    write_atomically(args.output_dir / "few_labels.json", lambda path: path.write_text(json.dumps(rows) + "\n"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=5)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/few_labels"))
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
