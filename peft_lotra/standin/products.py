"""Products with the coefficients: by a number, and elementwise with a basis, which a layer then sums.

(x * weight).sum(dims) is a contraction. The layer's own product with A forms batch × (size of A) entries. The update's
part is an einsum of x with the thin tensor, and forms no such tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from string import ascii_letters
from typing import Any, NamedTuple

import torch

from .axes import planned
from .operations import Contraction, Form, Weight, functions

PRODUCTS = functions("mul multiply __mul__ __rmul__")
QUOTIENTS = functions("div true_divide __truediv__")
SUMS = functions("sum")


class Product(NamedTuple):
    """x · weight, elementwise."""

    tensor: torch.Tensor  # x · A
    weight: Weight
    x: torch.Tensor

    @classmethod
    def of(cls, weight: Weight, x: torch.Tensor) -> Product:
        if weight.is_zero:
            return cls(weight.tensor.new_zeros(()).expand(torch.broadcast_shapes(x.shape, weight.shape)), weight, x)
        return cls(x * weight.tensor, weight, x)

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
    tensor = weight.tensor if weight.is_zero else function(weight.tensor, number)
    return weight._replace(tensor=tensor, updates=tuple(updates))


def summed(product: Product, dim: Any = None, keepdim: bool = False, **others: Any) -> Contraction | None:
    """(x · weight).sum(dim, keepdim) as a contraction; None if there are other arguments, or no `dim`."""
    if dim is None or others:
        return None
    x, ndim = product.x, product.tensor.dim()
    dims = tuple(sorted([d % ndim for d in ((dim,) if isinstance(dim, int) else dim)]))
    form, equation, of_x, thin = _sum_form(tuple(x.shape), tuple(product.weight.shape), ndim, dims, keepdim)

    def apply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, w.dtype)  # as in the product
        x, w = x.to(dtype), w.to(dtype)
        y = torch.einsum(equation, x.reshape([x.shape[k] for k in of_x]), w.reshape([w.shape[k] for k in thin]))
        for d in dims if keepdim else ():
            y = y.unsqueeze(d)
        return y

    return Contraction(form, apply, x)


@planned
def _sum_form(
    of: tuple[int, ...], shape: tuple[int, ...], ndim: int, dims: tuple[int, ...], keepdim: bool
) -> tuple[Form, str, tuple[int, ...], tuple[int, ...]]:
    """The form, the einsum's equation, and the axes of x and of the thin tensor that are in it.

    Args:
        of, shape: the shapes of x and of the weight.
        ndim: the number of axes of the product.
        dims, keepdim: the axes that are summed, and whether they stay, with size 1.
    """
    x, weight = (dict(zip(range(ndim - len(sizes), ndim), sizes, strict=True)) for sizes in (of, shape))
    of_x = [k for k, size in x.items() if size != 1]
    thin = [k for k, size in weight.items() if size != 1 or k not in of_x]
    out = [k for k in range(ndim) if k not in dims]
    place = {k: k if keepdim else out.index(k) for k in out}
    form = Form(
        carried=tuple([(k + len(shape) - ndim, place[k]) for k in out if k in thin and k not in of_x]),
        summed=tuple([(k + len(shape) - ndim, k + len(of) - ndim) for k in dims if k in thin and k in of_x]),
        terms=math.prod([weight[k] for k in dims if k in thin]),
        depth=math.prod([x[k] for k in of_x if k in dims]),
    )
    letters = ["".join([ascii_letters[k] for k in axes]) for axes in (of_x, thin, out)]
    return form, "{},{}->{}".format(*letters), *[tuple([k - ndim for k in axes]) for axes in (of_x, thin)]  # type: ignore[return-value]
