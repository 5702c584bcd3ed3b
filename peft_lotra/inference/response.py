"""The response test finds out whether a parameter P of a layer is a KAN coefficient tensor, and in which layout.

It runs the layer a few times and computes derivatives with respect to P:

    g = ∂/∂P Σ w_o z_o,    z_o = Σ_i Σ_d P[i, o, d] · s_io · φ_d(u_i)

z are the last tensors on the way to the output that are affine in P, so a norm or an activation after them does not
matter. u is the last tensor before the basis, so a norm before it does not matter. Numbers in w along an axis of z
show to which output an entry of P belongs. Numbers in t along an axis of u show which input feature the entry
multiplies: t is the direction of the slope of g, ∂/∂P Σ t · ∂/∂u Σ w_o z_o.
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
    """The result of the response test for one parameter of a layer.

    Attributes:
        spec: the description of the coefficient tensor, if the parameter is one.
        reason: why the parameter is not a coefficient tensor.
        linear: whether the parameter is a linear weight on the layer's input. It may still be the coefficient tensor
            of a module around the layer, if that feeds the layer basis functions.
        of_class: whether the reason holds for all layers that are alike, for any sample and parameter values.
        place: where in the run the response was measured, if the parameter is a coefficient tensor.
        like: the name of the tested layer, if this layer only confirmed its finding.
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
    """A finding for each parameter of `layer` in `paths`, or for its slice `region`.

    The layer runs on `args` and `kwargs`, and stays as it was; `passes` counts the runs. If the layer raises an
    error, the findings have it as their reason.
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
        except Exception as error:  # one unusual layer must not end the search in a large model
            reason = f"it cannot be tested: {type(error).__name__}: {error}"
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
    """The reason for a failure, with its cause if the run shows one."""
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
    """The layout, slice and place of a parameter, which is tested together with others, and then alone.

    Args:
        members, z: the parameters that can be tested together, and their tensors z.
        own: the tensors z of this parameter.
        contractions: a cache that these members share.

    Raises:
        NoLayout, Refused: why the parameter is not a coefficient tensor.
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
        except NoOutputs:  # a linear operation after the contraction may mix the outputs
            first = probe.first_contraction(path, frontier)
            tests = [([path], first)] if first != frontier else []
    assert failure is not None
    raise failure


def confirm_layer(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], findings: Mapping[str, Finding], passes: Passes
) -> bool:
    """Whether the layer confirms the findings of another layer with the same class, settings and shapes.

    The layer must take the same steps. In the slope ∂/∂P Σ t · ∂/∂u Σ w z, w is zero for half of the outputs and t
    for half of the input features. The slope must be zero for the entries of these outputs and features, and the
    other outputs must share their functions. This takes one forward and two backward passes.
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
    except Exception:  # any error of the layer: it is then tested itself
        return False
    return True
