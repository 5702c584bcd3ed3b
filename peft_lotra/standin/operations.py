"""How torch's contractions use a weight: one small function per operation, with the operation's own signature.

Each function says which axis of the output an axis of the weight becomes, or with which axis of the other operand it
is summed. It returns None if this use of the operation has no factorised form here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .axes import Axes, planned
from .update import Update

Pairs = tuple[tuple[int, int], ...]


class Form(NamedTuple):
    """The properties that a plan needs of an operation y = f(x, weight), which is linear in both."""

    carried: Pairs  # axis of the weight -> the axis of y that it becomes
    summed: Pairs  # axis of the weight -> the axis of x that it is summed with, of the same size
    terms: int  # products that are summed in one entry of y
    depth: int  # entries of x for each position; a position is an entry of y without its output axis
    is_linear: bool = False  # y has the axes of x that are not summed, in order, and one output axis among them


class Contraction(NamedTuple):
    """y = apply(x, weight) + offset."""

    form: Form
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    x: torch.Tensor
    offset: torch.Tensor | None = None


class Weight(NamedTuple):
    """A + Σ updates, or a view of it.

    Attributes:
        tensor: A, or a view of it.
        axes: the names of its axes.
        updates: the active updates, of the whole parameter.
        is_zero: whether A is zero, so that it need not be contracted.
    """

    tensor: torch.Tensor
    axes: Axes
    updates: tuple[Update, ...]
    is_zero: bool = False

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


def linear(input: Any, weight: Any, bias: torch.Tensor | None = None) -> Contraction | None:
    if weight.ndim != 2:
        return None
    form = _matrix_form(0, 1, -1, input.ndim - 1, weight.shape[1], True)
    return Contraction(form, F.linear, input, bias)


def matmul(*args: Any, **kwargs: Any) -> Contraction | None:
    """Also for mm, bmm and mv, whose operands have other names. Either operand may be the weight; x is the other."""
    named = [kwargs[name] for name in ("input", "self", "other", "mat2", "vec", "tensor2") if name in kwargs]
    if len(args) + len(named) != 2 or len(named) != len(kwargs):
        return None
    a, b = (*args, *named)
    if isinstance(a, Weight):
        if a.ndim < 2:
            return None
        axis = -2 if b.ndim > 1 else -1
        form = _matrix_form(a.ndim - 2, a.ndim - 1, axis, max(b.ndim - 2, 0), a.shape[-1], False)
        return Contraction(form, lambda x, w: torch.matmul(w, x), b)
    if b.ndim < 2:
        return None
    form = _matrix_form(b.ndim - 1, b.ndim - 2, -1, a.ndim - 1, b.shape[-2], b.ndim == 2)
    return Contraction(form, torch.matmul, a)


def _reflected_matmul(weight: Any, x: Any) -> Contraction | None:
    return matmul(x, weight)


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Contraction | None:
    if not isinstance(mat2, Weight) or (beta, alpha) != (1, 1):
        return None
    form = _matrix_form(1, 0, -1, 1, mat2.shape[0], True)
    return Contraction(form, torch.matmul, mat1, input)


@planned
def _matrix_form(carried: int, summed: int, axis_of_y: int, axis_of_x: int, terms: int, is_linear: bool) -> Form:
    return Form(((carried, axis_of_y),), ((summed, axis_of_x),), terms, terms, is_linear)


def tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Contraction | None:
    if out is not None or isinstance(dims, torch.Tensor):
        return None
    dims = (list(range(a.ndim - dims, a.ndim)), list(range(dims))) if isinstance(dims, int) else dims
    pairs = [(i % a.ndim, j % b.ndim) for i, j in zip(*map(_as_list, dims), strict=True)]
    free_a = [k for k in range(a.ndim) if k not in [i for i, _ in pairs]]
    free_b = [k for k in range(b.ndim) if k not in [j for _, j in pairs]]
    terms = math.prod([a.shape[i] for i, _ in pairs])
    if isinstance(a, Weight):
        carried = tuple([(k, place) for place, k in enumerate(free_a)])
        return Contraction(Form(carried, tuple(pairs), terms, terms), lambda x, w: torch.tensordot(w, x, dims), b)
    carried = tuple([(k, len(free_a) + place) for place, k in enumerate(free_b)])
    form = Form(carried, tuple([(j, i) for i, j in pairs]), terms, terms)
    return Contraction(form, lambda x, w: torch.tensordot(x, w, dims), a)


def einsum(equation: Any, *operands: Any) -> Contraction | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    where = 0 if isinstance(operands[0], Weight) else 1
    weight, x = operands[where], operands[1 - where]
    shape = weight.tensor.shape
    form = _einsum_form(equation, where, x.ndim, shape)
    if form is None:
        return None
    for k, axis in form.summed:
        if shape[k] != x.shape[axis]:  # an axis of size 1 would be repeated
            return None
    if where:
        return Contraction(form, lambda x, w: torch.einsum(equation, x, w), x)
    return Contraction(form, lambda x, w: torch.einsum(equation, w, x), x)


@planned
def _einsum_form(equation: str, where: int, ndim: int, shape: tuple[int, ...]) -> Form | None:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if len(subscripts) != 2:
        return None
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    ours, theirs = subscripts[where], subscripts[1 - where]
    if "..." in ours or len(set(ours)) < len(ours):
        return None
    carried = [(k, _axis(c, output)) for k, c in enumerate(ours) if c in output and c not in theirs]
    summed = [(k, _axis(c, theirs) % ndim) for k, c in enumerate(ours) if theirs.count(c) == 1 and c not in output]
    is_linear = len(carried) == 1 and [c for c in output if c not in ours] == [c for c in theirs if c not in ours]
    is_linear = is_linear and len(carried) + len(summed) == len(ours)
    terms = math.prod([shape[k] for k, _ in summed])
    return Form(tuple(carried), tuple(summed), terms, terms, is_linear)


def _axis(letter: str, subscripts: str) -> int:
    """The place of a letter, counted from the end if it comes after an ellipsis."""
    before, _, after = subscripts.partition("...")
    return after.index(letter) - len(after) if letter in after else before.index(letter)


def conv(
    input: Any, weight: Any, bias: torch.Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Contraction | None:  # fmt: skip
    kernel = weight.ndim - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[kernel - 1]
    channels = -kernel - 1
    if groups > 1:
        # In the layout "(g o) ..." all groups share one U2. In any other, the thin form could not keep the groups.
        place = weight.axes.place("o")
        if place is None or (place.axis, place.before) != (0, groups):
            return None
    summed = ((1, channels % input.ndim),) if groups == 1 else ()
    form = Form(((0, channels),), summed, math.prod(weight.shape[1:]), weight.shape[1] * groups)
    return Contraction(
        form,
        lambda x, w: function(x, w, None, stride, padding, dilation, groups),
        input,
        None if bias is None else bias.reshape(-1, *(1,) * kernel),
    )


_LOOKUP = Form(((1, -1),), (), 1, 1)


def embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Contraction | None:  # fmt: skip
    # `padding_idx` and `scale_grad_by_freq` change the gradient but not the value, and `max_norm` is not linear.
    if (padding_idx is not None and padding_idx >= 0) or max_norm is not None or scale_grad_by_freq:
        return None
    return Contraction(_LOOKUP, F.embedding, input)


def embedding_bag(
    input: Any, weight: Any, offsets: Any = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Any = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Contraction | None:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq or mode == "max":
        return None
    kwargs = {"mode": mode, "per_sample_weights": per_sample_weights}
    kwargs |= {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
    return Contraction(_LOOKUP, lambda x, w: F.embedding_bag(x, w, offsets, **kwargs), input)


def _as_list(dims: Any) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


CONTRACTIONS: dict[Any, Callable[..., Contraction | None]] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.einsum: einsum,
    torch.tensordot: tensordot,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), conv),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), conv),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), matmul),
    torch.Tensor.__matmul__: matmul,
    torch.Tensor.__rmatmul__: _reflected_matmul,
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.mv), matmul),
}
