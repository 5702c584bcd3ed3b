"""Describes one coefficient tensor: the parameter that holds it, its layout, and its scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import ismethod
from typing import Any

import torch

from ..placement.quantized import has_quantized_weight, shape_of_linear
from ..placement.sharded import full_shape
from .layout import Layout, check_layout, check_sizes, parse, solve_sizes, unstacked

_BOUND = re.compile(r"(-?[0-9]{1,18})?")  # a bound of a slice
_FIELDS = ("layout", "sizes", "slice", "scale", "scale_layout", "layer")


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
        parts: if A is a stack of several parameters, one for each basis function, their paths. `parameter` then has a
            star in place of their numbers, and `layout` begins with d, the axis of the stack.
    """

    parameter: str
    layout: Layout
    scale: str | None = None
    scale_layout: str | None = None
    slice: str | None = None
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Patterns are parsed here, because torch.compile cannot trace a regular expression while the layer runs.
        self.axes  # noqa: B018
        self.spread  # noqa: B018
        self.pieces  # noqa: B018

    @cached_property
    def pieces(self) -> tuple[CoefficientSpec, ...]:
        """The spec of each parameter of a stack, with one basis function; of a single parameter, the spec itself."""
        if not self.parts:
            return (self,)
        *groups, last = [list(group) for group in self.axes[1:]]
        pattern = " ".join(f"({' '.join(group)})" for group in [*groups, [*last, "d"]])
        layout = Layout(pattern, {**self.layout.sizes, "d": 1})
        return tuple([CoefficientSpec(part, layout) for part in self.parts])

    @property
    def parameters(self) -> list[str]:
        """The path of the parameter, or of each parameter of a stack."""
        return [*self.parts] or [self.parameter]

    @property
    def paths(self) -> list[str]:
        """The paths of the parameters, and of the scale."""
        return [*self.parameters, *([] if self.scale is None else [self.scale])]

    @property
    def pattern(self) -> str:
        """The layout as it is declared."""
        return self.layout.pattern.replace("d", "d |", 1) if self.parts else self.layout.pattern

    @cached_property
    def spread(self) -> Any:
        """An `Arrangement` that repeats the scale to the parameter's shape; None without a scale."""
        return None if self.scale_layout is None else self.layout.expansion(self.scale_layout)

    @cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The axes that lie on each stored axis: `(("o",), ("i", "d"))` for the layout `"o (i d)"`."""
        return tuple(map(tuple, parse(self.layout.pattern)))

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
        if "|" in description["layout"] and "*" not in parameter:
            raise ValueError(
                f"`{parameter}` and the layout {description['layout']!r}: a layout that begins with 'd |' is for "
                "several parameters, one for each basis function, and a star stands for their numbers, as in "
                "{'coef.*': 'd | o i'}"
            )
        parts = parts_of(layer, parameter) if is_stacked(description) else ()
        if is_stacked(description) and not parts:
            raise _no_tensor(layer, parameter)
        shapes = {path: shape_at(layer, path) for path in parts or [parameter]}
        if len({*shapes.values()}) > 1:
            raise ValueError(f"`{parameter}` means parameters of several shapes, {shapes}")
        shape = next(iter(shapes.values()))
        if parts:
            shape = torch.Size((len(parts), *shape))
        tensor = tensor_at(layer, parameter)
        if not tensor.is_floating_point() and not is_quantized_at(layer, parameter):
            raise TypeError(f"`{parameter}` has dtype {tensor.dtype}: LoTRA adapts real floating-point tensors only")
        region = description.get("slice")
        if region is not None:
            if len(parse_slice(region)) > len(shape):
                raise ValueError(f"`slice` {region!r} has more axes than `{parameter}` of shape {tuple(shape)}")
            shape = torch.empty(shape, device="meta")[parse_slice(region)].shape
        layout = Layout.fit(unstacked(description["layout"]), shape, description.get("sizes"))
        scale, scale_layout = description.get("scale"), description.get("scale_layout")
        if scale is not None and scale_layout is not None:
            names = [axis for group in parse(scale_layout) for axis in group]
            if further := [axis for axis in names if axis not in layout.sizes]:
                raise ValueError(f"`scale_layout` {scale_layout!r} has the axes {further}, which the layout does not")
            own = {axis: layout.sizes[axis] for axis in names}
            solve_sizes(scale_layout, tuple(full_shape(tensor_at(layer, scale))), own)  # raises if it does not fit
        return cls(parameter, layout, scale, scale_layout, region, parts)

    def to_canonical(self, stored: torch.Tensor) -> torch.Tensor:
        """A[i, o, d, ...] from a tensor that is stored like the parameter."""
        return self.layout.to_canonical(self.part(stored))

    def part(self, stored: torch.Tensor) -> torch.Tensor:
        """The part that `layout` describes, from a tensor that is stored like the parameter."""
        return stored if self.slice is None else stored[parse_slice(self.slice)]

    def describe(self) -> dict[str, Any]:
        """The mapping that `resolve` reads, as plain data for a saved config."""
        description: dict[str, Any] = {"layout": self.pattern, "sizes": dict(self.layout.sizes)}
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
    layout = unstacked(description["layout"])
    check_layout(layout)
    sizes = description.get("sizes") or {}
    if not isinstance(sizes, Mapping) or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(f"`sizes` maps axes to positive integers, got {sizes!r}")
    check_sizes(layout, sizes)
    for name in ("slice", "scale", "layer"):
        if not isinstance(description.get(name), str | None):
            raise TypeError(f"`{name}` should be a str but the value passed is {description[name]!r}")
    region, scale, scale_layout = map(description.get, ("slice", "scale", "scale_layout"))
    if region is not None:
        parse_slice(region)
    marks = "*" in layout, "|" in description["layout"]
    if sum([region is not None, scale is not None, *marks]) > 1:
        raise ValueError(
            f"a description has one of `slice`, `scale`, a star in its layout, and a bar in it, got {description!r}"
        )
    if (scale is None) != (scale_layout is None):
        raise ValueError(f"`scale` and `scale_layout` come together, got {description!r}")
    if scale_layout is not None:
        check_layout(scale_layout, modes=())
    return dict(description)


def is_stacked(description: str | Mapping[str, Any]) -> bool:
    """Whether this describes several parameters together, one for each basis function."""
    return "|" in (description if isinstance(description, str) else description["layout"])


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


def numbered(path: str) -> re.Pattern[str]:
    """Matches the names that a path with a star means, after any modules (group 1); group 2 is the number."""
    return re.compile(r"(?:(.*)\.)?" + re.escape(path).replace(r"\*", "([0-9]{1,9})", 1))


def parts_of(layer: torch.nn.Module, path: str) -> tuple[str, ...]:
    """The paths of the parameters of a stack, by their numbers; () if the path with a star means none."""
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    found = {int(match[2]): name for name in names if (match := numbered(path).fullmatch(name)) and match[1] is None}
    return tuple([found[number] for number in sorted(found)])


def tensor_at(layer: torch.nn.Module, path: str) -> torch.Tensor:
    """The tensor of `layer` at the dotted `path`; with a star in it, a stack. Raises ValueError if there is none."""
    if "*" in path and (parts := parts_of(layer, path)):
        return torch.stack([tensor_at(layer, part) for part in parts])
    owner, name = owner_of(layer, path)
    tensor = getattr(owner, name, None)
    if ismethod(tensor):  # a packed weight, which its layer unpacks when asked
        raise ValueError(
            f"`{path}` is packed by torch's quantization of a {type(owner).__name__}, "
            "which has no gradients: adapt the model before it is quantized, or quantize its weights by torchao"
        )
    if not isinstance(tensor, torch.Tensor):
        raise _no_tensor(layer, path)
    return tensor


def is_quantized_at(layer: torch.nn.Module, path: str) -> bool:
    """Whether `path` is the quantized weight of a linear layer."""
    return path.rpartition(".")[2] == "weight" and "*" not in path and has_quantized_weight(owner_of(layer, path)[0])


def shape_at(layer: torch.nn.Module, path: str) -> torch.Size:
    """The shape of the values at a dotted path, also where a tensor is sharded or quantized."""
    if is_quantized_at(layer, path) and (shape := shape_of_linear(owner_of(layer, path)[0])):
        return shape
    return full_shape(tensor_at(layer, path))


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
