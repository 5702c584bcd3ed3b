"""Finds the layout of a parameter from its responses: which factors of the stored axes are i, o, d and kernel axes.

If the parameter is a coefficient tensor, the response of entry (i, o, d) is a product:

    g = w_o · s_io · Σ_x φ_d(x_i)

One response is plain. In the other, known numbers weight the outputs (or the inputs). Their ratio is the number of
the entry's output (or input). A factor of a stored axis belongs to the mode whose ratio changes along it, and to d if
no ratio changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

import torch

from ..coefficients import Layout
from ..coefficients.layout import GROUP

Pair = tuple[torch.Tensor, torch.Tensor]  # (numbered, plain) responses, each with the parameter's shape
Responses = Mapping[str, Pair]  # by what is numbered: o the outputs, i the inputs; t, h, w positions of the input
Factor = tuple[str, int]  # (mode, size)

UNCHANGED = (
    "its response does not change with the input: it is added, as a bias is, or its functions are flat on this sample"
)
ONE_FUNCTION = (
    "every input has one function only, up to factors: this is a linear layer whose outputs are arranged on several "
    'axes, and no KAN layer (`target_modules="all-linear"` adapts linear layers)'
)
UNMIXED = "it has functions of one input for one output each, and mixes nothing"


@dataclass(frozen=True)
class Precision:
    """A dtype, and the relative differences that its rounding explains."""

    dtype: torch.dtype
    affine: float  # between tensors that should be affine in a parameter, or equal
    ratio: float  # between ratios of responses
    product: float  # between products
    zero: float  # the size of a response that should be zero


# float64 comes first. Some layers need float32, because they create float32 tensors.
PRECISIONS = (
    Precision(torch.float64, affine=1e-7, ratio=1e-6, product=1e-7, zero=1e-9),
    Precision(torch.float32, affine=1e-3, ratio=2e-3, product=1e-3, zero=1e-3),
)
FINITE_DIFFERENCES = replace(PRECISIONS[0], ratio=1e-3, product=1e-5, zero=1e-5)


class Refused(Exception):
    """A parameter is no coefficient tensor, or cannot be tested.

    Attributes:
        of_class: whether this holds for all layers that are alike.
        linear: whether there is one function per input.
        mixing: whether the parameter is a weight between different inputs and outputs.
    """

    def __init__(self, reason: str, of_class: bool = False, linear: bool = False, mixing: bool = False):
        super().__init__(reason)
        self.of_class, self.linear, self.mixing = of_class or linear, linear, mixing


class NoOutputs(Refused):
    """The tensors z of the parameter have no output axis."""


def find_layout(responses: Responses, features: int, precision: Precision, star: bool) -> Layout:
    """The layout that explains the response of every entry, with a `star` if it may have one.

    `features` is the layer's number of input features. Raises Refused if there is no layout.
    """
    try:
        return _layout(responses, features, precision)
    except Refused as refused:
        found = _flattened(responses, features, precision) if star and not refused.linear else None
        if found is None:
            raise
        return found


def mapped(responses: Responses, function: Callable[[torch.Tensor], torch.Tensor]) -> Responses:
    """Every response by `function`, which takes a slice or view of the parameter."""
    return {mode: (function(numbered), function(plain)) for mode, (numbered, plain) in responses.items()}


def _layout(responses: Responses, features: int, precision: Precision) -> Layout:
    ratios = {mode: _ratios(pair, precision) for mode, pair in responses.items()}
    if any(values.isnan().all() for values in ratios.values()):
        raise Refused(UNCHANGED)
    axes = [_factors(ratios, axis, precision) for axis in range(ratios["o"].ndim)]
    modes = {mode for factors in axes for mode, _ in factors}
    if "d" not in modes:
        if _repeats(ratios["i"], axes):
            raise Refused("its entries share inputs, but not along factors of its stored axes")
        reason = "it has one function per input (n_d = 1): a linear weight, no basis axis"
        raise Refused(reason, linear=True, mixing=bool(modes & {"i", "o"}))
    # A single input or a single output (per group) is fine, but without a kernel not both.
    several = math.prod(size for factors in axes for mode, size in factors if mode in ("i", "o"))
    if several == 1 and len(responses) == 2 and (features > 1 or "g" in modes):
        raise Refused(UNMIXED)
    layout = _name_axes(axes, tuple(ratios["o"].shape))
    if features % (layout.canonical_shape[0] * layout.sizes.get("g", 1)):
        raise Refused("its entries share inputs, but not along factors of its stored axes")
    _verify(layout, responses, precision)
    return layout


def _ratios(pair: Pair, precision: Precision) -> torch.Tensor:
    """numbered / plain; NaN where the plain response is zero."""
    numbered, plain = pair
    known = plain.abs() > precision.zero * plain.abs().max()
    return torch.where(known, numbered / torch.where(known, plain, 1), torch.nan)


def _span(ratios: torch.Tensor, axis: int, precision: Precision, most_lines: int = 64) -> tuple[int, int, int]:
    """Splits a stored axis into (before, span, after), where `span` is the smallest factor that holds all changes.

    Each line of ratios along the axis, as an array (before, span, after), is constant over `before` and `after`.
    """
    size = ratios.shape[axis]
    lines = ratios.movedim(axis, -1).reshape(-1, size)
    known = (~lines.isnan()).sum(1)
    lines = lines[known.topk(min(most_lines, len(lines))).indices]
    high, low = (torch.where(lines.isnan(), fill, lines) for fill in (-torch.inf, torch.inf))
    divisors = [k for k in range(1, size + 1) if size % k == 0]
    splits = [(size // (k * after), k, after) for k in divisors for after in divisors if size % (k * after) == 0]
    for split in splits:
        top, bottom = high.view(-1, *split).amax((1, 3)), low.view(-1, *split).amin((1, 3))
        if (top - bottom <= precision.ratio * top.abs()).all():  # -inf where no ratio is known
            return split
    raise AssertionError("unreachable: a span of the whole axis fits")


def _factors(ratios: Mapping[str, torch.Tensor], axis: int, precision: Precision) -> list[Factor]:
    """The factors of one stored axis, the slowest first. An axis of size 1 has none."""
    spans = {mode: _span(values, axis, precision) for mode, values in ratios.items()}
    edges = {mode: (after, after * span) for mode, (_, span, after) in spans.items() if span > 1}
    cuts = sorted({1, ratios["o"].shape[axis]}.union(*edges.values()))
    factors = []
    for low, high in zip(cuts[:-1], cuts[1:], strict=True):
        modes = {mode for mode, (start, stop) in edges.items() if start <= low and high <= stop}
        if high % low or (len(modes) > 1 and modes != {"i", "o"}):
            raise Refused("its entries mix inputs, outputs and kernel positions in no (i, o, d) pattern")
        # A factor that changes inputs and outputs together is the group of a grouped layer.
        factors.append(("g" if len(modes) == 2 else modes.pop() if modes else "d", high // low))
    return factors[::-1]


def _repeats(ratios: torch.Tensor, axes: list[list[Factor]]) -> bool:
    """Whether the ratios show clearly fewer inputs than the factors of the axes count."""
    counted = math.prod(size for factors in axes for mode, size in factors if mode in ("i", "g"))
    values = ratios[~ratios.isnan()].sort().values
    steps = values.diff() > 0.1 * (values[-1] - values[0]) / max(counted, 2)
    return int(steps.sum()) + 1 <= 0.75 * counted


def _name_axes(axes: list[list[Factor]], shape: tuple[int, ...]) -> Layout:
    """The layout with these factors. A mode i or o of size 1 takes a stored axis of size 1, or a place next to d."""
    missing = [mode for mode in "oi" if all(mode != other for factors in axes for other, _ in factors)]
    for factors in axes:
        if not factors:
            factors.append((missing.pop(0) if missing else "g", 1))
    basis = next(factors for factors in axes if any(mode == "d" for mode, _ in factors))
    basis[:0] = [(mode, 1) for mode in missing]
    total = Counter(mode for factors in axes for mode, _ in factors)
    count: Counter[str] = Counter()
    sizes, groups = {}, []
    for factors in axes:
        names = []
        for mode, size in factors:
            count[mode] += 1
            names.append(mode if total[mode] == 1 else f"{mode}{count[mode]}")
            sizes[names[-1]] = size
        groups.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
    return Layout.fit(" ".join(groups), shape, sizes)


def _verify(layout: Layout, responses: Responses, precision: Precision) -> None:
    """Raise Refused unless every response is the product that the layout implies."""

    def canonical(tensor: torch.Tensor) -> torch.Tensor:
        """Shape (i, o, d, k), where k joins all unfactored axes."""
        tensor = layout.to_canonical(tensor)
        return tensor.reshape(*tensor.shape[:3], -1)

    pairs = mapped(responses, canonical)
    what = dict.fromkeys(responses, "kernel positions") | {"o": "outputs", "i": "input features"}
    constant = dict.fromkeys(responses, (0, 1, 2)) | {"o": (0, 2), "i": (1, 2)}  # axes along which a ratio is constant
    for mode in "oi":
        if not _distinct(*pairs[mode], constant[mode], precision):
            raise Refused(f"its entries share {what[mode]}, but not along factors of its stored axes")
    for mode, pair in pairs.items():
        if not _proportional(*pair, constant[mode], precision.ratio):
            raise Refused(
                f"its {what[mode]} follow no pattern: {layout.pattern!r} explains only a part of its entries"
            )
    for _, response in (pairs["o"], pairs["i"]):
        curves = response.permute(0, 3, 1, 2)  # (i, k, o, d): s_io · φ_d is a matrix of rank 1 for each i and k
        strongest = curves.square().sum(-1).argmax(-1)[..., None, None].expand(*curves.shape[:2], 1, curves.shape[3])
        if not _proportional(curves, curves.gather(2, strongest).expand_as(curves), (3,), precision.product):
            raise Refused("its functions φ_d(x_i) differ from output to output")
    plain = pairs["o"][1].abs()
    functions = (plain > precision.zero * plain.max()).any(1).sum(1)  # per input (and kernel position)
    if (functions > 1).float().mean() < 0.5:
        raise Refused("most inputs show fewer than two functions on this sample")


def functions_differ(layout: Layout, slopes: Sequence[torch.Tensor], precision: Precision) -> bool:
    """Whether φ_d(x_i) are not c_d · φ(x_i) for most inputs i. Affine functions of one input are such multiples.

    Each of the slopes, of the parameter's shape, is Σ_b t_b ∂φ_d/∂x(x_ib) for other directions t over the samples b.
    """
    curves = torch.stack([layout.to_canonical(slope) for slope in slopes], -1)
    curves = curves.reshape(*curves.shape[:3], -1, len(slopes)).movedim(3, 2).flatten(1, 2)  # (i, o k, d, slopes)
    strongest = curves.square().sum((2, 3)).argmax(1)[:, None, None, None].expand(-1, 1, *curves.shape[2:])
    values = torch.linalg.svdvals(curves.gather(1, strongest)[:, 0])
    alive = values[:, 0] > precision.zero * values.max()
    return bool((values[alive, 1] > 10 * precision.ratio * values[alive, 0]).double().mean() >= 0.5)


def _proportional(a: torch.Tensor, b: torch.Tensor, axes: tuple[int, ...], tolerance: float) -> bool:
    """Whether a = r·b with r constant along `axes`. Errors are relative to the largest |a| along these axes."""
    squares = (b * b).sum(axes, keepdim=True)
    r = (a * b).sum(axes, keepdim=True) / torch.where(squares > 0, squares, 1)
    largest = a.abs().amax(axes, keepdim=True)
    return bool(((a - r * b).abs() <= tolerance * largest + 1e-3 * tolerance * a.abs().max()).all())


def _distinct(a: torch.Tensor, b: torch.Tensor, axes: tuple[int, ...], precision: Precision) -> bool:
    """Whether r in a = r·b differs between all indices of the remaining mode, for each index of the last axis."""
    squares = (b * b).sum(axes)  # (i or o, k)
    ratios = (a * b).sum(axes) / torch.where(squares > 0, squares, torch.nan)
    least = min(precision.ratio, 0.2 / len(ratios))
    return not (ratios.sort(0).values.diff(dim=0) < least).any()  # unknown ratios are NaN and come last


def _flattened(responses: Responses, features: int, precision: Precision) -> Layout | None:
    """A layout with a star, if the parameter has one after all stored axes, or all but one, are flattened."""
    shape = tuple(responses["o"][0].shape)
    for start, stop in ((1, len(shape)), (0, len(shape) - 1), (0, len(shape))):
        if stop - start < 2:
            continue
        with suppress(Refused):
            flat = mapped(responses, partial(torch.flatten, start_dim=start, end_dim=stop - 1))
            layout = _layout(flat, features, precision)
            groups = GROUP.findall(layout.pattern)
            groups[start] = f"({groups[start].strip('()')})*"
            return Layout(" ".join(groups), layout.sizes, shape[start:stop])
    return None


def agree(one: Layout, two: Layout) -> bool:
    """Whether two layouts of one shape give each entry the same i, o, d and kernel position, up to renumbering."""
    return all(
        len(torch.stack([a, b]).unique(dim=1)[0]) == a.max() + 1 == b.max() + 1
        for a, b in zip(_indices(one), _indices(two), strict=True)
    )


def _indices(layout: Layout) -> Iterator[torch.Tensor]:
    """The i, o, d and kernel position of each entry, in the order of storage."""
    n, m, n_d, *others = layout.canonical_shape
    for index in torch.meshgrid(*map(torch.arange, (n, m, n_d, math.prod(others))), indexing="ij"):
        yield layout.from_canonical(index.reshape(layout.canonical_shape)).flatten()


def axes_of(layout: Layout, shape: torch.Size) -> Iterator[str]:
    """The layouts of tensors of `shape`, such as scales, that consist of some axes of `layout`."""
    groups = GROUP.findall(layout.pattern)
    parts = {group: group.strip("()").split() for group in groups} | {axis: [axis] for axis in layout.sizes}
    for chosen in permutations(parts, len(shape)):
        axes = [axis for part in chosen for axis in parts[part]]
        sizes = [math.prod(layout.sizes[axis] for axis in parts[part]) for part in chosen]
        if axes and len(set(axes)) == len(axes) and sizes == list(shape):
            yield " ".join(chosen)
