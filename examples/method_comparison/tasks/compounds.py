"""Properties of organic compounds from their structure: from one family to another, or from one property to another.

The tables are those of the package chemicals: critical constants and boiling points collected by Yaws, structures from
PubChem.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from math import log, nan
from pathlib import Path
from typing import Any

import torch
from kans import build_kan, coefficients_of
from objectives import Data, Objective, Regression, generator
from torch import Tensor, nn

from . import Task

ELEMENTS = ("C", "H", "O", "N", "S", "F", "Cl", "Br", "I", "Si", "P")
FAMILIES = {
    "organic compounds": lambda elements: "C" in elements,
    "hydrocarbons and oxygen compounds": lambda elements: elements <= {"C", "H", "O"},
    "nitrogen compounds": lambda elements: {"C", "N"} <= elements <= {"C", "H", "O", "N"},
    "halogen compounds": lambda elements: "C" in elements and bool(elements & {"F", "Cl", "Br", "I"}),
    "sulphur compounds": lambda elements: {"C", "S"} <= elements <= {"C", "H", "O", "S"},
}
# By name the file, and the greatest value that is believed: the tables hold boiling points of 5,000 K.
PROPERTIES = {
    "Tc": ("Critical Properties/Yaws Collection.tsv", 1200.0),
    "Pc": ("Critical Properties/Yaws Collection.tsv", 1e8),
    "Vc": ("Critical Properties/Yaws Collection.tsv", 1e-2),
    "omega": ("Critical Properties/Yaws Collection.tsv", 3.0),
    "Tb": ("Phase Change/Yaws Boiling Points.tsv", 900.0),
}
TEST_SAMPLES = 1000  # at most


def features(formula: str, structure: str, weight: str) -> list[float]:
    """Numbers of atoms, of double and triple bonds, branches, rings and hydroxyl-like ends, and the molar mass."""
    counts = dict.fromkeys(ELEMENTS, 0)
    for element, number in re.findall(r"([A-Z][a-z]?)(\d*)", formula):
        if element in counts:
            counts[element] += int(number or 1)
    plain = re.sub(r"\[[^]]*]", "C", structure)
    ends = len(re.findall(r"O(?=\)|$)", plain)) - len(re.findall(r"=O(?=\)|$)", plain))
    bonds = [plain.count(sign) for sign in "=#("]
    return [*counts.values(), *bonds, len(re.findall(r"\d", plain)) / 2, ends, float(weight)]


@cache
def compounds() -> tuple[list[set[str]], Tensor, dict[str, Tensor]]:
    """Of every compound: its elements; log(1 + features), shape (compounds, features), scaled to mean 0 and deviation
    1; the logarithms of the properties, NaN where there is none.

    Of isomers that have the same features the first is kept: no compound of a test has a twin in the training data.
    The package's files are read without importing it.
    """
    folder = Path(importlib.util.find_spec("chemicals").origin).parent
    structures = {}
    for size in ("large", "small"):
        with (folder / "Identifiers" / f"chemical identifiers pubchem {size}.tsv").open(encoding="utf-8") as lines:
            for line in lines:
                _, cas, formula, weight, structure, *_ = line.split("\t")
                structures[cas] = formula, structure, weight
    found: dict[str, dict[str, float]] = {}
    for name, (file, most) in PROPERTIES.items():
        with (folder / file).open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines, delimiter="\t"):
                if row[name] and row["CAS"] in structures and 0 < float(row[name]) <= most:
                    found.setdefault(row["CAS"], {})[name] = log(float(row[name]))
    distinct: dict[tuple[float, ...], str] = {}
    for cas in found:
        distinct.setdefault(tuple(features(*structures[cas])), cas)
    elements = [set(re.findall(r"[A-Z][a-z]?", structures[cas][0])) for cas in distinct.values()]
    x = torch.tensor(list(distinct)).log1p()
    properties = {name: torch.tensor([found[cas].get(name, nan) for cas in distinct.values()]) for name in PROPERTIES}
    return elements, (x - x.mean(0)) / x.std(0), properties


@dataclass(frozen=True, kw_only=True)
class Properties(Task):
    """log `property` of `family` from `samples` compounds; the base has learned `base_property` of `base_family`."""

    property: str
    family: str = "organic compounds"
    samples: int = 64
    base_property: str = "Tb"
    base_family: str = "organic compounds"
    batch: int = 256
    kan: str = "chebyshev"
    width: int = 16
    basis: int = 6
    base_steps: int = 1000
    base_lr: float = 1e-3

    metric = "error / standard deviation"
    only_target = ("family", "property", "samples")
    requires = {"chemicals": "pip install --no-deps chemicals"}

    def __post_init__(self) -> None:
        for name, allowed in {"family": FAMILIES, "property": PROPERTIES}.items():
            for key in (name, f"base_{name}"):
                if getattr(self, key) not in allowed:
                    raise ValueError(
                        f"`{key}` should be one of {list(allowed)} but the value passed is {getattr(self, key)!r}"
                    )

    def build(self, seed: int) -> nn.Module:
        inputs = len(features("", "", "0"))
        return build_kan(self.kan, (inputs, self.width, self.width, 1), self.basis, seed)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        return coefficients_of(model, self.kan)

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        if part == "base":
            family, name = self.base_family, self.base_property
        else:
            family, name = self.family, self.property
        elements, x, properties = compounds()
        y = properties[name]

        def members(family: str) -> Tensor:
            chosen = torch.tensor([FAMILIES[family](e) for e in elements])
            return torch.nonzero(chosen & ~y.isnan())[:, 0]

        # The scale of a property is that of the base's family, which the target's few compounds do not change.
        scale = y[members(self.base_family)]
        y = (y - scale.mean()) / scale.std()
        rows = members(family)
        rows = rows[torch.randperm(len(rows), generator=generator(seed, -1))]
        samples = len(rows) - len(rows) // 5 if part == "base" else self.samples
        rows = rows[: samples + TEST_SAMPLES]
        data = Data(x[rows].to(device), y[rows, None].to(device))
        training, test = (Data(*(part[k] for part in data)) for k in (slice(samples), slice(samples, None)))
        deviation = test.y.std()
        return Regression(
            training, test, self.batch, seed, lambda outputs, y: (outputs - y).square().mean().sqrt() / deviation
        )


TASK = Properties
