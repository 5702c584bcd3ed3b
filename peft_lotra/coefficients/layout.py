"""Layouts: how a coefficient tensor A lies in a stored tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

_MODES = ("i", "o", "d")  # the axes with factors: input, output, basis
_KERNEL = ("g", "t", "h", "w")  # the other axes: group, and the kernel's time, height and width
_AXIS = re.compile(r"[iodgthw][0-9]{0,9}")
GROUP = re.compile(r"\([^()]*\)\*?|[^\s()*]+")  # the axes on one stored axis, or with a star on several
_STACKED = re.compile(r"\s*d\s*\|")  # how the layout of a stack of parameters begins


def part_number(axis: str) -> int:
    """The number of an axis such as `d2`; 0 if it has none."""
    return int(axis[1:] or 0)


def parse(pattern: str) -> list[list[str]]:
    """The axes of a layout, one list per stored axis: `"o (i d)"` -> `[["o"], ["i", "d"]]`. A star is ignored."""
    if not isinstance(pattern, str):
        raise TypeError(f"a layout is a string such as 'i o d' or 'o (i d)', got {pattern!r}")
    groups = [part.strip("()*").split() for part in GROUP.findall(pattern)]
    axes = [axis for group in groups for axis in group]
    if pattern.count("*") > 1 or ("*" in pattern and not re.search(r"\)\*(\s|$)", pattern)):
        raise ValueError(f"layout {pattern!r} should have at most one `*`, after a parenthesis, as in 'o (i d)*'")
    if pattern.count("(") != pattern.count(")") or len(re.sub(r"[^()]", "", pattern).replace("()", "")) > 0:
        raise ValueError(f"layout {pattern!r} has unbalanced or nested parentheses")
    unknown = [axis for axis in axes if not _AXIS.fullmatch(axis)]
    if unknown or not axes:
        raise ValueError(
            f"layout {pattern!r} has unknown axes {unknown}; use i (input), o (output), d (basis), g (group), "
            "t, h, w (kernel), with a number where one mode lies on two axes, as in 'd1 o i d2', and 'd | o i' for "
            "one parameter for each basis function"
        )
    if len(set(axes)) < len(axes):
        raise ValueError(f"layout {pattern!r} names an axis twice; number the parts of a mode, as in 'd1 o i d2'")
    return groups


def check_layout(pattern: str, modes: tuple[str, ...] = _MODES) -> None:
    """Raise ValueError unless `pattern` is a well-formed layout that has each of `modes`."""
    axes = {axis[0] for group in parse(pattern) for axis in group}
    missing = [mode for mode in modes if mode not in axes]
    if missing:
        raise ValueError(f"layout {pattern!r} lacks the axes {missing}: a coefficient tensor has i, o and d")


def _star(pattern: str) -> int | None:
    """The number of the group with a star, or None."""
    return next((k for k, group in enumerate(GROUP.findall(pattern)) if group.endswith("*")), None)


def check_sizes(pattern: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError if `sizes` has axes that `pattern` has not."""
    unused = sorted(set(sizes) - {axis for group in parse(pattern) for axis in group})
    if unused:
        raise ValueError(f"`sizes` names the axes {unused}, which layout {pattern!r} does not have")


