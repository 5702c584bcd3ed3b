"""Describes one coefficient tensor: the parameter that holds it, its layout, and its scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import rearrange

from ..placement.sharded import full_shape
from .arrangement import Arrangement

_MODES = ("i", "o", "d")  # the axes with factors: input, output, basis
_KERNEL = ("g", "t", "h", "w")  # the other axes: group, and the kernel's time, height and width
_AXIS = re.compile(r"[iodgthw][0-9]{0,9}")
GROUP = re.compile(r"\([^()]*\)\*?|[^\s()*]+")  # the axes on one stored axis, or with a star on several
_BOUND = re.compile(r"(-?[0-9]{1,18})?")  # a bound of a slice
_FIELDS = ("layout", "sizes", "slice", "scale", "scale_layout", "layer")


def part_number(axis: str) -> int:
    """The number of an axis such as `d2`; 0 if it has none."""
    return int(axis[1:] or 0)


def _parse(pattern: str) -> list[list[str]]:
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
            "t, h, w (kernel), with a number where one mode lies on two axes, as in 'd1 o i d2'"
        )
    if len(set(axes)) < len(axes):
        raise ValueError(f"layout {pattern!r} names an axis twice; number the parts of a mode, as in 'd1 o i d2'")
    return groups


def check_layout(pattern: str, modes: tuple[str, ...] = _MODES) -> None:
    """Raise ValueError unless `pattern` is a well-formed layout that has each of `modes`."""
    axes = {axis[0] for group in _parse(pattern) for axis in group}
    missing = [mode for mode in modes if mode not in axes]
    if missing:
        raise ValueError(f"layout {pattern!r} lacks the axes {missing}: a coefficient tensor has i, o and d")


def _star(pattern: str) -> int | None:
    """The number of the group with a star, or None."""
    return next((k for k, group in enumerate(GROUP.findall(pattern)) if group.endswith("*")), None)


def _check_sizes(pattern: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError if `sizes` has axes that `pattern` has not."""
    unused = sorted(set(sizes) - {axis for group in _parse(pattern) for axis in group})
    if unused:
        raise ValueError(f"`sizes` names the axes {unused}, which layout {pattern!r} does not have")


