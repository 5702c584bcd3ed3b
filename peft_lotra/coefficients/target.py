"""A coefficient tensor of a model, with what an adapter needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..tucker.decomposition import Ranks
from .spec import CoefficientSpec


@dataclass(frozen=True)
class Target:
    """One coefficient tensor to adapt."""

    module: str  # name of the KAN layer
    spec: CoefficientSpec
    ranks: Ranks = (1, 1, 1)
    alpha: float = 1.0
    copy_of: tuple[str, str] | None = None  # the layer's class, and the registered class that it is taken to copy

    @property
    def parameter(self) -> str:
        """Full name of the coefficient parameter in the base model."""
        return f"{self.module}.{self.spec.parameter}"
