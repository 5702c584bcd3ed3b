"""A Transformer-KAN of ten million numbers: from the source code of Python's library to the prose of its manual.

Both are read from the Python that runs this. The MLP of each block of GPT-2 is two FastKAN layers. It computes in
bfloat16, with float32 weights.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from layers import FastKANLayer
from objectives import Data, Objective
from torch import Tensor, nn

from peft_lotra import register_kan_layer

from . import FIRST_TUNING_SEED
from .characters import CHARACTERS, Characters, OnTokens, text

NOT_OF_THE_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
PARTS = {"training": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # of the prose

register_kan_layer(
    FastKANLayer, lambda layer: {"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": len(layer.grid)}}}
)


@cache
def library() -> Tensor:
    """The characters of all modules, in a random order that is always the same."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in folder.rglob("*.py") if not NOT_OF_THE_LIBRARY & set(p.relative_to(folder).parts)]
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    content = "\n".join(sorted(paths)[k].read_text(encoding="utf-8", errors="ignore") for k in order)
    return torch.tensor([CHARACTERS[character] for character in content if character in CHARACTERS])


class OnTokensOfHalfPrecision(OnTokens):
    def loss(self, model: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(model, step)

    def _on(self, model: nn.Module, data: Data, rows: int = 16) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            parts = [super(OnTokensOfHalfPrecision, self)._on(model, Data(x, x)) * len(x) for x in data.x.split(rows)]
        return sum(parts) / len(data.x)


class OfAllTokens(nn.Sequential):
    """Modules on (N, n), called with (batch, tokens, n)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class LargeText(Characters):
    samples: int = 370_000
    length: int = 256
    hidden: int = 384
    kan_hidden: int = 384
    layers: int = 5
    heads: int = 6
    basis: int = 4
    base_lr: float = 1e-3

    one_base = True
    smoke = {"length": 32, "hidden": 48, "kan_hidden": 48, "layers": 1, "heads": 2}

    def build(self, seed: int) -> nn.Module:
        model = Characters.build(replace(self, kan_hidden=1), seed)
        for block in model.transformer.h:
            layers = ((self.hidden, self.kan_hidden), (self.kan_hidden, self.hidden))
            block.mlp = OfAllTokens(*(FastKANLayer(n, m, self.basis) for n, m in layers))
        return model

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        if part == "base":
            training, test = library()[:-100_000], library()[-100_000:]
        else:
            prose = text("prose")
            judged = "validation" if seed >= FIRST_TUNING_SEED else "test"
            training, test = (
                prose[int(low * len(prose)) : int(high * len(prose))]
                for low, high in (PARTS["training"], PARTS[judged])
            )
            training = training[: self.samples]
        windows = training.to(device).unfold(0, self.length, 1)
        held_out = test[: self.test_samples].to(device).unfold(0, self.length, self.length)
        return OnTokensOfHalfPrecision(Data(windows, windows), Data(held_out, held_out), self.batch, seed)


TASK = LargeText
