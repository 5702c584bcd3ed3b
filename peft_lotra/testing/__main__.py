"""Runs `KANLayerTests` on a layer and prints a report, for an issue or a bug report.

    python -m peft_lotra.testing my_module:factory

`factory()` returns the layer and a sample input, and optionally the layer's coefficients as in
`LoTRAConfig(coefficients=...)`, by names such as "weight". Without them, the coefficients of the registered class are
used, or they are inferred. Python also looks for the module in the current folder. The exit status is 0 if no test
failed.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from ..coefficients import known_coefficients
from ..inference.search import infer_coefficients
from .harness import KANLayerTests


def report(factory: Callable[[], Any]) -> bool:
    """Print how a layer is adapted and which tests it passes. Returns whether no test failed."""
    made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    layer, x, given = (*parts, None, None)[:3]
    if not isinstance(layer, nn.Module) or not isinstance(x, torch.Tensor) or len(parts) > 3:
        raise TypeError(
            "the factory should return (layer, sample) or (layer, sample, coefficients), a torch.nn.Module and a "
            f"tensor first, but it returned {tuple(type(part).__name__ for part in parts)}"
        )
    print(f"{type(layer).__module__}.{type(layer).__qualname__}, input {tuple(x.shape)} of {x.dtype}")
    print(f"peft_lotra {version('peft_lotra')}, torch {torch.__version__}, peft {peft.__version__}")
    if given is None and not known_coefficients(layer):
        given = infer_coefficients(nn.Sequential(layer), x)
        print(f"\n{given}\n")

    class Tests(KANLayerTests):
        coefficients = dict(given or {})
        ranks = (1, 1, 2)

        def make_layer(self) -> nn.Module:
            return factory()[0]

        def make_sample(self) -> torch.Tensor:
            return factory()[1]

    counts = {"passed": 0, "skipped": 0, "failed": 0}
    for name in [name for name in dir(Tests) if name.startswith("test_")]:
        outcome, text = _outcome(getattr(Tests(), name))
        counts[outcome] += 1
        print(f"{name.removeprefix('test_').replace('_', ' '):<32}{outcome}{text}")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return not counts["failed"]


def _outcome(test: Callable[..., None]) -> tuple[str, str]:
    """Runs a test. Returns the outcome, and a text with the warnings or the reason."""
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            test(*[Path(folder)] * len(inspect.signature(test).parameters))
        texts = dict.fromkeys(str(warning.message) for warning in noted)
        return "passed", "".join(f"\n    warned: {text}" for text in texts)
    except pytest.skip.Exception as skipped:
        return "skipped", f": {skipped}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f": {type(error).__name__}: {error}\n    in {last.filename}:{last.lineno}, {last.line}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m peft_lotra.testing", description="Put a KAN layer through KANLayerTests and print a report."
    )
    parser.add_argument("factory", metavar="module:factory", help="returns (layer, sample) or (…, coefficients)")
    name = parser.parse_args(argv).factory
    if ":" not in name:
        parser.error(f"argument module:factory: should be like my_module:make, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"argument module:factory: {name!r} cannot be imported: {error}")
    try:
        return 0 if report(factory) else 1
    except (TypeError, ValueError) as error:
        parser.error(f"argument module:factory: {error}")


if __name__ == "__main__":
    sys.exit(main())
