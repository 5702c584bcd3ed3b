"""How torch's contractions use a weight: one small function per operation, with the operation's own signature.

Most are an einsum, whose letters say which axis of the output an axis of the weight becomes, or with which axis of the
other operand it is summed. A function returns None if this use of the operation has no factorised form here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from string import ascii_letters
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
    kept: Pairs = ()  # axis of x -> the axis of y that it becomes, where this is known and `is_linear` is false


class Contraction(NamedTuple):
    """y = apply(x, weight), without a bias."""

    form: Form
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    x: torch.Tensor


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


def contraction(equation: str, operands: tuple[Any, ...], function: Callable[..., Any]) -> Contraction | None:
    """The contraction function(a, b), an einsum by this equation."""
    where = 0 if isinstance(operands[0], Weight) else 1
    weight, x = operands[where], operands[1 - where]
    form = einsum_form(equation, where, x.dim(), weight.tensor.shape)
    if form is None:
        return None
    for k, axis in form.summed:
        if weight.tensor.shape[k] != x.shape[axis]:  # an axis of size 1 would be repeated
            return None
    return Contraction(form, function if where else lambda x, w: function(w, x), x)


@planned
def einsum_form(equation: str, where: int, ndim: int, shape: tuple[int, ...]) -> Form | None:
    """The form of an einsum whose operand number `where` is the weight, of this shape; x has `ndim` axes."""
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
    is_plain = len(carried) == 1 and "..." not in equation and not is_linear
    kept = [(k, output.index(c)) for k, c in enumerate(theirs) if c in output] if is_plain else []
    return Form(tuple(carried), tuple(summed), terms, terms, is_linear, tuple(kept))


def _axis(letter: str, subscripts: str) -> int:
    """The place of a letter, counted from the end if it comes after an ellipsis."""
    before, _, after = subscripts.partition("...")
    return after.index(letter) - len(after) if letter in after else before.index(letter)


def einsum(equation: Any, *operands: Any) -> Contraction | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if isinstance(equation, str) and len(operands) == 3 and "." not in equation:
        return _three_operands(equation, operands)
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    return contraction(equation, operands, partial(torch.einsum, equation))


def _three_operands(equation: str, operands: tuple[Any, ...]) -> Contraction | None:
    """As a contraction of the weight with the product of the others, where this forms nothing of its outputs."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    where = next(k for k, operand in enumerate(operands) if isinstance(operand, Weight))
    ours, *others = [inputs.split(",")[k] for k in (where, *[k for k in range(3) if k != where])]
    letters = dict.fromkeys("".join(others))
    outer = [c for c in ours if c in output and c not in letters]
    if not arrow or not outer or any(c in ours and c in output for c in letters):
        return None  # such as a scale of every edge, whose product with the others is as large as A for each sample
    kept = "".join([c for c in output if c in letters] + [c for c in letters if c in ours and c not in output])
    x = torch.einsum(f"{','.join(others)}->{kept}", *[operands[k] for k in range(3) if k != where])
    pair = f"{kept},{ours}->{output}"
    return contraction(pair, (x, operands[where]), partial(torch.einsum, pair))


def linear(input: Any, weight: Any, bias: torch.Tensor | None = None) -> Contraction | None:
    return contraction("...i,oi->...o", (input, weight), F.linear) if weight.ndim == 2 else None


def addmm(input: Any, *args: Any, beta: float = 1, alpha: float = 1, **kwargs: Any) -> Contraction | None:
    """Also for baddbmm."""
    return None if isinstance(input, Weight) or (beta, alpha) != (1, 1) else matmul(*args, **kwargs)


def matmul(*args: Any, **kwargs: Any) -> Contraction | None:
    """Also for mm, bmm and mv, whose operands have other names."""
    names = ("input", "self", "mat1", "batch1", "other", "mat2", "vec", "tensor2", "batch2")
    a, b = (*args, *[kwargs[name] for name in names if name in kwargs])
    return contraction(_matmul_equation(a.ndim, b.ndim), (a, b), torch.matmul) if "out" not in kwargs else None


@planned
def _matmul_equation(of_a: int, of_b: int) -> str:
    """The equation of torch.matmul, whose operands have so many axes."""
    batch = ascii_letters[: max(of_a, of_b, 2) - 2]
    a = batch[len(batch) - of_a + 2 :] + "YZ" if of_a > 1 else "Z"
    b = batch[len(batch) - of_b + 2 :] + "ZX" if of_b > 1 else "Z"
    return f"{a},{b}->{batch}{'Y' * (of_a > 1)}{'X' * (of_b > 1)}"


def tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Contraction | None:
    if out is not None or isinstance(dims, torch.Tensor):
        return None
    dims = (list(range(a.ndim - dims, a.ndim)), list(range(dims))) if isinstance(dims, int) else dims
    of_a, of_b = list(ascii_letters[: a.ndim]), list(ascii_letters[a.ndim : a.ndim + b.ndim])
    for i, j in zip(*[[one] if isinstance(one, int) else one for one in dims], strict=True):
        of_b[j] = of_a[i]
    output = [letter for letter in of_a + of_b if (letter in of_a) != (letter in of_b)]
    equation = f"{''.join(of_a)},{''.join(of_b)}->{''.join(output)}"
    return contraction(equation, (a, b), lambda a, b: torch.tensordot(a, b, dims))


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
    return Contraction(form, lambda x, w: function(x, w, None, stride, padding, dilation, groups), input)


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
    others = False, mode, False, per_sample_weights, include_last_offset, padding_idx
    return Contraction(_LOOKUP, lambda x, w: F.embedding_bag(x, w, offsets, None, 2, *others), input)


def functions(names: str) -> list[Any]:
    """The functions of these names in torch and in torch.Tensor; for attributes, their getters."""
    found: list[Any] = [getattr(space, name, None) for name in names.split() for space in (torch, torch.Tensor)]
    return [one if callable(one) else one.__get__ for one in found if callable(one) or hasattr(one, "__get__")]


CONTRACTIONS: dict[Any, Callable[..., Contraction | None]] = {
    F.linear: linear,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys(functions("einsum"), einsum),
    **dict.fromkeys(functions("tensordot"), tensordot),
    **dict.fromkeys(functions("addmm baddbmm"), addmm),
    **dict.fromkeys(functions("conv1d conv2d conv3d"), conv),
    **dict.fromkeys(functions("matmul mm bmm mv __matmul__"), matmul),
}
