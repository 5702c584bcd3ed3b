"""The response test: is a parameter of a layer a KAN coefficient tensor, and in which layout?

The layer is run a few times, and derivatives of its output by the parameter are read off,

    g = ∂/∂P Σ w_o z_o,    z_o = Σ_i Σ_d P[i, o, d] · s_io · φ_d(u_i)

with z the last tensors on the way to the output that are affine in P, so that a norm or an activation after them does
not matter, and u the last tensor before the basis, so that a norm before it does not either. Numbers in w along an
axis of z show which output an entry of P belongs to. The slope of g when u moves along t, with numbers in t along an
axis of u, shows which input feature the entry multiplies: ∂/∂P Σ t · ∂/∂u Σ w_o z_o.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..coefficients import CoefficientSpec, Layout
from ..coefficients.spec import parse_slice
from .layouts import NoLayout, NoOutputs, Pair, Responses, find_layout, find_part
from .probe import FINITE_DIFFERENCES, PRECISIONS, Passes, Probe, Refused, Unusable
from .recording import tensors_in


@dataclass(frozen=True)
class Finding:
    """What the response test says about one parameter of a layer.

    Attributes:
        spec: where and how the coefficient tensor lies, if it is one.
        reason: why it is none.
        linear: whether it is a weight on what the layer receives, as it is; then it may still be the coefficient
            tensor of a module around the layer, which feeds it with a basis.
    """

    spec: CoefficientSpec | None = None
    reason: str = ""
    linear: bool = False


def infer_layer(
    layer: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    paths: Iterable[str],
    passes: Passes,
    region: str | None = None,
) -> dict[str, Finding]:
    """A finding for each parameter of `layer` in `paths`, or for the slice `region` of it.

    The layer is run on `args` and `kwargs`; `passes` counts how often.

    Nothing in `layer` changes. Nothing is raised for what the layer does: the findings have a reason instead.
    """
    findings = {path: Finding(reason=_unfit(layer.get_parameter(path))) for path in paths}
    open_paths = [path for path, finding in findings.items() if not finding.reason]
    if any(isinstance(module, torch.jit.ScriptModule) for module in layer.modules()):
        return {path: Finding(reason="a part of its layer is a TorchScript module") for path in findings}
    inputs = sum(t.is_floating_point() and t.numel() > 0 for t in tensors_in((args, kwargs)))
    if not inputs:
        return findings | {path: Finding(reason="its layer receives no floating-point tensor") for path in open_paths}
    reason = ""
    for precision in PRECISIONS:
        try:
            for which in range(min(inputs, 4)):
                if open_paths:
                    found = _test(Probe(layer, args, kwargs, precision, which, passes), open_paths, region)
                    findings |= {path: finding for path, finding in found.items() if which == 0 or finding.spec}
                    open_paths = [path for path in open_paths if findings[path].spec is None]
            return findings
        except Unusable as unusable:
            reason = str(unusable)
        except Exception as error:  # one odd layer shall not end the search in a large model
            reason = f"it cannot be tested: {type(error).__name__}: {error}"
    return findings | {path: Finding(reason=reason) for path in open_paths}


def _unfit(parameter: nn.Parameter) -> str:
    if parameter.is_complex():
        return f"it is complex ({parameter.dtype}), and LoTRA adapts real coefficients only"
    if not parameter.is_floating_point():
        return f"it has dtype {parameter.dtype}: no floating-point coefficients"
    return "it has fewer than four entries" if parameter.numel() < 4 else ""


def _test(probe: Probe, paths: list[str], region: str | None) -> dict[str, Finding]:
    results: dict[str, Finding] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    weights = []  # parameters that multiply functions of x
    found: dict[str, tuple[CoefficientSpec, tuple[int, ...], int]] = {}  # with z and u
    for path in paths:
        try:
            tensors[path] = probe.contractions(path)
        except Refused as refused:
            results[path] = Finding(reason=str(refused))
    for members, z, u in probe.groups(tensors):
        group = _Contraction(probe, z, u, members)
        for path in members:
            place = z, u
            try:
                try:
                    layout, part = group.find(path, region)
                except NoOutputs:  # something linear comes after the contraction, and mixes the outputs
                    place = probe.first_contraction(path, z)
                    layout, part = _Contraction(probe, *place, [path]).find(path, region)
                scale, scale_layout = (None, None) if part else probe.scale(path, place[0], layout)
                spec = CoefficientSpec(path, layout, scale, scale_layout, part)
                results[path] = Finding(spec)
                weights.append(path)
                found[path] = (spec, *place)
            except Refused as refused:
                results[path] = Finding(reason=str(refused))
            except NoLayout as failure:
                results[path] = Finding(reason=str(failure), linear=failure.linear and probe.sees_x(path, z))
                if failure.mixing:
                    weights.append(path)
    for path, (spec, z, u) in found.items():
        others = [other for other in weights if other not in (path, spec.scale)]
        inside = [other for other in others if probe.in_basis(path, z, u, other)]
        if inside:
            reason = f"its functions of x contain the weights {inside}: it is the layer of a network behind them"
            results[path] = Finding(reason=reason)
    return results


class _Contraction:
    """The responses of the parameters that share z and u."""

    def __init__(self, probe: Probe, frontier: tuple[int, ...], u: int, paths: list[str]):
        self._probe, self._frontier, self._u, self._paths = probe, frontier, u, paths
        self._towards_u: dict[bool, torch.Tensor] = {}
        self._gradients: dict[tuple, dict[str, torch.Tensor]] = {}
        self._z = [probe.base.tensors[k].detach() for k in frontier]
        self._tolerance, self._finite = probe.precision.tolerance, False
        with suppress(NoLayout):
            try:
                self._slope(paths[0], None)
            except RuntimeError:  # such as a function without a second derivative, or tensors changed in place
                self._gradients.clear()
                self._u, self._tolerance, self._finite = 0, FINITE_DIFFERENCES, True

    def find(self, path: str, region: str | None) -> tuple[Layout, str | None]:
        """The layout of the parameter, and the slice of it that is the coefficient tensor unless it is the whole.

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
            try:
                return find_layout(responses, self._tolerance, features), region
            except NoLayout as no_layout:
                part = None if no_layout.linear or region else find_part(responses, features, self._tolerance)
                if part is not None:
                    return part
                failure = failure or no_layout
        raise failure or NoLayout("its entries cannot be told apart by input feature")

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
                t = t * self._probe.numbers(t.shape[axis], t).view([-1] + [1] * (t.ndim - 1 - axis))
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
                w = w * self._probe.uniform([size], z).view([-1] + [1] * (z.ndim - 1 - k))
            if axis is not None and numbers is not None:
                own = numbers[start : start + z.shape[axis]]
                w = w * own.view([-1] + [1] * (z.ndim - 1 - axis))
                start += z.shape[axis]
            weights.append(w)
        return weights


def _middle(tensor: torch.Tensor, keep: set[int]) -> torch.Tensor:
    """The tensor, but zero off the middle of each axis that is not kept."""
    for axis in set(range(tensor.ndim)) - keep:
        index = torch.arange(tensor.shape[axis], device=tensor.device) == tensor.shape[axis] // 2
        tensor = tensor * index.view([-1] + [1] * (tensor.ndim - 1 - axis))
    return tensor


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
