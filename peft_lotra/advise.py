"""Which tool for a task: the KAN itself, or an adapter, by second order or by Adam. Tries each for some seconds.

    python -m peft_lotra.advise my_module:factory

`factory()` returns the arguments of `advise`: (model, residual, data), and optionally a LoTRAConfig. Python also looks
for the module in the current folder.
"""

from __future__ import annotations

import argparse
import copy
import math
import pkgutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from .config.lotra_config import LoTRAConfig
from .layers.lotra import adapted_tensors
from .preserved import check_model
from .training.gauss_newton import fit_gauss_newton

Residual = Callable[[Any, Any], Any]

_RATES = (1e-2, 1e-3)  # of Adam; each gets its part of the time
_LEVEL = 1.2  # errors within this factor are level, and the tool with fewer numbers is then taken


class Trial(NamedTuple):
    """What one tool has reached.

    Attributes:
        tool: in words.
        error: the root mean square of the residuals of the rows that were held out.
        trained: how many numbers were trained.
        stored: the bytes of a file of these numbers.
        seconds: that the fit took.
        code: what to write to use this tool.
    """

    tool: str
    error: float
    trained: int
    stored: int
    seconds: float
    code: str


class Advice(tuple[Trial, ...]):
    """The trials of `advise`. They print as a table, with the advice below it."""

    @property
    def best(self) -> Trial:
        """The trial with the fewest trained numbers among those with nearly the least error."""
        least = min(trial.error for trial in self)
        return min((t for t in self if t.error <= _LEVEL * least), key=lambda t: (t.trained, t.seconds))

    def __str__(self) -> str:
        rows = [("", "error", "numbers", "bytes", "seconds")]
        rows += [(t.tool, f"{t.error:.3g}", f"{t.trained:,}", f"{t.stored:,}", f"{t.seconds:.1f}") for t in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*lines, f"take: {self.best.tool}", self.best.code])


def advise(
    model: nn.Module,
    residual: Residual,
    data: Any,
    *,
    config: LoTRAConfig | None = None,
    seconds: float = 10.0,
    held_out: float = 0.2,
    progressbar: bool = True,
) -> Advice:
    """Fit copies of a model by several tools, each for some seconds, and say which to take.

    >>> print(advise(kan, lambda net, batch: net(batch[0]) - batch[1], (x, y)))

    The tools are the KAN itself and an adapter, each by `fit_gauss_newton` and by Adam. The error is that on rows that
    are held out. What the tools cannot show is a family: if there are other tasks, and few samples of this one, use
    `fit_task`.

    Args:
        model: a model without adapters. It stays as it is.
        residual: as `fit_gauss_newton` takes it, one function.
        data: tensors with N rows each, in tuples or dicts.
        config: that of the adapter; by default `LoTRAConfig()`.
        seconds: for each tool.
        held_out: the fraction of the rows on which errors are measured.
        progressbar: whether to show progress.

    Raises:
        TypeError, ValueError: naming the argument; and as `get_peft_model` for layers that are not known.

    Source: ours.
    """
    check_model(model=model)
    if adapted_tensors(model):
        raise ValueError("`model` has adapters: pass the model without them, by `unload()` or `merge_and_unload()`")
    if not seconds > 0 or not 0 < held_out < 1:
        raise ValueError(f"`seconds`={seconds!r} should be positive, and `held_out`={held_out!r} between 0 and 1")
    rows = {len(leaf) for leaf in tree_leaves(data) if isinstance(leaf, torch.Tensor) and leaf.dim()}
    if len(rows) != 1 or min(rows) < 4:
        raise ValueError(f"`data` should be tensors with N rows each, N ≥ 4, but has {sorted(rows)} rows")
    order = torch.randperm(*rows, generator=torch.Generator().manual_seed(0))
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    measured, kept = (tree_map(lambda t, p=p: t[p.to(t.device)], data) for p in (order[:count], order[count:]))
    config = LoTRAConfig() if config is None else config

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            parts = [part.double().square().flatten() for part in tree_leaves(residual(net, measured))]
        found = float(torch.cat(parts).mean().sqrt())
        return found if math.isfinite(found) else math.inf

    def trial(tool: str, adapter: str, rate: float | None) -> Trial:
        net = copy.deepcopy(model).eval()
        net = get_peft_model(net, config).eval() if adapter else net
        trained = [p for p in net.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("`model` has no parameter that requires a gradient: call `model.requires_grad_(True)`")
        start = time.perf_counter()
        if rate is None:
            fit_gauss_newton(net, residual, kept, iterations=1000, max_seconds=seconds, progressbar=False)
            code = "fit_gauss_newton(model, residual, data)"
        else:
            _by_adam(net, trained, residual, kept, rate, seconds / len(_RATES))
            code = f"torch.optim.Adam(model.parameters(), lr={rate})"
        spent, numbers = time.perf_counter() - start, sum(p.numel() for p in trained)
        size = sum(p.numel() * p.element_size() for p in trained)
        return Trial(tool, error(net), numbers, size, spent, adapter + code)

    tools = {"the KAN itself": "", "an adapter": f"model = get_peft_model(model, {_written(config)})\n"}
    runs = [(name, tool, rates) for name, rates in (("LM", (None,)), ("Adam", _RATES)) for tool in tools]
    trials = [Trial("as it is", error(copy.deepcopy(model).eval()), 0, 0, 0.0, "")]
    for name, tool, rates in tqdm(runs, desc="advise", disable=not progressbar, leave=False):
        found = [trial(f"{tool}, {name}", tools[tool], rate) for rate in rates]
        trials.append(min(found, key=lambda trial: trial.error))
    return Advice(trials)


def _by_adam(
    net: nn.Module, trained: list[nn.Parameter], residual: Residual, data: Any, rate: float, seconds: float
) -> None:
    optimizer, end = torch.optim.Adam(trained, lr=rate), time.perf_counter() + seconds
    while time.perf_counter() < end:
        optimizer.zero_grad()
        torch.stack([part.square().mean() for part in tree_leaves(residual(net, data))]).sum().backward()
        optimizer.step()


def _written(config: LoTRAConfig) -> str:
    """The config as code, with the fields that are not the default's."""
    default = {name: value for name, value in vars(LoTRAConfig()).items() if not name.startswith("_")}
    given = {name: getattr(config, name) for name, value in default.items() if getattr(config, name) != value}
    return f"LoTRAConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m peft_lotra.advise", description="Say which tool suits a task.")
    parser.add_argument("factory", metavar="module:factory", help="returns (model, residual, data) or (…, config)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each tool (default: 10)")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = pkgutil.resolve_name(args.factory)()
        print(advise(*made[:3], config=made[3] if len(made) > 3 else None, seconds=args.seconds))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        parser.error(f"{args.factory}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
