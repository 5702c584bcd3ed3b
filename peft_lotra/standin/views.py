"""Operations that show the coefficients differently and compute nothing: they act on A and on the names of its axes.

Each function takes torch's own, the stand-in and the remaining arguments, and returns stand-ins, or NotImplemented
where the names cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .axes import BESIDE, Axes


def _view(standin: Any, tensor: torch.Tensor, axes: Axes | None) -> Any:
    if axes is BESIDE:
        return tensor  # no coefficient in it
    return NotImplemented if axes is None else standin.like(tensor, axes)


def _reshape(function: Callable[..., Any], standin: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        return NotImplemented  # `view` of the bits
    tensor = function(standin.tensor, *args, **kwargs)
    return _view(standin, tensor, standin.axes.reshaped(tensor.shape))


def _permute(function: Callable[..., Any], standin: Any, *args: Any, **kwargs: Any) -> Any:
    # torch itself tells the order: the axes of the probe have the sizes 1, 2, 3, ...
    probe = torch.empty(tuple(range(1, standin.ndim + 1)), device="meta")
    order = [size - 1 for size in function(probe, *args, **kwargs).shape]
    return _view(standin, function(standin.tensor, *args, **kwargs), standin.axes.permuted(order))


def _expand(function: Callable[..., Any], standin: Any, *args: Any, **kwargs: Any) -> Any:
    tensor = function(standin.tensor, *args, **kwargs)
    return _view(standin, tensor, standin.axes.expanded(tensor.shape))


def _same(function: Callable[..., Any], standin: Any, *args: Any, **kwargs: Any) -> Any:
    """Copies, and conversions of dtype and device."""
    tensor = function(standin.tensor, *args, **kwargs)
    if not isinstance(tensor, torch.Tensor):
        return tensor  # `type()` asks
    if not tensor.is_floating_point():
        return NotImplemented
    return standin.like(tensor, standin.axes)


def _index(standin: Any, tensor: torch.Tensor, *index: Any) -> Any:
    return _view(standin, tensor, standin.axes.indexed(index))


def _getitem(function: Callable[..., Any], standin: Any, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) is int or isinstance(part, slice) for part in index):
        return NotImplemented
    return _index(standin, standin.tensor[index], *index)


def _select(function: Callable[..., Any], standin: Any, dim: int, index: int) -> Any:
    return _index(standin, standin.tensor.select(dim, index), *_along(standin, dim, int(index)))


def _narrow(function: Callable[..., Any], standin: Any, dim: int, start: int, length: int) -> Any:
    start = int(start) % standin.shape[dim] if start else 0
    return _getitem(function, standin, _along(standin, dim, slice(start, start + length)))


def _parts(function: Callable[..., Any], standin: Any, *args: Any, **kwargs: Any) -> Any:
    """split, chunk, ...: slices, one after another, along one axis."""
    tensors = function(standin.tensor, *args, **kwargs)
    # The axis is the argument `dim` or else the second one of a call; torch's default is the first axis.
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + tensor.shape[dim])
    slices = [slice(start, stop) for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    parts = [_index(standin, t, *_along(standin, dim, s)) for t, s in zip(tensors, slices, strict=True)]
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


def _unbind(function: Callable[..., Any], standin: Any, dim: int = 0) -> Any:
    parts = [_select(function, standin, dim, k) for k in range(standin.shape[dim])]
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


def _along(standin: Any, dim: int, part: int | slice) -> tuple[Any, ...]:
    return (slice(None),) * (dim % standin.ndim) + (part,)


def _table() -> dict[Any, Callable[..., Any]]:
    handlers = {
        _reshape: "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze _unsafe_view",
        _permute: "permute transpose swapaxes swapdims movedim moveaxis t adjoint",
        _expand: "expand expand_as broadcast_to",
        _same: "contiguous clone to type type_as float double half bfloat16 cpu cuda",
        _getitem: "__getitem__",
        _select: "select",
        _narrow: "narrow",
        _parts: "split chunk tensor_split",
        _unbind: "unbind",
    }
    table = {
        getattr(namespace, name): handler
        for handler, names in handlers.items()
        for name in names.split()
        for namespace in (torch, torch.Tensor)
        if callable(getattr(namespace, name, None))
    }
    for name in ("T", "mT", "H", "mH"):
        table[getattr(torch.Tensor, name).__get__] = _permute
    return table


VIEWS = _table()