def solve_sizes(pattern: str, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of `pattern` on a tensor of `shape`.

    Raises:
        ValueError: if the pattern does not fit the shape, or does not determine every size.
    """
    groups = parse(pattern)
    if len(groups) != len(shape):
        raise ValueError(f"layout {pattern!r} has {len(groups)} axes, the tensor has shape {shape}")
    sizes: dict[str, int] = {}
    for group, stored in zip(groups, shape, strict=True):
        given = {axis: known[axis] for axis in group if axis in known}
        open_axes = [axis for axis in group if axis not in known]
        product = math.prod(given.values())
        if len(open_axes) > 1:
            raise ValueError(
                f"layout {pattern!r} leaves the sizes of {open_axes} open for shape {shape}; "
                f"give all but one, as in {{'layout': {pattern!r}, 'sizes': {{{open_axes[-1]!r}: 8}}}}"
            )
        if stored % product or (not open_axes and stored != product):
            raise ValueError(f"layout {pattern!r} with sizes {dict(known)} does not fit the shape {shape}")
        sizes |= given | {axis: stored // product for axis in open_axes}
    check_sizes(pattern, known)
    return sizes


class Arrangement(NamedTuple):
    """How named atoms, in one order, become the axes of a tensor, each of some atoms: torch's calls in turn.

    einops does the same, but torch.compile guards on its table of known types: a type that einops meets later,
    anywhere in the program, would compile the model again.
    """

    split: tuple[int, ...]  # reshape the tensor into its atoms
    order: tuple[int, ...]  # permute the atoms; (): they are in order
    spread: tuple[tuple[int, ...], tuple[int, ...]] | None  # reshape and expand for atoms that the tensor lacks
    shape: tuple[int, ...]  # reshape the atoms into axes
    padding: tuple[int, ...] = ()  # as for torch.nn.functional.pad
    flat: int | None = None  # flatten from this axis on

    @classmethod
    def of(
        cls,
        given: Sequence[str],
        wanted: Sequence[Sequence[str]],
        sizes: Mapping[str, int],
        padding: tuple[int, ...] = (),
        flat: int | None = None,
    ) -> Arrangement:
        """From the names of the atoms that a tensor has, those of each axis of the result, and their sizes."""
        names = [name for group in wanted for name in group]
        order = [list(given).index(name) for name in names if name in given]
        full = tuple([sizes[name] for name in names])
        thin = tuple([sizes[name] if name in given else 1 for name in names])
        return cls(
            tuple([sizes[name] for name in given]),
            () if order == sorted(order) else tuple(order),
            None if thin == full else (thin, full),
            tuple([math.prod([sizes[name] for name in group]) for group in wanted]),
            padding,
            flat,
        )

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != self.split:
            tensor = tensor.reshape(self.split)
        if self.order:
            tensor = tensor.permute(self.order)
        if self.spread is not None:
            tensor = tensor.reshape(self.spread[0]).expand(self.spread[1])
        if tensor.shape != self.shape:
            tensor = tensor.reshape(self.shape)
        if self.padding:
            tensor = torch.nn.functional.pad(tensor, self.padding)
        return tensor if self.flat is None else tensor.flatten(self.flat)


@dataclass(frozen=True)
class Layout:
    """How A[i, o, d, ...] is stored in a tensor: a pattern in einops' notation and the size of each of its axes.

    The axes are i (input), o (output), d (basis), g (group), and t, h, w (kernel). If a mode lies on two axes, they
    are numbered, as in `"d1 o i d2"`, and joined in the order of their numbers.

    A star marks a group that spans several stored axes, which are first flattened into one. Their sizes may differ
    from those of the group's axes. ReLU-KAN's kernel with the stored sizes m, 1, n_d, n, for example, has the layout
    `"o (i d)*"`.

    Attributes:
        flattened: the sizes of the stored axes of the group with a star.
    """

    pattern: str
    sizes: Mapping[str, int] = field(hash=False)
    flattened: tuple[int, ...] = ()

    @classmethod
    def fit(cls, pattern: str, shape: tuple[int, ...], sizes: Mapping[str, int] | None = None) -> Layout:
        """The layout `pattern` for a tensor of `shape`. `sizes` gives the sizes that the shape leaves open.

        Raises:
            ValueError: if the pattern is not a layout of a coefficient tensor or does not fit the shape.
        """
        check_layout(pattern)
        star = _star(pattern)
        flattened: tuple[int, ...] = ()
        if star is not None:
            stop = len(shape) - (len(GROUP.findall(pattern)) - 1 - star)
            flattened = tuple(shape[star:stop])
            if len(flattened) < 2:
                what = f"layout {pattern!r} flattens several stored axes"
                raise ValueError(f"{what}, and of shape {tuple(shape)} leaves fewer than two")
            shape = (*shape[:star], math.prod(flattened), *shape[stop:])
        return cls(pattern, solve_sizes(pattern, tuple(shape), sizes or {}), flattened)

    @cached_property
    def _canonical(self) -> list[list[str]]:
        """The axes of each mode."""
        groups = [[axis for axis in self.sizes if axis[0] == letter] for letter in _MODES + _KERNEL]
        return [sorted(axes, key=part_number) for axes in groups if axes]

    @property
    def stored_axes(self) -> list[str]:
        """The content of each stored axis, with sizes: `["o=4", "i=3 d=8"]` for `"o (i d)"`."""
        return [" ".join(f"{axis}={self.sizes[axis]}" for axis in group) for group in parse(self.pattern)]

    @cached_property
    def canonical_shape(self) -> tuple[int, ...]:
        """(n, m, n_d, ...): the sizes of A's modes, and then the sizes of its axes without factors."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self._canonical)

    def flat(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored tensor with the axes of the group with a star flattened into one, if the layout has one."""
        star = _star(self.pattern)
        return stored if star is None else stored.flatten(star, star + len(self.flattened) - 1)

    def to_canonical(self, stored: torch.Tensor) -> torch.Tensor:
        """A[i, o, d, ...] from the stored tensor."""
        return _rearrangement(parse(self.pattern), self._canonical, self.sizes)(self.flat(stored))

    def from_canonical(self, canonical: torch.Tensor) -> torch.Tensor:
        """The stored tensor, contiguous, from A[i, o, d, ...]."""
        stored = _rearrangement(self._canonical, parse(self.pattern), self.sizes)(canonical).contiguous()
        star = _star(self.pattern)
        return stored if star is None else stored.unflatten(star, self.flattened)

    def expansion(self, scale_pattern: str) -> Arrangement:
        """Repeats a scale with the layout `scale_pattern` (some of this layout's axes) to the stored shape."""
        return _rearrangement(parse(scale_pattern), parse(self.pattern), self.sizes)


def _rearrangement(given: list[list[str]], wanted: list[list[str]], sizes: Mapping[str, int]) -> Arrangement:
    return Arrangement.of([axis for group in given for axis in group], wanted, sizes)


def unstacked(pattern: str) -> str:
    """The layout of the tensor that a stack of parameters makes: `"d | o i"` -> `"d o i"`."""
    return _STACKED.sub("d", pattern, count=1) if isinstance(pattern, str) else pattern
