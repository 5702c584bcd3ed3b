"""Finds coefficient tensors by running a model's layers on a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..coefficients import CoefficientSpec, known_coefficients
from ..preserved import check_model, preserved
from ..standin.placing import is_used
from .recording import Call, Passes
from .response import Finding, LayerTests, stacks
from .walk import walk

_MOST_TESTS = 2  # a linear weight is tested in the two innermost modules around it that are not plain torch layers

Found = tuple[str, CoefficientSpec, str]  # a layer, one of its coefficient tensors, and how this is known


class InferredCoefficients(dict):
    """Maps coefficient parameters to their descriptions, for `LoTRAConfig(coefficients=...)`. Prints as a report.

    Attributes:
        report: the coefficient tensors of each layer and how they were found, or why a layer has none.
        forwards, backwards: how many passes of single layers were run.
    """

    report = ""
    forwards = backwards = 0

    def __str__(self) -> str:
        return self.report or super().__str__()


def infer_coefficients(model: nn.Module, *sample: Any, **kwargs: Any) -> InferredCoefficients:
    """Find the coefficient tensors of a model's KAN layers by running it on a sample.

        coefficients = infer_coefficients(model, x)
        print(coefficients)
        model = get_peft_model(model, LoTRAConfig(coefficients=coefficients))

    The model runs once. Each layer then runs a few times on the input it received, on its device, in float64 if it
    can. Of several layers with the same class, settings and shapes, only the first is tested, and the others confirm
    its findings in one pass. The derivatives of y_o = Σ_i Σ_d A[i, o, d]·φ_d(x_i) with respect to the stored entries
    show to which input, output and basis function each entry belongs. A layer of a registered class is taken as
    registered if a run shows that it uses those parameters. Every run is in eval mode with the same random numbers.
    The model stays exactly as it was. The sample should be like the data, because the test does not see basis
    functions that the sample does not reach.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if the model has adapters or does not run on the sample, or if no coefficient tensor is found. In
            the last case the text gives the reason for each parameter.
    """
    check_model(model=model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"the model has adapters already, on {adapted[:5]}: infer from the base model, or check the layers that "
            "are adapted by `verify_coefficients`"
        )
    search = _Search(model)
    walk(model, sample, kwargs, search.modules, search.visit)
    for full in search.open:
        search.left_out.setdefault(full, ("", "no module around it could be tested"))
    coefficients = result(model, search.found, search.left_out, search.passes)
    if not coefficients:
        raise ValueError(
            f"no KAN coefficient tensor found in this {type(model).__name__}:\n{coefficients.report}\n"
            "If one of these is a coefficient tensor, give its layout in `LoTRAConfig(coefficients=...)`"
        )
    return coefficients


def result(
    model: nn.Module, found: Mapping[str, Found], left_out: Mapping[str, tuple[str, str]], passes: Passes
) -> InferredCoefficients:
    """The descriptions and the report, from tensors found, and (layer, reason) of others, by full parameter name."""
    coefficients, text = InferredCoefficients(), []
    lines: dict[str, list[str]] = {}  # by layer
    position = {name: place for place, (name, _) in enumerate(model.named_modules())}
    for full, (module, spec, how) in sorted(found.items(), key=lambda item: position[item[1][0]]):
        owned = full.rpartition(".")[0] == module
        coefficients[full] = spec.describe() | ({} if owned else {"layer": module})
        lines.setdefault(module, []).append(f"{spec.parameter}: {described(spec)}; {how}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for full, where in left_out.items():
        reasons.setdefault(where, []).append(full.removeprefix(inside(where[0])))
    for (module, reason), paths in reasons.items():
        lines.setdefault(module, []).append(f"{', '.join(paths)}: left out, {reason}")
    for name, layer in model.named_modules():
        if name in lines:
            text += [f"{name or 'the model'} ({type(layer).__name__})", *(f"    {line}" for line in lines[name])]
    spent = f"{passes.forward} forward and {passes.backward} backward passes of single layers"
    coefficients.report = "\n".join([*text, f"one pass of the model; {spent}"])
    coefficients.forwards, coefficients.backwards = passes.forward, passes.backward
    return coefficients


def described(spec: CoefficientSpec) -> str:
    """Text like "'o i d' (n, m, n_d) = (3, 5, 8), scale spline_scaler 'o i'"."""
    shape = spec.layout.canonical_shape
    text = f"{spec.pattern!r} (n, m, n_d) = {shape[:3]}" + (f" × {shape[3:]}" if shape[3:] else "")
    text += f", slice {spec.slice!r}" if spec.slice else ""
    return text + (f", scale {spec.scale} {spec.scale_layout!r}" if spec.scale else "")


def inside(module: str) -> str:
    """How the full names of what is in a module begin."""
    return f"{module}." if module else ""


def is_plain(module: nn.Module) -> bool:
    """Whether this is a torch layer. It is no KAN layer, but a KAN layer around it may use its weight."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


