"""A Transformer-KAN of ten million numbers: from the source code of Python's library to the prose of its manual.

Both are read from the Python that runs this. The MLP of each block of GPT-2 is two FastKAN layers. It computes in
bfloat16, with float32 weights.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from layers import FastKANLayer
from objectives import Data, Objective, Supervised
from torch import Tensor, nn
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

from peft_lotra import register_kan_layer

from . import FIRST_TUNING_SEED, Task

CHARACTERS = {character: number for number, character in enumerate(["\n", *map(chr, range(32, 127))])}
NOT_OF_THE_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
PARTS = {"training": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # of the prose

register_kan_layer(
    FastKANLayer, lambda layer: {"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": len(layer.grid)}}}
)


def numbers(text: str) -> Tensor:
    """Of the characters; those that have no number are left out."""
    return torch.tensor([CHARACTERS[character] for character in text if character in CHARACTERS])


@cache
def library() -> Tensor:
    """All modules, in a random order that is always the same."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in folder.rglob("*.py") if not NOT_OF_THE_LIBRARY & set(p.relative_to(folder).parts)]
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    return numbers("\n".join(sorted(paths)[k].read_text(encoding="utf-8", errors="ignore") for k in order))


@cache
def prose() -> Tensor:
    from pydoc_data.topics import topics

    return numbers("\n".join(topics[topic] for topic in sorted(topics)))


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every token, given those before it; mean, in nats. shapes: (N, t, tokens), (N, t)"""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class OnTokens(Supervised):
    """The model's own loss on tokens, and the cross-entropy of its logits, in half precision."""

    def __init__(self, training: Data, test: Data, batch: int, seed: int) -> None:
        super().__init__(training, test, None, cross_entropy, batch, seed)  # the loss is the model's

    def loss(self, model: nn.Module, step: int) -> Tensor:
        x, y = self.drawn(step)
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=x, labels=y).loss

    def _on(self, model: nn.Module, data: Data, rows: int = 16) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            parts = [cross_entropy(model(input_ids=x).logits, x).item() * len(x) for x in data.x.split(rows)]
        return sum(parts) / len(data.x)


class OfAllTokens(nn.Sequential):
    """Modules on (N, n), called with (batch, tokens, n)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class LargeText(Task):
    """Windows of `length` characters; the first `samples` characters of the prose to train on."""

    samples: int = 370_000
    test_samples: int = 9_600
    length: int = 256
    batch: int = 16
    hidden: int = 384
    kan_hidden: int = 384
    layers: int = 5
    heads: int = 6
    basis: int = 4
    base_lr: float = 1e-3

    metric = "nats per character"
    only_target = ("samples",)
    one_base = True
    smoke = {"length": 32, "hidden": 48, "kan_hidden": 48, "layers": 1, "heads": 2}

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = TransformerKANConfig(
            vocab_size=len(CHARACTERS),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
            kan_hidden_size=1,  # of the layers that are replaced
            kan_degree=self.basis - 1,
            use_cache=False,
        )
        model = TransformerKANForCausalLM(config)
        for block in model.transformer.h:
            layers = ((self.hidden, self.kan_hidden), (self.kan_hidden, self.hidden))
            block.mlp = OfAllTokens(*(FastKANLayer(n, m, self.basis) for n, m in layers))
        return model

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        if part == "base":
            training, test = library()[:-100_000], library()[-100_000:]
        else:
            judged = "validation" if seed >= FIRST_TUNING_SEED else "test"
            ends = ([int(end * len(prose())) for end in PARTS[name]] for name in ("training", judged))
            training, test = (prose()[slice(*pair)] for pair in ends)
            training = training[: self.samples]
        windows = training.to(device).unfold(0, self.length, 1)  # from every character on; a view
        held_out = test[: self.test_samples].to(device).unfold(0, self.length, self.length)
        return OnTokens(Data(windows, windows), Data(held_out, held_out), self.batch, seed)


TASK = LargeText
