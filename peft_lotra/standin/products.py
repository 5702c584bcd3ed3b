"""Products with the coefficients: by a number, and elementwise with a basis, which a layer then sums.

(x * weight).sum(dims) is a contraction. The layer's own product with A forms batch × (size of A) entries. The update's
part is an einsum of x with the thin tensor, and forms no such tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from string import ascii_letters
from typing import Any, NamedTuple

import torch

from .axes import planned, reshaped
from .operations import Contraction, Weight, contraction, functions

PRODUCTS = functions("mul multiply __mul__ __rmul__")
QUOTIENTS = functions("div true_divide __truediv__")
SUMS = functions("sum")


class Product(NamedTuple):
    """x · weight, elementwise."""

    tensor: torch.Tensor  # x · A
    weight: Weight
    x: torch.Tensor

    @property
    def has_batch(self) -> bool:
        """Whether the layer itself forms batch × (size of A) entries. The dense form then needs no warning.

        Otherwise x is a scale or mask that is not declared. Its product with Δ has no low rank.
        """
        return self.tensor.numel() != self.weight.tensor.numel()


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def by_number(function: Callable[..., Any], weight: Weight, number: Any) -> Weight:
    """function(A, number) + Σ function(s · G, number) ×₁ U1 ×₂ U2 ×₃ U3 for a function that is linear in A."""
    updates = [u._replace(tucker=u.tucker._replace(core=function(u.tucker.core, number))) for u in weight.updates]
    return weight._replace(tensor=function(weight.tensor, number), updates=tuple(updates))


def summed(product: Product, dims: tuple[int, ...]) -> tuple[Weight, Contraction | None]:
    """(x · weight).sum(dims) as an einsum of x and a view of the weight, both without the axes that are repeated."""
    weight, dtype = product.weight, product.tensor.dtype
    equation, of_x, of_weight = _sum(tuple(product.x.shape), tuple(weight.shape), product.tensor.dim(), dims)
    shape = tuple([weight.shape[k] for k in of_weight])
    axes = reshaped(weight.axes, shape)
    if axes is None:
        return weight, None
    x = product.x.to(dtype).reshape([product.x.shape[k] for k in of_x])
    weight = weight._replace(tensor=weight.tensor.to(dtype).reshape(shape), axes=axes)
    return weight, contraction(equation, (x, weight), partial(torch.einsum, equation))


@planned
def _sum(
    x: tuple[int, ...], weight: tuple[int, ...], ndim: int, dims: tuple[int, ...]
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The einsum's equation, and the axes of x and of the weight that are in it, from their shapes and axes to sum."""
    of_x = tuple([k for k in range(-len(x), 0) if x[k] != 1])
    of_weight = tuple([k for k in range(-len(weight), 0) if weight[k] != 1 or k not in of_x])
    out = [k - ndim for k in range(ndim) if k not in dims]
    letters = ["".join([ascii_letters[k + ndim] for k in axes]) for axes in (of_x, of_weight, out)]
    return "{},{}->{}".format(*letters), of_x, of_weight
