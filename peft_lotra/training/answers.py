"""One kind of residuals: its part of the batch, and what `residual_fn` returns for it, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .losses import ConvexLoss, LeastSquares, OutputLoss, described

Function = Callable[[Callable[..., Any], Any], Any]
Loss = str | OutputLoss
Net = Callable[..., Any]
# The outputs in fp64 (residuals, for least squares), the targets, and the weights of the samples
Answer = tuple[torch.Tensor, Any, torch.Tensor]


class Kind(NamedTuple):
    """A kind of residuals, or of outputs under a loss. `batch` has `size` rows."""

    name: str
    function: Function
    loss: ConvexLoss
    batch: Any
    size: int

    @property
    def noun(self) -> str:
        return "residuals" if isinstance(self.loss, LeastSquares) else "outputs"

    def chunks(self, rows: int) -> Iterator[Any]:
        """Parts of the batch of up to `rows` rows."""
        leaves, spec = tree_flatten(self.batch)
        return (spec.unflatten(chunk) for chunk in zip(*(leaf.split(rows) for leaf in leaves), strict=True))

    def first(self, rows: int) -> Any:
        """The first rows of the batch."""
        return tree_map(lambda leaf: leaf[:rows], self.batch)

    def outputs(self, net: Net, part: Any) -> torch.Tensor:
        """The outputs for a part of the batch, as `residual_fn` returns them."""
        given = self.function(net, part)
        return given if isinstance(self.loss, LeastSquares) else given[0]

    def factors(self, net: Net, part: Any) -> torch.Tensor | None:
        """√w F of each sample, shape (N, ..., k, m). None for least squares, whose F = I takes no pass."""
        if isinstance(self.loss, LeastSquares):
            return None
        outputs, targets, weights = self.answer(net, part)
        return weighted(weights.sqrt(), self.loss.factor(outputs, targets))

    def answer(self, net: Net, part: Any) -> Answer:
        """What `residual_fn` returns for a part of the batch, or ValueError or TypeError if that cannot be used."""
        given, rows = self.function(net, part), len(tree_leaves(part)[0])
        should = f"`residual_fn{at(self.name)}` should give"
        if isinstance(self.loss, LeastSquares):
            given = (given, None)
        elif not isinstance(given, tuple) or len(given) not in (2, 3):
            raise TypeError(
                f"{should} a pair, (outputs, targets), or (outputs, targets, weights), for a `loss` other than "
                f"'least_squares', but it gave {described(given)}"
            )
        outputs, targets, *weights = given
        if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
            got = f"one of {outputs.dtype}" if isinstance(outputs, torch.Tensor) else described(outputs)
            raise TypeError(
                f"{should} a tensor of real floating-point numbers as {self.noun}, made by torch from what `net` "
                f"returns, but it gave {got}"
            )
        if not outputs.ndim or len(outputs) != rows or not outputs.numel():
            raise ValueError(
                f"{should} {self.noun} of {rows} samples, shape ({rows}, ...), not their mean or sum, but they are "
                f"{described(outputs)}"
            )
        if wrong := self.loss.check(outputs, targets):
            raise ValueError(f"{should} {wrong}")
        weight = weights[0] if weights else outputs.new_ones(rows)
        if not isinstance(weight, torch.Tensor) or weight.shape != (rows,):
            raise ValueError(f"{should} weights of shape ({rows},), one for each sample, not {described(weight)}")
        if weights and not (weight.isfinite() & (weight >= 0)).all():
            raise ValueError(f"{should} weights of at least 0, but they go from {weight.min()} to {weight.max()}")
        return outputs.double(), targets, weight.double()


def is_batches(data: Any) -> bool:
    """Whether the data are an iterable of batches, such as a DataLoader, and not a batch or a function.

    Raises:
        TypeError: for an iterator, which can be read only once.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"`data` is a {type(data).__name__}, which can be read only once: give what can be read again, such as a "
            "DataLoader, or a function of the iteration"
        )
    batch = isinstance(data, torch.Tensor | tuple | list | Mapping | str) or hasattr(data, "__array__")
    return isinstance(data, Iterable) and not batch and not callable(data)


def first_of(data: Any) -> Any:
    """The batch, or the first of several."""
    return next(iter(data)) if is_batches(data) else data


def weighted(weights: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with a row for each sample, times the weights of the samples."""
    return torch.einsum("n,n...->n...", weights, tensor)


def at(name: str) -> str:
    return f"[{name!r}]" if name else ""
