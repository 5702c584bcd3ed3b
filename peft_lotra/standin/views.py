"""Views and copies of the coefficients, which compute nothing: they act on A and on the names of its axes.

Each function takes torch's function, the weight and the remaining arguments. It returns weights, tensors, or
NotImplemented if the names cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from ..tucker.decomposition import Tucker
from .axes import BESIDE, Atom, Axes, Axis, indexed, planned, reshaped
from .operations import Weight, functions


def _view(weight: Weight, tensor: torch.Tensor, axes: Axes | None) -> Any:
    if axes == BESIDE:
        return tensor  # no coefficient in it
    return NotImplemented if axes is None else weight._replace(tensor=tensor, axes=axes)


def _reshape(function: Callable[..., Any], weight: Weight, *args: Any, **kwargs: Any) -> Any:
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, torch.dtype):
            return NotImplemented  # `view(dtype)` reinterprets the bits
    tensor = function(weight.tensor, *args, **kwargs)
    return _view(weight, tensor, reshaped(weight.axes, tuple(tensor.shape)))


def _permute(function: Callable[..., Any], weight: Weight, *args: Any, **kwargs: Any) -> Any:
    tensor = function(weight.tensor, *args, **kwargs)
    args = tuple([tuple(arg) if isinstance(arg, list) else arg for arg in args])
    named = tuple([(key, tuple(arg) if isinstance(arg, list) else arg) for key, arg in kwargs.items()])
    return _view(weight, tensor, _permuted(weight.axes, function, args, named))


@planned
def _permuted(
    axes: Axes, function: Callable[..., Any], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> Axes:
    # torch itself gives the order: the axes of the probe have the sizes 1, 2, 3, ...
    probe = torch.empty(tuple(range(1, len(axes.axes) + 1)), device="meta")
    return axes.permuted([size - 1 for size in function(probe, *args, **dict(kwargs)).shape])


def _expand(function: Callable[..., Any], weight: Weight, *args: Any, **kwargs: Any) -> Any:
    tensor = function(weight.tensor, *args, **kwargs)
    return _view(weight, tensor, weight.axes.expanded(tensor.shape))


def _same(function: Callable[..., Any], weight: Weight, *args: Any, **kwargs: Any) -> Any:
    """Copies, and conversions of dtype and device."""
    tensor = function(weight.tensor, *args, **kwargs)
    if not isinstance(tensor, torch.Tensor):
        return tensor  # `type()` returns a name
    if not tensor.is_floating_point():
        return NotImplemented
    return weight._replace(tensor=tensor)


def _detach(function: Callable[..., Any], weight: Weight) -> Weight:
    updates = [u._replace(tucker=u.tucker.map(torch.Tensor.detach)) for u in weight.updates]
    return weight._replace(tensor=weight.tensor.detach(), updates=tuple(updates))


def _getitem(function: Callable[..., Any] | None, weight: Weight, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    chosen = [k for k, part in enumerate(index) if isinstance(part, torch.Tensor)]
    if len(chosen) == 1 and all(part == slice(None) for k, part in enumerate(index) if k not in chosen):
        return _index_select(None, weight, chosen[0], index[chosen[0]])
    if not all(part is None or part is Ellipsis or type(part) is int or isinstance(part, slice) for part in index):
        return NotImplemented
    # Before Python 3.12, slices cannot be hashed.
    parts = tuple([(part.start, part.stop, part.step) if isinstance(part, slice) else part for part in index])
    return _view(weight, weight.tensor[index], indexed(weight.axes, parts))


def _index_select(function: Callable[..., Any] | None, weight: Weight, dim: int, index: torch.Tensor) -> Any:
    """Rows in any order, where the axis is one mode: the same rows of the factor, or of the core."""
    dim %= weight.ndim
    axes, (atom, *others) = weight.axes.axes, weight.axes.axes[dim].atoms or (None,)
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or atom is None or others:
        return NotImplemented
    mode, starts = atom.mode, dict(weight.axes.starts)
    if axes[dim].is_padded or mode not in "iod" or not mode or (starts[mode], atom.stride) != (0, 1):
        return NotImplemented
    if sum([a.mode == mode for axis in axes for a in axis.atoms]) > 1:
        return NotImplemented
    updates = []
    for update in weight.updates:
        core, factors = update.tucker.core, dict(update.tucker.factors)
        tensor, axis = (factors[mode], -2) if mode in factors else (core, "iod".index(mode))
        axis += update.rows is not None and axis >= 0  # a stack has one more axis, the first
        if tensor.shape[axis] != atom.size:
            return NotImplemented  # the view shows a part of the mode
        if mode in factors:
            factors[mode] = tensor.index_select(axis, index)
        else:
            core = tensor.index_select(axis, index)
        updates.append(update._replace(tucker=Tucker(core, factors)))
    shown = Axis((Atom(mode, len(index), 1),))
    return weight._replace(
        tensor=weight.tensor.index_select(dim, index),
        axes=weight.axes._replace(axes=(*axes[:dim], shown, *axes[dim + 1 :])),
        updates=tuple(updates),
    )


def _along(weight: Weight, dim: int, *parts: int | slice) -> Any:
    """The parts of the weight along one axis."""
    views = [_getitem(None, weight, (slice(None),) * (dim % weight.ndim) + (part,)) for part in parts]
    return NotImplemented if any(view is NotImplemented for view in views) else tuple(views)


def _select(function: Callable[..., Any], weight: Weight, dim: int, index: int) -> Any:
    return _getitem(None, weight, (slice(None),) * (dim % weight.ndim) + (int(index),))


def _narrow(function: Callable[..., Any], weight: Weight, dim: int, start: int, length: int) -> Any:
    start = int(start) % weight.shape[dim] if start else 0
    return _getitem(None, weight, (slice(None),) * (dim % weight.ndim) + (slice(start, start + length),))


def _unbind(function: Callable[..., Any], weight: Weight, dim: int = 0) -> Any:
    return _along(weight, dim, *range(weight.shape[dim]))


def _parts(function: Callable[..., Any], weight: Weight, *args: Any, **kwargs: Any) -> Any:
    """split, chunk, tensor_split: consecutive slices along one axis."""
    # The axis is the argument `dim`, or else the second argument. torch's default is the first axis.
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    stops = list(accumulate([tensor.shape[dim] for tensor in function(weight.tensor, *args, **kwargs)]))
    return _along(weight, dim, *map(slice, [0, *stops], stops))


_HANDLERS: dict[Callable[..., Any], str] = {
    _reshape: "reshape reshape_as view view_as flatten unflatten ravel squeeze unsqueeze _unsafe_view",
    _permute: "permute transpose swapaxes swapdims movedim moveaxis t adjoint T mT H mH",
    _expand: "expand expand_as broadcast_to",
    _same: "contiguous clone to type type_as float double half bfloat16 cpu cuda",
    _getitem: "__getitem__",
    _select: "select",
    _index_select: "index_select",
    _narrow: "narrow",
    _parts: "split chunk tensor_split",
    _unbind: "unbind",
    _detach: "detach data",
}
VIEWS = {function: handler for handler, names in _HANDLERS.items() for function in functions(names)}
