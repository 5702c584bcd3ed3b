"""How torch's contractions use a weight: one small function per operation, in the operation's own signature.

Each says which axis of the output an axis of the weight becomes, and which axis of the other operand it is summed
with. None means that this use of the operation has no factorised form here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Contraction(NamedTuple):
    """y = apply(x, weight) + offset, linear in both."""

    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    x: torch.Tensor
    carried: dict[int, int]  # axis of the weight -> the axis of y that it becomes
    summed: dict[int, int]  # axis of the weight -> the axis of x that it is summed with, of the same size
    terms: int  # products that are summed in one entry of y
    positions: int  # about how many entries y has for each entry of its output axis
    offset: torch.Tensor | None = None
    is_linear: bool = False  # y has the axes of x that are not summed, in order, and one output axis among them


def linear(input: Any, weight: Any, bias: torch.Tensor | None = None) -> Contraction | None:
    if weight.ndim != 2:
        return None
    return _contraction(F.linear, input, weight, {0: -1}, {1: input.ndim - 1}, offset=bias, is_linear=True)


def matmul(*args: Any, **kwargs: Any) -> Contraction | None:
    """Also mm, bmm and mv, whose operands have other names. Whichever operand is the real tensor is x."""
    named = [kwargs[name] for name in ("input", "self", "other", "mat2", "vec", "tensor2") if name in kwargs]
    if len(args) + len(named) != 2 or len(named) != len(kwargs):
        return None
    a, b = (*args, *named)
    if not isinstance(a, torch.Tensor):
        if a.ndim < 2:
            return None
        carried = {a.ndim - 2: -2 if b.ndim > 1 else -1}
        return _contraction(_swapped(torch.matmul), b, a, carried, {a.ndim - 1: max(b.ndim - 2, 0)})
    if b.ndim < 2:
        return None
    return _contraction(torch.matmul, a, b, {b.ndim - 1: -1}, {b.ndim - 2: a.ndim - 1}, is_linear=b.ndim == 2)


def tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Contraction | None:
    if out is not None or isinstance(dims, torch.Tensor):
        return None
    dims = (list(range(a.ndim - dims, a.ndim)), list(range(dims))) if isinstance(dims, int) else dims
    pairs = [(i % a.ndim, j % b.ndim) for i, j in zip(*map(_as_list, dims), strict=True)]
    free_a = [k for k in range(a.ndim) if k not in [i for i, _ in pairs]]
    free_b = [k for k in range(b.ndim) if k not in [j for _, j in pairs]]
    if isinstance(a, torch.Tensor):
        carried = {k: len(free_a) + place for place, k in enumerate(free_b)}
        return _contraction(lambda x, w: torch.tensordot(x, w, dims), a, b, carried, {j: i for i, j in pairs})
    carried = {k: place for place, k in enumerate(free_a)}
    return _contraction(lambda x, w: torch.tensordot(w, x, dims), b, a, carried, dict(pairs))


def einsum(equation: Any, *operands: Any) -> Contraction | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not all(hasattr(operand, "ndim") for operand in operands):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if len(operands) != 2 or len(subscripts) != 2:
        return None
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    where = next(k for k, operand in enumerate(operands) if not isinstance(operand, torch.Tensor))
    weight, x = operands[where], operands[1 - where]
    ours, theirs = subscripts[where], subscripts[1 - where]
    if "..." in ours or len(set(ours)) < len(ours):
        return None
    carried = {k: _axis(c, output) for k, c in enumerate(ours) if c in output and c not in theirs}
    summed = {k: _axis(c, theirs) % x.ndim for k, c in enumerate(ours) if theirs.count(c) == 1 and c not in output}
    if any(weight.shape[k] != x.shape[axis] for k, axis in summed.items()):
        return None

    def apply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *((x, weight) if where else (weight, x)))

    is_linear = len(carried) == 1 and [c for c in output if c not in ours] == [c for c in theirs if c not in ours]
    is_linear = is_linear and len(carried) + len(summed) == len(ours)
    return _contraction(apply, x, weight, carried, summed, is_linear=is_linear)


def conv(
    input: Any, weight: Any, bias: torch.Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Contraction | None:  # fmt: skip
    kernel = weight.ndim - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[kernel - 1]
    channels = -kernel - 1
    if groups > 1:
        # In the layout "(g o) ..." every group has the same outputs, hence one U2; else the thin form has no groups.
        place = weight.axes.place("o")
        if place is None or (place.axis, place.before) != (0, groups):
            return None
    return _contraction(
        lambda x, w: function(x, w, None, stride, padding, dilation, groups),
        input,
        weight,
        {0: channels},
        {1: channels % input.ndim} if groups == 1 else {},
        terms=math.prod(weight.shape[1:]),
        positions=input.numel() // input.shape[channels],
        offset=None if bias is None else bias.reshape(-1, *(1,) * kernel),
    )


def embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Contraction | None:  # fmt: skip
    # With `padding_idx` or `scale_grad_by_freq` the gradient is not that of the value; `max_norm` is not linear.
    if (padding_idx is not None and padding_idx >= 0) or max_norm is not None or scale_grad_by_freq:
        return None
    return _contraction(F.embedding, input, weight, {1: -1}, {}, terms=1, positions=input.numel())


def embedding_bag(
    input: Any, weight: Any, offsets: Any = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Any = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Contraction | None:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq or mode == "max":
        return None
    kwargs = {"mode": mode, "per_sample_weights": per_sample_weights}
    kwargs |= {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
    return _contraction(
        lambda x, w: F.embedding_bag(x, w, offsets, **kwargs),
        input, weight, {1: -1}, {}, terms=1, positions=input.numel(),
    )  # fmt: skip


def _contraction(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weight: Any,
    carried: dict[int, int],
    summed: dict[int, int],
    terms: int | None = None,
    positions: int | None = None,
    offset: torch.Tensor | None = None,
    is_linear: bool = False,
) -> Contraction:
    if terms is None:
        terms = math.prod([weight.shape[k] for k in summed])
    if positions is None:
        positions = x.numel() // max(terms, 1)
    return Contraction(apply, x, carried, summed, terms, positions, offset, is_linear)


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, weight: function(weight, x)


def _as_list(dims: Any) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _axis(letter: str, subscripts: str) -> int:
    """Where a letter stands, from the end if an ellipsis comes before it."""
    before, _, after = subscripts.partition("...")
    return after.index(letter) - len(after) if letter in after else before.index(letter)


CONTRACTIONS: dict[Any, Callable[..., Contraction | None]] = {
    F.linear: linear,
    torch.einsum: einsum,
    torch.tensordot: tensordot,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), conv),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), conv),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), matmul),
    torch.Tensor.__matmul__: matmul,
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.mv), matmul),
}
