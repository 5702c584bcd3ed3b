"""Computes the derivatives of one contraction of a layer, and finds the layout that they show; see `response`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

import torch

from ..coefficients import Layout
from ..coefficients.spec import parse_slice
from .layouts import (
    FINITE_DIFFERENCES,
    ONE_FUNCTION,
    UNCHANGED,
    NoOutputs,
    Pair,
    Refused,
    Responses,
    find_layout,
    functions_differ,
    mapped,
)
from .probe import Inputs, Probe, Underivable, uniform

FLAT = -1  # in place of the feature axis: all axes except the first are flattened


class Contraction:
    """The responses of parameters that share z and u."""

    def __init__(self, probe: Probe, paths: tuple[str, ...], frontier: tuple[int, ...], inputs: Inputs):
        self._probe, self._paths, self._frontier = probe, paths, frontier
        self._z = [probe.base.tensors[k].detach() for k in frontier]
        self._gradients: dict[tuple, dict[str, torch.Tensor]] = {}
        self._towards_u: dict[bool | None, tuple[torch.Tensor, ...]] = {}
        self._set(inputs, finite=False)

    def _set(self, inputs: Inputs, finite: bool) -> None:
        """`finite` says whether slopes are finite differences."""
        self.inputs, self._finite = inputs, finite
        self._precision = FINITE_DIFFERENCES if finite else self._probe.precision
        self._u = [self._probe.base.tensors[k].detach() for k in inputs.numbers]

    def find(self, path: str, region: str | None) -> Layout:
        """The layout of the coefficient tensor, the parameter or its slice `region`. Raises Refused if it is none."""
        try:
            return self._find(path, region)
        except Underivable:  # a function has no second derivative, or a tensor was changed in place
            if self._finite:
                raise
            self._set(Inputs((0,)), finite=True)
            return self._find(path, region)

    def _find(self, path: str, region: str | None) -> Layout:
        shape = min((u.shape for u in self._u), key=len)  # other shapes may only add ones at the end
        joined = self.inputs.joined and len(self._u) > 1  # several tensors hold consecutive features
        single = not joined and (shape[1:] if len(shape) > 1 else shape).numel() == 1
        output, out_axis = self._output(path)
        failure = None
        for feature, kernel in [(None, ())] if single else _axis_choices(shape, joined, flat=True):
            pair = self._slope(path, feature, joined=joined), self._slope(path)
            features = 1 if feature is None else _size(shape, feature) * (len(self._u) if joined else 1)
            if feature is not None and not self._fits(pair, features):
                continue
            responses: Responses = {"o": output, "i": pair, **self._positions(path, kernel, out_axis)}
            if region is not None:
                responses = mapped(responses, itemgetter(parse_slice(region)))
            try:
                layout = find_layout(responses, features, self._precision, star=region is None)
                if not self._functions_differ(path, layout, region, features):
                    raise Refused(ONE_FUNCTION, linear=True, mixing=True)
            except Refused as refused:
                failure = failure or refused.with_traceback(None)  # its frames would keep tensors alive
                if feature == FLAT:  # otherwise a row of the input could pass for functions of its columns
                    break
                continue
            return layout
        raise failure or Refused("its entries cannot be told apart by input feature")

    def _functions_differ(self, path: str, layout: Layout, part: str | None, features: int) -> bool:
        """Whether an input has several functions. One sample cannot show it, and is believed."""
        if sum(u.numel() for u in self._u) <= features:
            return True
        slopes = []
        for k in range(2):
            key = ("noise", k, self._finite)
            if key not in self._gradients:
                random = [torch.randn(u.shape, generator=_seeded(20 + k), dtype=torch.float64) for u in self._u]
                t = [own.to(u) for own, u in zip(random, self._u, strict=True)]
                # All entries of z count alike: x_i at several places of the output would seem to be several functions.
                weights = [torch.full_like(z, 1 + 1j if z.is_complex() else 1) for z in self._z]
                self._gradients[key] = self._slopes(t, weights, None)
            slopes.append(self._gradients[key][path])
        return functions_differ(layout, [s[parse_slice(part)] if part else s for s in slopes], self._precision)

    def _output(self, path: str) -> tuple[Pair, int | None]:
        """The numbered and the plain response, and the output axis of z; None for a single output."""
        plain = self._response(path)
        shape = self._z[0].shape
        if all(size == 1 for size in shape[1:]) and (len(shape) > 1 or self._probe.x.ndim > 1):
            return (plain, plain), None
        for axis, _ in _axis_choices(shape, len(self._z) > 1):
            sizes = [z.shape[axis] for z in self._z if axis < z.ndim]
            for joined in (True, False) if len(self._z) > 1 and len({*sizes}) == 1 else (True,):
                pair = self._response(path, axis, joined), plain
                if self._fits(pair, sum(sizes) if joined else sizes[0]):
                    return pair, axis
        raise NoOutputs("its entries cannot be told apart by output")

    def _positions(self, path: str, kernel: Sequence[int], out_axis: int | None) -> Responses:
        """The responses of one position of the output, with numbers along each position axis of the input."""
        axes = [out_axis] if kernel and self._z[0].ndim == 2 + len(kernel) and out_axis is not None else None
        letters = "thw"[3 - len(kernel) :]
        return {
            letter: (self._slope(path, axis, axes), self._slope(path, None, axes))
            for letter, axis in zip(letters, kernel, strict=True)
        }

    def _fits(self, pair: Pair, count: int) -> bool:
        """Whether nearly all ratios are numbers of the numbered axis, so that it tells entries apart."""
        numbered, plain = (side.flatten() for side in pair)
        if plain.numel() > 2**17:  # a random part is enough, and takes less memory
            some = torch.randint(plain.numel(), (2**16,), generator=_seeded(4)).to(plain.device)
            numbered, plain = numbered[some], plain[some]
        known = plain.abs() > self._precision.zero * plain.abs().max()
        if not known.any():
            raise Refused(UNCHANGED)
        ratios = numbered[known] / plain[known]
        steps = max(count - 1, 1)
        nearest = 1 + 2 * ((ratios - 1) / 2 * steps).round().clamp(0, count - 1) / steps
        return ((nearest - ratios).abs() <= 3 * self._precision.ratio).double().mean().item() > 0.98

    def _response(self, path: str, axis: int | None = None, joined: bool = True) -> torch.Tensor:
        """g at x, where w has numbers along an axis of z."""
        key = ("output", axis, joined or axis is None)
        if key not in self._gradients:
            weights = _times(self._weights(), _numbers(self._z, axis, joined))
            z = [self._probe.base.tensors[k] for k in self._frontier]
            self._gradients[key] = self._by_path(z, weights)
        return self._gradients[key][path]

    def _slope(
        self, path: str, axis: int | None = None, keep: list[int] | None = None, joined: bool = False
    ) -> torch.Tensor:
        """∂g/∂u · t, where t has numbers along an axis of u. If `keep` is given, w is zero except at one position."""
        key = ("input", axis, keep is None, joined, self._finite)
        if key not in self._gradients:
            weights = self._weights()
            if keep is not None:
                weights = [_middle(w, {0, *keep}) for w in weights]
            t = _times(self._directions(), _numbers(self._u, axis, joined))
            self._gradients[key] = self._slopes(t, weights, keep is None)
        return self._gradients[key][path]

    def _slopes(
        self, t: list[torch.Tensor], weights: list[torch.Tensor], kind: bool | None
    ) -> dict[str, torch.Tensor]:
        """∂g/∂u · t by path; the weights of one `kind` have to be the same."""
        if self._finite:
            plus, minus = (
                self._by_path([run.tensors[k] for k in self._frontier], weights) for run in self._probe.moved(t[0])
            )
            return {path: plus[path] - minus[path] for path in self._paths}
        run = self._probe.base
        if kind not in self._towards_u:
            z = [run.tensors[k] for k in self._frontier]
            u = [run.x if k == 0 else run.tensors[k] for k in self.inputs.numbers]
            self._towards_u[kind] = self._probe.gradient(z, u, weights, again=True)
        moving = [(g, own) for g, own in zip(self._towards_u[kind], t, strict=True) if g.requires_grad]
        if not moving:
            raise Refused(UNCHANGED)
        return self._by_path(*zip(*moving, strict=True))

    def _by_path(self, tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """∂/∂P Σ weights · tensors for each parameter P."""
        values = [self._probe.values[path] for path in self._paths]
        return dict(zip(self._paths, self._probe.gradient(tensors, values, weights), strict=True))

    def _directions(self) -> list[torch.Tensor]:
        """t for each u. If all u hold the same features, all t are the same."""
        seeds = [2 + 10 * k if self.inputs.joined else 2 for k in range(len(self._u))]
        return [uniform(u.shape, u, _seeded(seed)).to(u.dtype) for seed, u in zip(seeds, self._u, strict=True)]

    def _weights(self) -> list[torch.Tensor]:
        random = _seeded(3)
        weights = []
        for z in self._z:
            # A product of weights along each axis gives all outputs the same φ. 1 + 1j counts both parts of complex z.
            w = torch.full_like(z, 1 + 1j if z.is_complex() else 1)
            for k, size in enumerate(z.shape):
                w = w * _along(uniform([size], z, random), k, z.ndim)
            weights.append(w)
        return weights


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _numbers(tensors: list[torch.Tensor], axis: int | None, joined: bool) -> list[torch.Tensor]:
    """Numbers from 1 to 3 along an axis of each tensor, evenly spaced, in random order; ones if the axis is None.

    All are different if the tensors are `joined`; otherwise they are the same in each tensor.
    """
    if axis is None:
        return [t.new_ones(()) for t in tensors]
    sizes = [_size(t.shape, axis) for t in tensors]
    count = sum(sizes) if joined else sizes[0]
    order = torch.randperm(count, generator=_seeded(1)).to(tensors[0].device, tensors[0].real.dtype)
    numbers = 1 + 2 * order / max(count - 1, 1)
    each = numbers.split(sizes) if joined else [numbers] * len(tensors)
    return [
        own.view(t.shape[1:]) if axis == FLAT else _along(own, axis, t.ndim)
        for t, own in zip(tensors, each, strict=True)
    ]


def _times(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t * other for t, other in zip(tensors, others, strict=True)]


def _size(shape: torch.Size, axis: int) -> int:
    return shape[1:].numel() if axis == FLAT else shape[axis]


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
    if not axes:
        yield 0, ()
        return
    if flat and len(axes) > 1 and not joined:
        yield FLAT, ()
    last, *middle = ((axis, ()) for axis in (axes[-1], *axes[1:-1]))
    first = [(axes[0], tuple(axes[1:]) if len(axes) < 5 else ())] if len(axes) > 1 else []
    yield from [last, *first] if len(axes) < 3 else [*first, last, *middle]
    if shape[1] == 1 and not joined and len(axes) < 4:  # an image with one channel
        yield 1, tuple(axes)