class _Search:
    """The coefficient tensors found so far, and the parameters that are still undecided."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = Passes()
        self.modules = {name: module for name, module in model.named_modules() if not is_plain(module)}
        self.found: dict[str, Found] = {}  # by full parameter name
        self.left_out: dict[str, tuple[str, str]] = {}  # (layer, reason), by full parameter name
        self._tests = LayerTests()
        self._registered: dict[str, list[CoefficientSpec]] = {}
        for name, layer in model.named_modules():
            specs = [] if self._is_registered(name) else known_coefficients(layer)
            if specs:
                self._registered[name] = specs
                self.found |= {inside(name) + spec.parameter: (name, spec, "registered") for spec in specs}
        names = [name for name, _ in model.named_parameters()]
        self.open = {name: 0 for name in names if not self._is_registered(name)}  # counts their tests

    def _is_registered(self, name: str) -> bool:
        """Whether this is a layer of a registered class, or inside one."""
        return any(inside(name).startswith(inside(layer)) for layer in self._registered)

    def visit(self, name: str, layer: nn.Module, call: Call) -> None:
        """Test a layer that has just run, unless its class is registered and it uses the registered parameters."""
        prefix = inside(name)
        unused = []
        for spec in self._registered.get(name, ()):
            self.passes.forward += 1
            with preserved(layer, training=False), torch.no_grad():
                if not is_used(layer, spec, *call):
                    unused.append(spec)
        if unused:
            for spec in self._registered.pop(name):
                del self.found[prefix + spec.parameter]
            reason = "registered, but a pass of the layer does not use it"
            self.left_out |= {prefix + spec.parameter: (name, reason) for spec in unused}
            self.open |= {prefix + path: 0 for path, _ in layer.named_parameters()}
        if not self._is_registered(name):
            self._test(name, layer, call)

    def _test(self, name: str, layer: nn.Module, call: Call) -> None:
        """Test the undecided parameters in a layer."""
        prefix, passes = inside(name), Passes()
        paths = [full.removeprefix(prefix) for full in self.open if full.startswith(prefix)]
        findings = self._tests.findings(name, layer, call, paths, passes)
        for stack, parts in stacks(layer, findings).items():
            together = self._tests.findings(name, layer, call, [stack], passes)
            if together[stack].spec:
                findings = {path: finding for path, finding in findings.items() if path not in parts} | together
                for full in [prefix + part for part in parts]:
                    self.open.pop(full, None)
                    self.left_out.pop(full, None)
        around = {full for full, (module, *_) in self.found.items() if module != name and full.startswith(prefix)}
        if around and any(finding.spec for finding in findings.values()):
            layers = sorted({self.found[full][0] for full in around})
            reason = f"it is used around the KAN layers {layers}, and both cannot be adapted"
            findings |= {path: Finding(reason=reason) for path, finding in findings.items() if finding.spec}
        cost = f"{passes.forward} forward and {passes.backward} backward passes"
        for path, finding in findings.items():
            full = prefix + path
            if finding.spec:
                how = "inferred" if finding.like is None else f"like {finding.like}, confirmed"
                self.found[full] = name, finding.spec, f"{how}, {cost}"  # replaces a finding in an inner module
                self.open.pop(full, None)
                self.left_out.pop(full, None)
                continue
            self.open[full] += 1
            like = "" if finding.like is None else f", as in {finding.like}, a layer alike"
            self.left_out.setdefault(full, (name, finding.reason + like))
            if not finding.linear or self.open[full] >= _MOST_TESTS:
                del self.open[full]
        self.passes.forward += passes.forward
        self.passes.backward += passes.backward
