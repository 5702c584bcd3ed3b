"""The response test: is a parameter of a layer a KAN coefficient tensor, and in which layout?

The layer is run a few times, and derivatives of its output by the parameter are read off,

    g = ∂/∂P Σ w_o z_o,    z_o = Σ_i Σ_d P[i, o, d] · s_io · φ_d(u_i)

with z the last tensors on the way to the output that are affine in P, so that a norm or an activation after them does
not matter, and u the last tensor before the basis, so that a norm before it does not either. Numbers in w along an
axis of z show which output an entry of P belongs to. The slope of g when u moves along t, with numbers in t along an
axis of u, shows which input feature the entry multiplies: ∂/∂P Σ t · ∂/∂u Σ w_o z_o.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..coefficients import CoefficientSpec, Layout
from .contraction import Contraction, Place
from .layouts import UNMIXED, NoLayout, NoOutputs
from .precision import PRECISIONS, Passes, Precision
from .probe import VECTOR, Probe, Refused, Unusable, is_numeric
from .recording import tensors_in
from .scales import scale_of


@dataclass(frozen=True)
class Finding:
    """What the response test says about one parameter of a layer.

    Attributes:
        spec: where and how the coefficient tensor lies, if it is one.
        reason: why it is none.
        linear: whether it is a weight on what the layer receives, as it is; then it may still be the coefficient
            tensor of a module around the layer, which feeds it with a basis.
        of_class: whether the reason holds for every layer alike, whatever the sample and the values of parameters.
        place: where in a run the response was read off, if it is a coefficient tensor.
        like: the name of the layer alike in which it was found, if this one has only confirmed it.
    """

    spec: CoefficientSpec | None = None
    reason: str = ""
    linear: bool = False
    of_class: bool = False
    place: Place | None = field(default=None, repr=False)
    like: str | None = None


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
    if any(isinstance(module, torch.jit.ScriptModule) for module in layer.modules()):
        return dict.fromkeys(paths, Finding(reason="a part of its layer is a TorchScript module", of_class=True))
    tensors = tensors_in((args, kwargs))
    widest = max((size for t in tensors for size in t.shape), default=1)
    findings = {path: Finding(reason=_unfit(layer.get_parameter(path), widest), of_class=True) for path in paths}
    open_paths = [path for path, finding in findings.items() if not finding.reason]
    inputs = sum(map(is_numeric, tensors))
    if not inputs:
        empty = any(t.is_floating_point() for t in tensors)
        what = "only empty tensors on this sample" if empty else "no floating-point tensor"
        refusal = Finding(reason=f"its layer receives {what}", of_class=True)
        return findings | dict.fromkeys(open_paths, refusal)
    if not open_paths:
        return findings
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


def _unfit(parameter: nn.Parameter, widest: int) -> str:
    """Why the parameter needs no test, `widest` being the largest axis that the layer receives."""
    if parameter.is_complex():
        return f"it is complex ({parameter.dtype}), and LoTRA adapts real coefficients only"
    if not parameter.is_floating_point():
        return f"it has dtype {parameter.dtype}: no floating-point coefficients"
    if parameter.numel() < 4:
        return "it has fewer than four entries, too few for inputs, outputs and a basis"
    return VECTOR if parameter.dim() == 1 and parameter.numel() <= widest else ""


def _test(probe: Probe, paths: list[str], region: str | None) -> dict[str, Finding]:
    results: dict[str, Finding] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    weights = []  # parameters that multiply functions of x
    found: dict[str, tuple[CoefficientSpec, Place]] = {}
    for path in paths:
        try:
            tensors[path] = probe.contractions(path)
        except Refused as refused:
            results[path] = Finding(reason=str(refused), of_class=refused.of_class)
    contractions: dict[tuple, Contraction] = {}
    for members, z in probe.groups(tensors):
        for path in members:
            try:
                layout, part, place = _layout(probe, path, members, z, tensors[path], region, contractions)
                scale, scale_layout = (None, None) if part else scale_of(probe, path, place.frontier, layout)
                spec = CoefficientSpec(path, layout, scale, scale_layout, part)
                results[path] = Finding(spec, place=place)
                weights.append(path)
                found[path] = spec, place
            except Refused as refused:
                results[path] = Finding(reason=str(refused))
            except NoLayout as failure:
                linear = failure.linear and probe.sees_x(path, z)
                reason = _reason(failure, probe, path, z)
                results[path] = Finding(reason=reason, linear=linear, of_class=failure.linear)
                if failure.mixing:
                    weights.append(path)
    for path, (spec, place) in found.items():
        others = [other for other in weights if other not in (path, spec.scale)]
        inside = [other for other in others if probe.in_basis(path, place.frontier, place.inputs.numbers, other)]
        if inside:
            reason = f"its functions of x contain the weights {inside}: it is the layer of a network behind them"
            results[path] = Finding(reason=reason, of_class=True)
    return results


def _reason(failure: NoLayout, probe: Probe, path: str, z: tuple[int, ...]) -> str:
    """The cause behind a failure, where the layer shows it."""
    if failure.linear and (shaping := probe.shaping(path, z)):
        return (
            f"every input and output has one function, shaped by {shaping}: there are no functions that the outputs "
            "share (n_d = 1)"
        )
    if str(failure) == UNMIXED and not {*z} & {*probe.base.outputs}:
        return f"{UNMIXED}: what follows is not linear, so that no sum over inputs is affine in it"
    return str(failure)


def _layout(
    probe: Probe,
    path: str,
    members: list[str],
    z: tuple[int, ...],
    own: tuple[int, ...],
    region: str | None,
    contractions: dict[tuple, Contraction],
) -> tuple[Layout, str | None, Place]:
    """Layout, slice and place of a parameter that is tested with others, and then alone.

    Args:
        members, z: those that can be tested at once, and their tensors z; `own` are those of this parameter.
        contractions: of these members, which are kept from one of them to the next.

    Raises:
        NoLayout, Refused: why it is no coefficient tensor, tested with the others.
    """
    failure: NoLayout | None = None
    tests = [(members, z)] + ([([path], own)] if len(members) > 1 else [])
    while tests:
        paths, frontier = tests.pop(0)
        try:
            for inputs in probe.inputs_of(paths, frontier):
                key = (*paths, frontier, inputs)
                if key not in contractions:
                    contractions[key] = Contraction(probe, frontier, inputs, paths)
                try:
                    return contractions[key].find(path, region)
                except NoLayout as no_layout:
                    failure = failure or no_layout
                    if no_layout.linear or isinstance(no_layout, NoOutputs):
                        raise
        except NoOutputs:  # something linear comes after the contraction, and mixes the outputs
            first = probe.first_contraction(path, frontier)
            tests = [([path], first)] if first != frontier else []
    assert failure is not None
    raise failure


def confirm_layer(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], findings: Mapping[str, Finding], passes: Passes
) -> bool:
    """Whether the layer bears out what was found in one of the same class, settings and shapes.

    It takes the same steps as that one, and the slope ∂/∂P Σ t · ∂/∂u Σ w z, with w zero for half of the outputs and
    t for half of the input features, is zero for all their entries, and else one of functions that the outputs share.
    That takes one pass forward and two backward.
    """
    runs: dict[tuple[Precision, int], dict[Place, list[CoefficientSpec]]] = {}
    for finding in findings.values():
        if finding.spec is not None and finding.place is not None:
            place = finding.place
            runs.setdefault((place.precision, place.which), {}).setdefault(place, []).append(finding.spec)
    try:
        for run, places in runs.items():
            probe = Probe(layer, args, kwargs, *run, passes, repeats=False)
            for place, specs in places.items():
                contraction = Contraction(
                    probe, place.frontier, place.inputs, [spec.parameter for spec in specs], place.finite
                )
                if probe.trace != place.trace or not contraction.bears_out(specs, place):
                    return False
    except Exception:  # whatever a layer may raise: then it is tested itself
        return False
    return True
