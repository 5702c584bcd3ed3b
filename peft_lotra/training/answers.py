"""Checks what `residual_fn` returns for a batch of one kind of residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten

from .losses import ConvexLoss, OutputLoss, described

Function = Callable[[Callable[..., Any], Any], Any]
Loss = str | OutputLoss


class Kind(NamedTuple):
    """A kind of residuals. `batch` has `size` rows, and `loss` is None for least squares."""

    name: str
    function: Function
    loss: ConvexLoss | None
    batch: Any
    size: int

    def chunks(self, rows: int) -> Iterator[tuple[Any, int]]:
        """Parts of the batch of up to `rows` rows, each with its number of rows."""
        leaves, spec = tree_flatten(self.batch)
        for chunk in zip(*(leaf.split(rows) for leaf in leaves), strict=True):
            yield spec.unflatten(chunk), len(chunk[0])


class Answer(NamedTuple):
    """What `residual_fn` returns if there is a loss: outputs in fp64, targets, and the weights of the samples."""

    outputs: torch.Tensor
    targets: Any
    weights: torch.Tensor

    def over_samples(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weights in a shape that broadcasts to a tensor with a row for each sample."""
        return self.weights.view(-1, *[1] * (tensor.ndim - 1))


def first_of(kind: Kind, answer: Any) -> torch.Tensor:
    """The residuals, or the outputs if there is a loss."""
    return answer if kind.loss is None else answer[0]


def residuals_of(kind: Kind, values: Any, rows: int) -> torch.Tensor:
    _check_real(f"`residual_fn{at(kind.name)}` should give", values)
    if values.ndim not in (1, 2) or len(values) != rows or not values.numel():
        raise ValueError(
            f"`residual_fn{at(kind.name)}` should give the residuals of every sample, shape ({rows},) or ({rows}, k) "
            f"for a batch of {rows}, not their mean or sum, but it gave {tuple(values.shape)}"
        )
    return values


def answer_of(kind: Kind, given: Any, rows: int, loss: ConvexLoss) -> Answer:
    should = f"`residual_fn{at(kind.name)}` should give"
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise TypeError(
            f"{should} a pair, (outputs, targets), or (outputs, targets, weights), for a `loss` other than "
            f"'least_squares', but it gave {described(given)}"
        )
    outputs, targets, *weights = given
    _check_real(f"{should}, first in the pair,", outputs)
    if not outputs.ndim or len(outputs) != rows or not outputs.numel():
        raise ValueError(f"{should} outputs of {rows} samples, shape ({rows}, ...), but they are {described(outputs)}")
    if wrong := loss.check(outputs, targets):
        raise ValueError(f"{should} {wrong}")
    weight = weights[0] if weights else outputs.new_ones(rows)
    if not isinstance(weight, torch.Tensor) or weight.shape != (rows,):
        raise ValueError(f"{should} weights of shape ({rows},), one for each sample, but they are {described(weight)}")
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f"{should} weights of at least 0, but they go from {weight.min()} to {weight.max()}")
    return Answer(outputs.double(), targets, weight.double())


def _check_real(should: str, values: Any) -> None:
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        got = f"one of {values.dtype}" if isinstance(values, torch.Tensor) else f"a {type(values).__qualname__}"
        raise TypeError(
            f"{should} a tensor of real floating-point numbers, made by torch from what `net` returns, but it gave "
            f"{got}"
        )


def at(name: str) -> str:
    return f"[{name!r}]" if name else ""
