"""Products with the coefficients: by a number, and elementwise with a basis, which a layer then sums.

(x * weight).sum(dims) is a contraction written out. The layer's own product with A has batch × A entries; the update's
part is an einsum of x with the thin tensor and has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from string import ascii_letters
from typing import Any

import torch

from .contractions import Contraction
from .placeholder import PRODUCTS, StandIn, factorised, is_zero_expanded
from .updates import SampleAxisUnknown

_QUOTIENTS = (torch.div, torch.true_divide, torch.Tensor.div, torch.Tensor.true_divide, torch.Tensor.__truediv__)


class Product(StandIn):
    """x · weight, elementwise."""

    def __init__(self, weight: StandIn, x: torch.Tensor) -> None:
        if is_zero_expanded(weight.tensor):
            product = weight.tensor.new_zeros(()).expand(torch.broadcast_shapes(x.shape, weight.shape))
        else:
            product = x * weight.tensor
        # With a batch, the layer itself forms batch × A, and the dense form is nothing to warn of. Without, this is a
        # scale or mask that nobody declared; its product with Δ has no low rank.
        owner = weight.owner if product.numel() == weight.tensor.numel() else None
        super().__init__(product, weight.axes, weight.updates, owner)
        self._weight = weight
        self.x = x

    @property
    def weight(self) -> StandIn:
        return self._weight

    def dense(self) -> torch.Tensor:
        return self.x * self._weight.dense()


def _times(function: Callable[..., Any], standin: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    other = args[1] if args[0] is standin else args[0]
    if _is_number(other):
        return _by_number(function, standin, other)
    if any(update.samples is not None for update in standin.updates):
        raise SampleAxisUnknown  # before the product is formed
    return Product(standin, other) if isinstance(other, torch.Tensor) else NotImplemented


def _over(function: Callable[..., Any], standin: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs or args[0] is not standin or not _is_number(args[1]):
        return NotImplemented
    return _by_number(function, standin, args[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _by_number(function: Callable[..., Any], standin: StandIn, number: Any) -> StandIn:
    """function(A, number) + Σ function(s · G, number) ×₁ U1 ×₂ U2 ×₃ U3 for a function that is linear in A."""
    updates = [u._replace(factors=u.factors._replace(core=function(u.factors.core, number))) for u in standin.updates]
    tensor = standin.tensor if is_zero_expanded(standin.tensor) else function(standin.tensor, number)
    return type(standin)(tensor, standin.axes, updates, standin.owner)


def _sum(function: Callable[..., Any], product: Product, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    description = _sum_contraction(*args, **kwargs)
    return NotImplemented if description is None else factorised(description, function, product, args, kwargs)


def _sum_contraction(
    product: Product, dim: int | tuple[int, ...] | None = None, keepdim: bool = False, **others: Any
) -> Contraction | None:
    x, weight, ndim = product.x, product.weight, product.tensor.dim()
    if dim is None or others:
        return None
    dims = sorted(d % ndim for d in ((dim,) if isinstance(dim, int) else dim))
    letters = ascii_letters[:ndim]
    lacking = ndim - weight.ndim  # axes that only x has
    of_x = [k for k in range(ndim) if k >= ndim - x.dim() and x.shape[k - ndim] != 1]
    of_weight = [k for k in range(ndim) if k >= lacking]
    out = [k for k in range(ndim) if k not in dims]
    place = {k: k if keepdim else out.index(k) for k in out}
    thin = [k for k in of_weight if weight.shape[k - lacking] != 1 or k not in of_x]
    equation = "".join(letters[k] for k in of_x), "".join(letters[k] for k in thin), "".join(letters[k] for k in out)

    def apply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, w.dtype)  # as in the product
        x, w = x.to(dtype), w.to(dtype)
        x = x.reshape([x.shape[k - ndim] for k in of_x])
        w = w.reshape([w.shape[k - lacking] for k in thin])
        y = torch.einsum("{},{}->{}".format(*equation), x, w)
        for d in dims if keepdim else ():
            y = y.unsqueeze(d)
        return y

    return Contraction(
        apply,
        x,
        carried={k - lacking: place[k] for k in out if k in thin and k not in of_x},
        summed={k - lacking: (k - ndim) % x.dim() for k in dims if k in thin and k in of_x},
        terms=math.prod([weight.shape[k - lacking] for k in dims if k in thin]),
        positions=math.prod([x.shape[k - ndim] for k in of_x if k not in dims]),
    )


StandIn.handlers |= dict.fromkeys(PRODUCTS, _times) | dict.fromkeys(_QUOTIENTS, _over)
Product.handlers = {torch.sum: _sum, torch.Tensor.sum: _sum}
