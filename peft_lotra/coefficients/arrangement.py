"""Lays out a tensor by the names of its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


class Arrangement(NamedTuple):
    """How named atoms, in one order, become the axes of a tensor, each of some atoms: torch's calls in turn.

    einops does the same, but torch.compile guards on its table of known types: a type that einops meets later,
    anywhere in the program, would compile the model again. So what runs in a forward pass is planned here.
    """

    split: tuple[int, ...]  # reshape the tensor into its atoms
    order: tuple[int, ...]  # permute the atoms; (): they are in order
    spread: tuple[tuple[int, ...], tuple[int, ...]] | None  # reshape and expand for atoms that the tensor lacks
    shape: tuple[int, ...]  # reshape the atoms into axes
    padding: tuple[int, ...] = ()  # as for torch.nn.functional.pad
    flat: int | None = None  # flatten from this axis on

    @classmethod
    def of(
        cls,
        given: Sequence[str],
        wanted: Sequence[Sequence[str]],
        sizes: Mapping[str, int],
        padding: tuple[int, ...] = (),
        flat: int | None = None,
    ) -> Arrangement:
        """From the names of the atoms that a tensor has, those of each axis of the result, and their sizes."""
        names = [name for group in wanted for name in group]
        order = [list(given).index(name) for name in names if name in given]
        full = tuple([sizes[name] for name in names])
        thin = tuple([sizes[name] if name in given else 1 for name in names])
        return cls(
            tuple([sizes[name] for name in given]),
            () if order == sorted(order) else tuple(order),
            None if thin == full else (thin, full),
            tuple([math.prod([sizes[name] for name in group]) for group in wanted]),
            padding,
            flat,
        )

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != self.split:
            tensor = tensor.reshape(self.split)
        if self.order:
            tensor = tensor.permute(self.order)
        if self.spread is not None:
            tensor = tensor.reshape(self.spread[0]).expand(self.spread[1])
        if tensor.shape != self.shape:
            tensor = tensor.reshape(self.shape)
        if self.padding:
            tensor = torch.nn.functional.pad(tensor, self.padding)
        return tensor if self.flat is None else tensor.flatten(self.flat)
