"""The derivatives that are read off one contraction of a layer, and the layout that they show; see `response`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter

import torch

from ..coefficients import CoefficientSpec, Layout
from ..coefficients.spec import parse_slice
from .layouts import NoLayout, NoOutputs, Pair, Responses, bears_out, find_layout, find_part
from .probe import FINITE_DIFFERENCES, Precision, Probe


@dataclass(frozen=True)
class Place:
    """Where in the run of a layer its response was read off: enough to ask a layer like it again.

    Attributes:
        precision, which: of the probe.
        frontier, u: the numbers of z and u among the recorded tensors.
        output, feature: the axis of z that is that of the outputs, and the axis of u that is that of the features.
        finite: whether slopes are differences, for want of second derivatives.
        trace: all recorded tensors, as `Probe.trace` says.
    """

    precision: Precision
    which: int
    frontier: tuple[int, ...]
    u: int
    output: int | None
    feature: int | None
    finite: bool
    trace: tuple = field(repr=False)


class Contraction:
    """The responses of the parameters that share z and u."""

    def __init__(self, probe: Probe, frontier: tuple[int, ...], u: int, paths: list[str], finite: bool | None = None):
        """`finite`: whether slopes are differences; None finds out."""
        self._probe, self._frontier, self._u, self._paths = probe, frontier, u, paths
        self._towards_u: dict[bool, torch.Tensor] = {}
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
            except RuntimeError:  # such as a function without a second derivative, or tensors changed in place
                self._gradients.clear()
                self._u, self._tolerance, self._finite = 0, FINITE_DIFFERENCES, True

    def find(self, path: str, region: str | None) -> tuple[Layout, str | None, Place]:
        """The layout of the parameter, the slice of it that is the coefficient tensor (None: all), and the place.

        With `region`, this slice is taken.

        Raises:
            NoLayout: if it is no coefficient tensor.
        """
        z, u = self._z[0], self._inner
        single = u[0].numel() == 1 if u.ndim > 1 else u.numel() == 1
        output, out_axis = self._output(path)
        failure = None
        for feature, kernel in [(None, ())] if single else _axis_choices(u.shape):
            axes = [out_axis] if kernel and z.ndim == 2 + len(kernel) and out_axis is not None else None
            pair = self._slope(path, feature), self._slope(path, None)
            if feature is not None and not self._fits(pair, u.shape[feature]):
                continue
            letters = "thw"[3 - len(kernel) :] if kernel else ""
            positions = {
                letter: [(self._slope(path, axis, axes), self._slope(path, None, axes))]
                for letter, axis in zip(letters, kernel, strict=True)
            }
            features = 1 if feature is None else u.shape[feature]
            responses = Responses(output, [pair], positions, single, out_axis is None)
            if region is not None:
                responses = responses.map(itemgetter(parse_slice(region)))
            probe = self._probe
            place = (probe.precision, probe.which, self._frontier, self._u, out_axis, feature, self._finite)
            try:
                return find_layout(responses, self._tolerance, features), region, Place(*place, probe.trace)
            except NoLayout as no_layout:
                part = None if no_layout.linear or region else find_part(responses, features, self._tolerance)
                if part is not None:
                    return *part, Place(*place, probe.trace)
                failure = failure or no_layout
        raise failure or NoLayout("its entries cannot be told apart by input feature")

    def bears_out(self, specs: list[CoefficientSpec], place: Place) -> bool:
        """Whether the slope of some outputs, when some inputs move, is zero for the entries of the others."""
        numbers, tolerance, u = self._probe.numbers, self._tolerance, self._inner
        outputs, inputs = 1, 1
        weights = self._weights(None, None)
        if place.output is not None:
            chosen = numbers(sum(z.shape[place.output] for z in self._z), self._z[0]) > 2
            weights, outputs = self._weights(place.output, chosen), int(chosen.sum())
        self._probe.seed(2)
        t = self._probe.uniform(u.shape, u)
        if place.feature is not None:
            chosen = numbers(u.shape[place.feature], u) > 2
            t, inputs = t * _along(chosen, place.feature, t.ndim), int(chosen.sum())
        slopes = self._slopes(t, weights, True)
        return all(
            bears_out(spec.layout, spec.part(slopes[spec.parameter]), inputs, outputs, tolerance) for spec in specs
        )

    def _output(self, path: str) -> tuple[Pair, int | None]:
        """The numbered and the plain response, and the axis of z that is numbered: that of the outputs, if any."""
        plain = self._response(path, None)
        shape = self._z[0].shape
        if all(size == 1 for size in shape[1:]) and (len(shape) > 1 or self._probe.x.ndim > 1):
            return (plain, plain), None
        for axis, _ in _axis_choices(shape):
            pair = self._response(path, axis), plain
            if self._fits(pair, sum(z.shape[axis] for z in self._z if axis < z.ndim)):
                return pair, axis
        raise NoOutputs("its entries cannot be told apart by output")

    def _fits(self, pair: Pair, count: int) -> bool:
        """Whether nearly all ratios are numbers of the axis, so that it is one of features."""
        numbered, plain = (side.flatten() for side in pair)
        if plain.numel() > 2**17:  # a part of them will do
            self._probe.seed(4)
            some = self._probe.choice(plain.numel(), 2**16).to(plain.device)
            numbered, plain = numbered[some], plain[some]
        tolerance = self._tolerance
        known = plain.abs() > tolerance.zero * plain.abs().max()
        if not known.any():
            raise NoLayout("its response does not change with the input")
        ratios = numbered[known] / plain[known]
        numbers = self._probe.numbers(count, ratios).sort().values
        place = torch.searchsorted(numbers, ratios).clamp(1, max(count - 1, 1))
        near = torch.stack([numbers[place - 1], numbers[place.clamp(max=count - 1)]])
        return ((near - ratios).abs().amin(0) <= 3 * tolerance.ratio).double().mean().item() > 0.98

    def _response(self, path: str, axis: int | None) -> torch.Tensor:
        """g at x, with numbers in w along an axis of z."""
        key = ("output", axis)
        if key not in self._gradients:
            numbers = None if axis is None else self._probe.numbers(sum(z.shape[axis] for z in self._z), self._z[0])
            z = [self._probe.base.tensors[k] for k in self._frontier]
            self._gradients[key] = self._probe.gradients(z, self._weights(axis, numbers), self._paths)
        return self._gradients[key][path]

    def _slope(self, path: str, axis: int | None, keep: list[int] | None = None) -> torch.Tensor:
        """∂g/∂u · t with numbers in t along an axis of u; with `keep`, of one position of z."""
        key = ("input", axis, keep is None)
        if key not in self._gradients:
            weights = self._weights(None, None)
            if keep is not None:
                weights = [_middle(w, {0, *keep}) for w in weights]
            self._probe.seed(2)
            t = self._probe.uniform(self._inner.shape, self._inner)
            if axis is not None:
                t = t * _along(self._probe.numbers(t.shape[axis], t), axis, t.ndim)
            self._gradients[key] = self._slopes(t, weights, keep is None)
        return self._gradients[key][path]

    def _slopes(self, t: torch.Tensor, weights: list[torch.Tensor], everywhere: bool) -> dict[str, torch.Tensor]:
        if self._finite:
            sides = []
            for run in self._probe.moved(t):
                z = [run.tensors[k] for k in self._frontier]
                sides.append(self._probe.gradients(z, weights, self._paths))
            return {path: sides[0][path] - sides[1][path] for path in self._paths}
        if everywhere not in self._towards_u:
            self._towards_u[everywhere] = self._probe.input_gradient(self._u, self._frontier, weights)
        if not self._towards_u[everywhere].requires_grad:
            raise NoLayout("its response does not change with the input")
        return self._probe.gradients([self._towards_u[everywhere]], [t], self._paths)

    @property
    def _inner(self) -> torch.Tensor:
        """u."""
        return self._probe.base.tensors[self._u].detach()

    def _weights(self, axis: int | None, numbers: torch.Tensor | None) -> list[torch.Tensor]:
        self._probe.seed(3)
        weights, start = [], 0
        for z in self._z:
            w = torch.ones_like(z)  # a product of weights along each axis, so that all outputs see the same φ
            for k, size in enumerate(z.shape):
                w = w * _along(self._probe.uniform([size], z), k, z.ndim)
            if axis is not None and numbers is not None:
                own = numbers[start : start + z.shape[axis]]
                w = w * _along(own, axis, z.ndim)
                start += z.shape[axis]
            weights.append(w)
        return weights


def _middle(tensor: torch.Tensor, keep: set[int]) -> torch.Tensor:
    """The tensor, but zero off the middle of each axis that is not kept."""
    for axis in set(range(tensor.ndim)) - keep:
        index = torch.arange(tensor.shape[axis], device=tensor.device) == tensor.shape[axis] // 2
        tensor = tensor * _along(index, axis, tensor.ndim)
    return tensor


def _along(vector: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """The vector along one of so many axes."""
    return vector.view([-1] + [1] * (ndim - 1 - axis))


def _axis_choices(shape: torch.Size) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(axis of the features, axes of positions) of a tensor, the likeliest first; the batch has the first axis."""
    axes = [axis for axis in range(1, len(shape)) if shape[axis] > 1]
    if len(shape) < 2 or not axes:
        yield 0, ()
    elif len(axes) < 3:
        yield axes[-1], ()
        if len(axes) == 2:
            yield axes[0], (axes[1],)
    else:
        yield axes[0], tuple(axes[1:])
        yield axes[-1], ()
        yield from ((axis, ()) for axis in axes[1:-1])
