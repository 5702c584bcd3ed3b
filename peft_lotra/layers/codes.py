"""Where a model keeps the codes of a family's tasks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .lotra import LoTRALayer


def container_of_codes(layers: Iterable[LoTRALayer], adapter: str) -> nn.ParameterDict:
    """The container that has the codes of an adapter, shape (tasks, k): that of one layer, for all of them."""
    return next(layer.lotra_codes for layer in layers if adapter in layer.lotra_codes)
