"""The response test finds out whether a parameter P of a layer is a KAN coefficient tensor, and in which layout.

It runs the layer a few times and computes derivatives with respect to P:

    g = ∂/∂P Σ w_o z_o,    z_o = Σ_i Σ_d P[i, o, d] · s_io · φ_d(u_i)

z are the last tensors on the way to the output that are affine in P, so a norm or an activation after them does not
matter. u is the last tensor before the basis, so a norm before it does not matter. Numbers in w along an axis of z
show to which output an entry of P belongs. Numbers in t along an axis of u show which input feature the entry
multiplies: t is the direction of the slope of g, ∂/∂P Σ t · ∂/∂u Σ w_o z_o.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..coefficients import CoefficientSpec, Layout
from ..coefficients.spec import owner_of, parts_of, tensor_at
from .contraction import Contraction
from .layouts import PRECISIONS, UNMIXED, NoOutputs, Precision, Refused
from .probe import VECTOR, Probe, Test, Unusable
from .recording import Call, Passes, is_numeric, tensors_in


class Place(NamedTuple):
    """Where in a run of a layer the response of a parameter was measured."""

    frontier: tuple[int, ...]  # the numbers of z among the recorded tensors
    inputs: tuple[int, ...]  # those of u


class Steps(NamedTuple):
    """What a probe of a layer recorded. A layer that is alike takes the same steps."""

    precision: Precision
    which: int  # that of the probe, as the precision
    trace: tuple


@dataclass(frozen=True)
class Finding:
    """The result of the response test for one parameter of a layer."""

    spec: CoefficientSpec | None = None  # the description of the coefficient tensor, if the parameter is one
    reason: str = ""  # why the parameter is not a coefficient tensor
    # Whether the parameter is a linear weight on the layer's input. It may still be the coefficient tensor of a module
    # around the layer, if that feeds the layer basis functions.
    linear: bool = False
    one_function: bool = False  # whether the parameter multiplies one function of each input
    of_class: bool = False  # whether the reason holds for all layers alike, for any sample and parameter values
    steps: Steps | None = field(default=None, repr=False)  # of the layer, if the parameter is a coefficient tensor
    like: str | None = None  # the tested layer, if this layer only confirmed its finding


def infer_layer(
    layer: nn.Module, call: Call, paths: Iterable[str], passes: Passes, region: str | None = None
) -> dict[str, Finding]:
    """A finding for each parameter of `layer` in `paths`, or for its slice `region`.

    The layer runs on the arguments `call`, and stays as it was; `passes` counts the runs. If the layer raises an
    error, the findings have it as their reason.
    """
    tensors = tensors_in(call)
    widest = max((size for t in tensors for size in t.shape), default=1)
    inputs = sum(map(is_numeric, tensors))
    reason = ""
    if any(isinstance(module, torch.jit.ScriptModule) for module in layer.modules()):
        reason = "a part of its layer is a TorchScript module"
    elif not inputs:
        empty = any(t.is_floating_point() for t in tensors)
        reason = f"its layer receives {'only empty tensors on this sample' if empty else 'no floating-point tensor'}"
    reasons = {path: reason or _unfit(layer.get_parameter(path), widest) for path in paths}
    findings = {path: Finding(reason=reason, of_class=True) for path, reason in reasons.items()}
    open_paths = [path for path, reason in reasons.items() if not reason]
    for precision in PRECISIONS:
        try:
            for which in range(min(inputs, 4)):
                if open_paths:
                    found = _test(Probe(layer, call, precision, which, passes), open_paths, region)
                    findings |= {path: finding for path, finding in found.items() if which == 0 or finding.spec}
                    open_paths = [path for path in open_paths if findings[path].spec is None]
            return findings
        except Unusable as unusable:
            reason = str(unusable)
        except Exception as error:  # one unusual layer must not end the search in a large model
            reason = f"it cannot be tested: {type(error).__name__}: {error}"
            break
    return findings | {path: Finding(reason=reason) for path in open_paths}


def _unfit(parameter: nn.Parameter, widest: int) -> str:
    """Why the parameter needs no test, or "". `widest` is the size of the largest axis that the layer receives."""
    if parameter.is_complex():
        return f"it is complex ({parameter.dtype}), and LoTRA adapts real coefficients only"
    if not parameter.is_floating_point():
        return f"it has dtype {parameter.dtype}: no floating-point coefficients"
    if parameter.numel() < 4:
        return "it has fewer than four entries, too few for inputs, outputs and a basis"
    return VECTOR if parameter.dim() == 1 and parameter.numel() <= widest else ""


def _test(probe: Probe, paths: list[str], region: str | None) -> dict[str, Finding]:
    findings: dict[str, Finding] = {}
    own: dict[str, tuple[int, ...]] = {}
    places: dict[str, Place] = {}
    weights = []  # parameters that multiply functions of x
    steps = Steps(probe.precision, probe.which, probe.base.trace)
    for path in paths:
        try:
            own[path] = probe.contractions(path)
        except Refused as refused:
            findings[path] = Finding(reason=str(refused), of_class=refused.of_class)
    contraction = cache(partial(Contraction, probe))
    for members, z in probe.groups(own):
        for path in members:
            alone: list[Test] = [((path,), own[path])] if len(members) > 1 else []
            try:
                layout, places[path] = _layout(probe, path, [(members, z), *alone], region, contraction)
                scale, scale_layout = (None, None) if region else probe.scale_of(path, places[path].frontier, layout)
                findings[path] = Finding(CoefficientSpec(path, layout, scale, scale_layout, region), steps=steps)
                weights.append(path)
            except Refused as refused:
                refused.with_traceback(None)
                linear, reason = refused.linear and probe.sees_x(path, z), str(refused)
                if refused.linear and (shaping := probe.shaping(path, z)):
                    reason = f"every input and output has one function, shaped by {shaping}: there are no functions "
                    reason += "that the outputs share (n_d = 1)"
                elif reason == UNMIXED and not {*z} & {*probe.base.outputs}:
                    reason += ": what follows is not linear, so that no sum over inputs is affine in it"
                findings[path] = Finding(None, reason, linear, refused.linear, refused.of_class)
                if refused.mixing:
                    weights.append(path)
    for path, place in places.items():  # what was found in the outer layers of a network is refused
        others = [other for other in weights if other not in (path, findings[path].spec.scale)]  # type: ignore[union-attr]
        if inside := [other for other in others if probe.in_basis(path, *place, other)]:
            reason = f"its functions of x contain the weights {inside}: it is the layer of a network behind them"
            findings[path] = Finding(reason=reason, of_class=True)
    return findings


def _layout(
    probe: Probe, path: str, tests: list[Test], region: str | None, contraction: Callable[..., Contraction]
) -> tuple[Layout, Place]:
    """The layout and place of a parameter in the first of the tests that shows them.

    Raises:
        Refused: why the parameter is not a coefficient tensor.
    """
    failure: Refused | None = None
    while tests:
        paths, frontier = tests.pop(0)
        for inputs in probe.inputs_of(paths, frontier):
            try:
                tested = contraction(paths, frontier, inputs)
                return tested.find(path, region), Place(frontier, tested.inputs.numbers)
            except Refused as refused:
                if refused.linear:
                    raise
                failure = failure or refused.with_traceback(None)  # its frames would keep tensors alive
                if isinstance(refused, NoOutputs):  # a linear operation after the contraction may mix the outputs
                    first = probe.first_contraction(path, frontier)
                    tests = [((path,), first)] if first != frontier else []
                    break
    assert failure is not None
    raise failure


class _Stack(nn.Module):
    """A layer in which several parameters are the rows of one, `stacked`."""

    def __init__(self, layer: nn.Module, path: str):
        super().__init__()
        self.layer, self.parts = layer, parts_of(layer, path)
        with torch.no_grad():
            self.stacked = nn.Parameter(tensor_at(layer, path))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        places = [owner_of(self.layer, part) for part in self.parts]
        try:
            for (owner, name), row in zip(places, self.stacked, strict=True):
                owner.__dict__[name] = row
            return self.layer(*args, **kwargs)
        finally:
            for owner, name in places:
                owner.__dict__.pop(name, None)


def stacks(layer: nn.Module, findings: Mapping[str, Finding]) -> dict[str, tuple[str, ...]]:
    """Names with a star for parameters of one shape that multiply one function of each input, and what they mean."""
    found = {}
    for path, finding in findings.items():
        for number in re.finditer("[0-9]+", path) if finding.one_function else ():
            name = f"{path[: number.start()]}*{path[number.end() :]}"
            parts = parts_of(layer, name)
            shapes = {layer.get_parameter(part).shape for part in parts}
            if len(parts) > 1 == len(shapes) and not any(findings[part].spec for part in parts if part in findings):
                found[name] = parts
    return found


def _of_stack(layer: nn.Module, call: Call, path: str, passes: Passes) -> Finding:
    """The finding for several parameters together, one for each basis function."""
    finding = infer_layer(_Stack(layer, path), call, ["stacked"], passes)["stacked"]
    spec = finding.spec
    if spec is None:
        return finding
    if spec.scale or spec.slice or spec.layout.flattened or not re.match(r"d\b", spec.layout.pattern):
        return Finding(
            reason=f"as a stack it is {spec.layout.pattern!r}, and not one basis function for each parameter"
        )
    return Finding(replace(spec, parameter=path, parts=parts_of(layer, path)))


@dataclass
class LayerTests:
    """The findings of the layers of one model. A layer that is like a tested one only confirms its findings."""

    _known: dict[type, list[tuple[Any, str, dict[str, Finding]]]] = field(default_factory=dict)

    def findings(
        self, name: str, layer: nn.Module, call: Call, paths: Iterable[str], passes: Passes, region: str | None = None
    ) -> dict[str, Finding]:
        """The findings of a tested layer that is like `layer`, if `layer` takes the same steps; else `infer_layer`'s.

        Findings without a coefficient tensor are reused only if their reasons hold for the whole class. A stack of
        parameters is tested in every layer.
        """
        paths = list(paths)
        stacked = {p: _of_stack(layer, call, p, passes) for p in paths if "*" in p and parts_of(layer, p)}
        paths = [path for path in paths if path not in stacked]
        if not paths:
            return stacked
        known = self._known.setdefault(type(layer), [])
        likeness = [_likeness(layer, call), paths, region]
        for other, of, findings in known:
            with suppress(ValueError, RuntimeError, TypeError):  # for example if an attribute is an array
                if other == likeness and _confirms(layer, call, findings, passes):
                    return stacked | {path: replace(finding, like=of) for path, finding in findings.items()}
        findings = infer_layer(layer, call, paths, passes, region)
        found = any(finding.spec for finding in findings.values())
        if found or all(finding.of_class for finding in findings.values()):
            known.append((likeness, name, findings))
        return stacked | findings


def _likeness(layer: nn.Module, call: Call) -> Any:
    """What is equal in layers that are alike: classes, attributes, shapes and dtypes, and the values of integers."""

    def kind(t: torch.Tensor) -> Any:
        values = None if t.is_floating_point() or t.is_complex() or t.is_meta else t.tolist()  # such as an order
        return t.shape, t.dtype, t.device, type(t), values

    modules = []
    for name, module in layer.named_modules():
        held = {key: value for key, value in vars(module).items() if key not in ("forward", "_modules")}
        modules.append((name, type(module), tree_map_only(torch.Tensor, kind, held)))
    return [modules, tree_map_only(torch.Tensor, lambda t: kind(t)[:-1], call)]


def _confirms(layer: nn.Module, call: Call, findings: Mapping[str, Finding], passes: Passes) -> bool:
    """Whether the layer takes the same steps as another one, with these findings: one pass for each input tested."""
    for steps in {finding.steps for finding in findings.values() if finding.steps is not None}:
        try:
            probe = Probe(layer, call, steps.precision, steps.which, passes, repeats=False)
        except Unusable:  # it is then tested itself
            return False
        if probe.base.trace != steps.trace:
            return False
    return True
