"""A language model of characters: from the prose of Python's documentation to the source code of its modules.

Both are read from the Python that runs this.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from objectives import Data, Objective, Supervised
from torch import Tensor, nn
from transformer_kan import TransformerKANConfig, TransformerKANForCausalLM

from . import FIRST_TUNING_SEED, Task

CHARACTERS = {character: number for number, character in enumerate(["\n", *map(chr, range(32, 127))])}
TRAINING_MODULES = (
    "argparse",
    "configparser",
    "difflib",
    "heapq",
    "mailbox",
    "optparse",
    "pickle",
    "shutil",
    "tarfile",
)
VALIDATION_MODULES = ("cmd", "filecmp", "locale", "queue", "uuid", "zipapp")  # for rates
TEST_MODULES = ("calendar", "csv", "fractions", "gettext", "statistics", "textwrap")


@cache
def text(name: str) -> Tensor:
    """The numbers of the characters of "prose" or of a module's source; those that have no number are left out."""
    if name == "prose":
        from pydoc_data.topics import topics

        content = "\n".join(topics[topic] for topic in sorted(topics))
    else:
        content = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
    return torch.tensor([CHARACTERS[character] for character in content if character in CHARACTERS])


def shares(modules: Sequence[str], characters: int) -> list[Tensor]:
    """The same number of characters of every module, from its middle: the beginning is mostly prose."""
    length = characters // len(modules)
    return [source[max(0, len(source) - length) // 2 :][:length] for source in map(text, modules)]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every token, given those before it; mean, in nats. shapes: (N, t, tokens), (N, t)"""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class OnTokens(Supervised):
    """The model's own loss on tokens, and the cross-entropy of its logits."""

    def __init__(self, training: Data, test: Data, batch: int, seed: int) -> None:
        super().__init__(training, test, None, cross_entropy, batch, seed)  # the loss is the model's

    def loss(self, model: nn.Module, step: int) -> Tensor:
        x, y = self.drawn(step)
        return model(input_ids=x, labels=y).loss

    def _on(self, model: nn.Module, data: Data, rows: int = 128) -> float:
        outputs = torch.cat([model(input_ids=x).logits for x in data.x.split(rows)])
        return self.metric_fn(outputs, data.y).item()


@dataclass(frozen=True, kw_only=True)
class Characters(Task):
    """Windows of `length` characters; `samples` characters of source code to train on, the same share of each
    module."""

    samples: int = 100_000
    test_samples: int = 9_600
    length: int = 48
    batch: int = 16
    hidden: int = 64
    kan_hidden: int = 64
    layers: int = 1
    heads: int = 4
    basis: int = 5

    metric = "nats per character"
    only_target = ("samples",)

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = TransformerKANConfig(
            vocab_size=len(CHARACTERS),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
            kan_hidden_size=self.kan_hidden,
            kan_degree=self.basis - 1,
            use_cache=False,
        )
        return TransformerKANForCausalLM(config)

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        if part == "base":
            prose = text("prose")
            training, tests = prose[: -self.test_samples], [prose[-self.test_samples :]]
        else:
            training = torch.cat(shares(TRAINING_MODULES, self.samples))
            tests = shares(VALIDATION_MODULES if seed >= FIRST_TUNING_SEED else TEST_MODULES, self.test_samples)
        windows = training.to(device).unfold(0, self.length, 1)  # from every character on; a view
        held_out = torch.cat([test.unfold(0, self.length, self.length) for test in tests]).to(device)
        return OnTokens(Data(windows, windows), Data(held_out, held_out), self.batch, seed)


TASK = Characters
