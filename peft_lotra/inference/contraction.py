"""Computes the derivatives of one contraction of a layer, and finds the layout that they show; see `response`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter

import torch

from ..coefficients import CoefficientSpec, Layout
from ..coefficients.spec import parse_slice
from .layouts import UNCHANGED, NoLayout, NoOutputs, Pair, Responses, bears_out, find_flattened, find_layout, find_part
from .precision import FINITE_DIFFERENCES, Precision
from .probe import Inputs, Probe

FLAT = -1  # in place of the feature axis: all axes except the first are flattened


@dataclass(frozen=True)
class Place:
    """Where in the run of a layer its response was measured. A layer that is alike can be tested at the same place.

    Attributes:
        precision, which: those of the probe.
        frontier, inputs: the numbers of z and u among the recorded tensors.
        output, feature: the output axis of z and the feature axis of u.
        joined: whether several z hold consecutive outputs; otherwise they hold the same outputs.
        finite: whether slopes are finite differences, because the layer has no second derivatives.
        trace: `Probe.trace` of the run.
    """

    precision: Precision
    which: int
    frontier: tuple[int, ...]
    inputs: Inputs
    output: int | None
    joined: bool
    feature: int | None
    finite: bool
    trace: tuple = field(repr=False)


class Contraction:
    """The responses of parameters that share z and u."""

    def __init__(
        self,
        probe: Probe,
        frontier: tuple[int, ...],
        inputs: Inputs,
        paths: list[str],
        finite: bool | None = None,
    ):
        """`finite` says whether slopes are finite differences. If it is None, the constructor finds out."""
        self._probe, self._frontier, self._inputs, self._paths = probe, frontier, inputs, paths
        self._towards_u: dict[bool, list[torch.Tensor]] = {}
        self._gradients: dict[tuple, dict[str, torch.Tensor]] = {}
        self._z = [probe.base.tensors[k].detach() for k in frontier]
        self._tolerance, self._finite = probe.precision.tolerance, bool(finite)
        if finite:
            self._tolerance = FINITE_DIFFERENCES
        if finite is not None:
            return
        with suppress(NoLayout):
            try:
                self._slope(paths[0], None)
            except RuntimeError:  # a function has no second derivative, or a tensor was changed in place
                self._gradients.clear()
                self._inputs, self._tolerance, self._finite = Inputs((0,)), FINITE_DIFFERENCES, True

    def find(self, path: str, region: str | None) -> tuple[Layout, str | None, Place]:
        """The layout of the coefficient tensor, its slice of the parameter (None for all of it), and the place.

        If `region` is given, only this slice is tested.

        Raises:
            NoLayout: if the parameter is not a coefficient tensor.
        """
        z, shape = self._z[0], min((u.shape for u in self._u), key=len)  # other shapes may only add ones at the end
        joined = self._inputs.joined and len(self._u) > 1  # several tensors hold consecutive features
        single = not joined and (shape[1:].numel() if len(shape) > 1 else shape.numel()) == 1
        output, out_axis, out_joined = self._output(path)
        failure = None
        for feature, kernel in [(None, ())] if single else _axis_choices(shape, joined, flat=True):
            axes = [out_axis] if kernel and z.ndim == 2 + len(kernel) and out_axis is not None else None
            pair = self._slope(path, feature, joined=joined), self._slope(path, None)
            features = 1 if feature is None else _size(shape, feature) * (len(self._u) if joined else 1)
            if feature is not None and not self._fits(pair, features):
                continue
            letters = "thw"[3 - len(kernel) :] if kernel else ""
            positions = {
                letter: [(self._slope(path, axis, axes), self._slope(path, None, axes))]
                for letter, axis in zip(letters, kernel, strict=True)
            }
            responses = Responses(output, [pair], positions)
            if region is not None:
                responses = responses.map(itemgetter(parse_slice(region)))
            probe = self._probe
            at = (probe.precision, probe.which, self._frontier, self._inputs, out_axis, out_joined, feature)
            place = Place(*at, self._finite, probe.trace)
            try:
                return find_layout(responses, self._tolerance, features), region, place
            except NoLayout as no_layout:
                part = None if no_layout.linear or region else find_part(responses, features, self._tolerance)
                if part is not None:
                    return *part, place
                flat = None if no_layout.linear or region else find_flattened(responses, features, self._tolerance)
                if flat is not None:
                    return flat, None, place
                failure = failure or no_layout
                if feature == FLAT:  # otherwise a row of the input could pass for functions of its columns
                    break
        raise failure or NoLayout("its entries cannot be told apart by input feature")

    def bears_out(self, specs: list[CoefficientSpec], place: Place) -> bool:
        """Whether the slope of some outputs along some inputs fits the layouts, and is zero for all other entries."""
        weights, t = self._weights(), self._directions()
        outputs = inputs = 1
        if place.output is not None:
            numbers = self._numbers(self._z, place.output, place.joined)
            weights, outputs = (
                _times(weights, [own > 2 for own in numbers], place.output),
                _count(numbers, place.joined),
            )
        if place.feature is not None:
            numbers = self._numbers(self._u, place.feature, self._inputs.joined)
            t, inputs = _times(t, [own > 2 for own in numbers], place.feature), _count(numbers, self._inputs.joined)
        slopes = self._slopes(t, weights, True)
        return all(
            bears_out(spec.layout, spec.part(slopes[spec.parameter]), inputs, outputs, self._tolerance)
            for spec in specs
        )

    def _output(self, path: str) -> tuple[Pair, int | None, bool]:
        """The numbered and the plain response, the output axis of z (None for a single output), and `joined`."""
        plain = self._response(path, None, True)
        shape = self._z[0].shape
        if all(size == 1 for size in shape[1:]) and (len(shape) > 1 or self._probe.x.ndim > 1):
            return (plain, plain), None, True
        for axis, _ in _axis_choices(shape, len(self._z) > 1):
            sizes = [z.shape[axis] for z in self._z if axis < z.ndim]
            for joined in (True, False) if len(self._z) > 1 and len({*sizes}) == 1 else (True,):
                pair = self._response(path, axis, joined), plain
                if self._fits(pair, sum(sizes) if joined else sizes[0]):
                    return pair, axis, joined
        raise NoOutputs("its entries cannot be told apart by output")

    def _fits(self, pair: Pair, count: int) -> bool:
        """Whether nearly all ratios are numbers of the numbered axis, so that it tells entries apart."""
        numbered, plain = (side.flatten() for side in pair)
        if plain.numel() > 2**17:  # a random part is enough
            self._probe.seed(4)
            some = self._probe.choice(plain.numel(), 2**16).to(plain.device)
            numbered, plain = numbered[some], plain[some]
        tolerance = self._tolerance
        known = plain.abs() > tolerance.zero * plain.abs().max()
        if not known.any():
            raise NoLayout(UNCHANGED)
        ratios = numbered[known] / plain[known]
        numbers = self._probe.numbers(count, ratios).sort().values
        place = torch.searchsorted(numbers, ratios).clamp(1, max(count - 1, 1))
        near = torch.stack([numbers[place - 1], numbers[place.clamp(max=count - 1)]])
        return ((near - ratios).abs().amin(0) <= 3 * tolerance.ratio).double().mean().item() > 0.98

    def _numbers(self, tensors: list[torch.Tensor], axis: int, joined: bool) -> list[torch.Tensor]:
        """Numbers for an axis of each tensor: all different if the tensors are `joined`, else the same in each."""
        sizes = [_size(t.shape, axis) for t in tensors]
        if joined:
            return list(self._probe.numbers(sum(sizes), tensors[0]).split(sizes))
        return [self._probe.numbers(sizes[0], tensors[0])] * len(tensors)

    def _response(self, path: str, axis: int | None, joined: bool) -> torch.Tensor:
        """g at x, where w has numbers along an axis of z."""
        key = ("output", axis, joined)
        if key not in self._gradients:
            weights = self._weights()
            if axis is not None:
                weights = _times(weights, self._numbers(self._z, axis, joined), axis)
            z = [self._probe.base.tensors[k] for k in self._frontier]
            self._gradients[key] = self._probe.gradients(z, weights, self._paths)
        return self._gradients[key][path]

    def _slope(self, path: str, axis: int | None, keep: list[int] | None = None, joined: bool = False) -> torch.Tensor:
        """∂g/∂u · t, where t has numbers along an axis of u. If `keep` is given, w is zero except at one position."""
        key = ("input", axis, keep is None, joined)
        if key not in self._gradients:
            weights, t = self._weights(), self._directions()
            if keep is not None:
                weights = [_middle(w, {0, *keep}) for w in weights]
            if axis is not None:
                t = _times(t, self._numbers(self._u, axis, joined), axis)
            self._gradients[key] = self._slopes(t, weights, keep is None)
        return self._gradients[key][path]

    def _slopes(self, t: list[torch.Tensor], weights: list[torch.Tensor], everywhere: bool) -> dict[str, torch.Tensor]:
        if self._finite:
            sides = []
            for run in self._probe.moved(t[0]):
                z = [run.tensors[k] for k in self._frontier]
                sides.append(self._probe.gradients(z, weights, self._paths))
            return {path: sides[0][path] - sides[1][path] for path in self._paths}
        if everywhere not in self._towards_u:
            self._towards_u[everywhere] = self._probe.input_gradient(self._inputs.numbers, self._frontier, weights)
        towards = self._towards_u[everywhere]
        moving = [k for k, gradient in enumerate(towards) if gradient.requires_grad]
        if not moving:
            raise NoLayout(UNCHANGED)
        return self._probe.gradients([towards[k] for k in moving], [t[k] for k in moving], self._paths)

    @property
    def _u(self) -> list[torch.Tensor]:
        return [self._probe.base.tensors[k].detach() for k in self._inputs.numbers]

    def _directions(self) -> list[torch.Tensor]:
        """t for each u. If all u hold the same features, all t are the same."""
        found: list[torch.Tensor] = []
        for u in self._u:
            if not found or self._inputs.joined:
                self._probe.seed(2 + 10 * len(found))
                found.append(self._probe.uniform(u.shape, u).to(u.dtype))
            else:
                found.append(found[0].view(u.shape))
        return found

    def _weights(self) -> list[torch.Tensor]:
        self._probe.seed(3)
        weights = []
        for z in self._z:
            # A product of weights along each axis gives all outputs the same φ. 1 + 1j counts both parts of complex z.
            w = torch.full_like(z, 1 + 1j if z.is_complex() else 1)
            for k, size in enumerate(z.shape):
                w = w * _along(self._probe.uniform([size], z), k, z.ndim)
            weights.append(w)
        return weights


def _times(tensors: list[torch.Tensor], numbers: list[torch.Tensor], axis: int) -> list[torch.Tensor]:
    """Multiplies each tensor by its numbers along an axis."""
    return [
        t * (own.view(t.shape[1:]) if axis == FLAT else _along(own, axis, t.ndim))
        for t, own in zip(tensors, numbers, strict=True)
    ]


def _size(shape: torch.Size, axis: int) -> int:
    return shape[1:].numel() if axis == FLAT else shape[axis]


def _count(numbers: list[torch.Tensor], joined: bool) -> int:
    """How many numbers lie above 2, the middle of their range."""
    return sum(int((own > 2).sum()) for own in (numbers if joined else numbers[:1]))


def _middle(tensor: torch.Tensor, keep: set[int]) -> torch.Tensor:
    """The tensor, with zeros except in the middle of each axis that is not in `keep`."""
    for axis in set(range(tensor.ndim)) - keep:
        index = torch.arange(tensor.shape[axis], device=tensor.device) == tensor.shape[axis] // 2
        tensor = tensor * _along(index, axis, tensor.ndim)
    return tensor


def _along(vector: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """The vector, reshaped to lie along `axis` of a tensor with `ndim` axes."""
    return vector.view([-1] + [1] * (ndim - 1 - axis))


def _axis_choices(
    shape: torch.Size, joined: bool = False, flat: bool = False
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Possible (feature axis, position axes) of a tensor, the likeliest first. The first axis is the batch.

    If `joined`, there are several tensors, and the second axis may hold features even if its size is 1. If `flat`,
    the feature axis may be `FLAT`, because the layer may flatten its input.
    """
    axes = [axis for axis in range(1, len(shape)) if shape[axis] > 1 or (joined and axis == 1)]
    if flat and len(axes) > 1 and not joined:
        yield FLAT, ()
    if len(shape) < 2 or not axes:
        yield 0, ()
    elif len(axes) < 3:
        yield axes[-1], ()
        if len(axes) == 2:
            yield axes[0], (axes[1],)
        if shape[1] == 1 and not joined:  # an image with one channel
            yield 1, tuple(axes)
    else:
        yield axes[0], tuple(axes[1:])
        yield axes[-1], ()
        yield from ((axis, ()) for axis in axes[1:-1])
        if shape[1] == 1 and not joined:
            yield 1, tuple(axes)