def _solve_sizes(pattern: str, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of `pattern` on a tensor of `shape`.

    Raises:
        ValueError: if the pattern does not fit the shape, or does not determine every size.
    """
    groups = _parse(pattern)
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
    _check_sizes(pattern, known)
    return sizes


@dataclass(frozen=True)
class Layout:
    """How A[i, o, d, ...] is stored in a tensor: an einops pattern and the size of each of its axes.

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
        return cls(pattern, _solve_sizes(pattern, tuple(shape), sizes or {}), flattened)

    @property
    def _stored(self) -> str:
        """The pattern of the stored tensor after flattening, in einops notation."""
        return self.pattern.replace("*", "")

    @cached_property
    def _canonical(self) -> str:
        groups = [[axis for axis in self.sizes if axis[0] == letter] for letter in _MODES + _KERNEL]
        return " ".join(f"({' '.join(sorted(axes, key=part_number))})" for axes in groups if axes)

    @property
    def stored_axes(self) -> list[str]:
        """The content of each stored axis, with sizes: `["o=4", "i=3 d=8"]` for `"o (i d)"`."""
        return [" ".join(f"{axis}={self.sizes[axis]}" for axis in group) for group in _parse(self.pattern)]

    @cached_property
    def canonical_shape(self) -> tuple[int, ...]:
        """(n, m, n_d, ...): the sizes of A's modes, and then the sizes of its axes without factors."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in _parse(self._canonical))

    def flat(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored tensor with the axes of the group with a star flattened into one, if the layout has one."""
        star = _star(self.pattern)
        return stored if star is None else stored.flatten(star, star + len(self.flattened) - 1)

    def to_canonical(self, stored: torch.Tensor) -> torch.Tensor:
        """A[i, o, d, ...] from the stored tensor."""
        return rearrange(self.flat(stored), f"{self._stored} -> {self._canonical}", **self.sizes)

    def from_canonical(self, canonical: torch.Tensor) -> torch.Tensor:
        """The stored tensor, contiguous, from A[i, o, d, ...]."""
        stored = rearrange(canonical, f"{self._canonical} -> {self._stored}", **self.sizes).contiguous()
        star = _star(self.pattern)
        return stored if star is None else stored.unflatten(star, self.flattened)

    def expansion(self, scale_pattern: str) -> Arrangement:
        """Repeats a scale with the layout `scale_pattern` (some of this layout's axes) to the stored shape."""
        given = [axis for group in _parse(scale_pattern) for axis in group]
        return Arrangement.of(given, _parse(self.pattern), self.sizes)


@dataclass(frozen=True)
class CoefficientSpec:
    """Where a KAN layer stores one coefficient tensor, A = parameter · scale.

    Attributes:
        parameter: the path of the parameter from the layer, such as `"spline_linear.weight"`.
        layout: the parameter's layout.
        scale: the path of a tensor by which the layer multiplies the parameter *before* the contraction
            (efficient-kan's `spline_scaler`). The adapter is added to the product, and merging folds the scale into
            the parameter. Scales and masks after the contraction are not named here.
        scale_layout: the layout of the scale, with some of the parameter's axes.
        slice: the part of the parameter that is the coefficient tensor, if the parameter holds something else too, in
            Python's notation such as `":, :48"`. `layout` then describes this part, and the rest is not adapted.
    """

    parameter: str
    layout: Layout
    scale: str | None = None
    scale_layout: str | None = None
    slice: str | None = None

    def __post_init__(self) -> None:
        # Patterns are parsed here, because torch.compile cannot trace a regular expression while the layer runs.
        self.axes  # noqa: B018
        self.spread  # noqa: B018

    @cached_property
    def spread(self) -> Any:
        """An `Arrangement` that repeats the scale to the parameter's shape; None without a scale."""
        return None if self.scale_layout is None else self.layout.expansion(self.scale_layout)

    @cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The axes that lie on each stored axis: `(("o",), ("i", "d"))` for the layout `"o (i d)"`."""
        return tuple(map(tuple, _parse(self.layout.pattern)))

    @property
    def nesting(self) -> tuple[bool, str]:
        """A key that sorts the adapters of one module from the innermost outwards. Matrices are innermost."""
        return self.layout.canonical_shape[2] > 1, self.parameter

    @classmethod
    def resolve(cls, layer: torch.nn.Module, parameter: str, description: str | Mapping[str, Any]) -> CoefficientSpec:
        """The spec of a parameter of `layer`, from a layout string or a mapping with the fields of a description.

        Raises:
            ValueError, TypeError: if the description is malformed, names something that the layer does not have, or
                does not fit the parameter's shape.
        """
        description = check_description(description)
        tensor = tensor_at(layer, parameter)
        if not tensor.is_floating_point():
            raise TypeError(f"`{parameter}` has dtype {tensor.dtype}: LoTRA adapts real floating-point tensors only")
        region = description.get("slice")
        shape = full_shape(tensor)
        if region is not None:
            if len(parse_slice(region)) > len(shape):
                raise ValueError(f"`slice` {region!r} has more axes than `{parameter}` of shape {tuple(shape)}")
            shape = torch.empty(shape, device="meta")[parse_slice(region)].shape
        layout = Layout.fit(description["layout"], shape, description.get("sizes"))
        scale, scale_layout = description.get("scale"), description.get("scale_layout")
        if scale is not None and scale_layout is not None:
            names = [axis for group in _parse(scale_layout) for axis in group]
            if further := [axis for axis in names if axis not in layout.sizes]:
                raise ValueError(f"`scale_layout` {scale_layout!r} has the axes {further}, which the layout does not")
            own = {axis: layout.sizes[axis] for axis in names}
            _solve_sizes(scale_layout, tuple(full_shape(tensor_at(layer, scale))), own)  # raises if it does not fit
        return cls(parameter, layout, scale, scale_layout, region)

    def to_canonical(self, stored: torch.Tensor) -> torch.Tensor:
        """A[i, o, d, ...] from a tensor that is stored like the parameter."""
        return self.layout.to_canonical(self.part(stored))

    def part(self, stored: torch.Tensor) -> torch.Tensor:
        """The part that `layout` describes, from a tensor that is stored like the parameter."""
        return stored if self.slice is None else stored[parse_slice(self.slice)]

    def describe(self) -> dict[str, Any]:
        """The mapping that `resolve` reads, as plain data for a saved config."""
        description: dict[str, Any] = {"layout": self.layout.pattern, "sizes": dict(self.layout.sizes)}
        if self.scale is not None:
            description |= {"scale": self.scale, "scale_layout": self.scale_layout}
        if self.slice is not None:
            description["slice"] = self.slice
        return description


def check_description(description: str | Mapping[str, Any]) -> dict[str, Any]:
    """Check a coefficient description as far as possible without the layer, and return it as a mapping."""
    if isinstance(description, str):
        description = {"layout": description}
    if not isinstance(description, Mapping) or "layout" not in description:
        raise TypeError(f"coefficients are described by a layout or a mapping with 'layout', got {description!r}")
    unknown = sorted(set(description) - set(_FIELDS))
    if unknown:
        raise ValueError(f"a coefficient description has the fields {_FIELDS}, got also {unknown}")
    check_layout(description["layout"])
    sizes = description.get("sizes") or {}
    if not isinstance(sizes, Mapping) or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(f"`sizes` maps axes to positive integers, got {sizes!r}")
    _check_sizes(description["layout"], sizes)
    for name in ("slice", "scale", "layer"):
        if not isinstance(description.get(name), str | None):
            raise TypeError(f"`{name}` should be a str but the value passed is {description[name]!r}")
    region, scale, scale_layout = map(description.get, ("slice", "scale", "scale_layout"))
    if region is not None:
        parse_slice(region)
    if region is not None and scale is not None:
        raise ValueError(f"`scale` and `slice` together are not supported, got {description!r}")
    if "*" in description["layout"] and not region is scale is None:
        raise ValueError(f"a layout with a star goes with no `slice` and no `scale`, got {description!r}")
    if (scale is None) != (scale_layout is None):
        raise ValueError(f"`scale` and `scale_layout` come together, got {description!r}")
    if scale_layout is not None:
        check_layout(scale_layout, modes=())
    return dict(description)


def check_descriptions(coefficients: Mapping[str, Any], name: str = "coefficients") -> None:
    """Raise TypeError or ValueError, naming the argument and key, unless every value is a valid description."""
    if not isinstance(coefficients, Mapping) or not all(isinstance(key, str) for key in coefficients):
        raise TypeError(f"`{name}` should be a mapping from names but the value passed is {coefficients!r}")
    for key, description in coefficients.items():
        try:
            check_description(description)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{name}[{key!r}]`: {error}") from None


def parse_slice(text: str) -> tuple[slice, ...]:
    """`":, :48"` -> `(slice(None), slice(None, 48))`. Raises ValueError for any other notation."""
    ranges = [[bound.strip() for bound in part.split(":")] for part in str(text).split(",")]
    if any(len(bounds) != 2 or not all(map(_BOUND.fullmatch, bounds)) for bounds in ranges):
        raise ValueError(f"`slice` is written like ':, :48', a range for each stored axis, got {text!r}")
    return tuple(slice(*(int(bound) if bound else None for bound in bounds)) for bounds in ranges)


def tensor_at(layer: torch.nn.Module, path: str) -> torch.Tensor:
    """The tensor of `layer` at the dotted `path`. Raises ValueError, which lists the parameters, if there is none."""
    owner, name = owner_of(layer, path)
    tensor = getattr(owner, name, None)
    if not isinstance(tensor, torch.Tensor):
        raise _no_tensor(layer, path)
    return tensor


def owner_of(layer: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    """The module under `layer` that holds the tensor at the dotted `path`, and the tensor's name there."""
    owner, _, name = path.rpartition(".")
    try:
        return layer.get_submodule(owner), name
    except AttributeError:
        raise _no_tensor(layer, path) from None


def _no_tensor(layer: torch.nn.Module, path: str) -> ValueError:
    held = [key for key, _ in layer.named_parameters()]
    return ValueError(f"`{path}` is no tensor of this {type(layer).__name__}, which has the parameters {held}")
