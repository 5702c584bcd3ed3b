"""Finds coefficient tensors by running a model's layers on a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..coefficients import CoefficientSpec, known_coefficients
from ..preserved import check_model, preserved
from ..standin.placing import is_used
from .alike import LayerTests
from .precision import Passes
from .recording import tensors_in
from .response import Finding
from .walk import Call, walk

_MOST_TESTS = 2  # a linear weight is tested in the two innermost modules around it that are not plain torch layers


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
    report = search.report()
    if not search.found:
        raise ValueError(
            f"no KAN coefficient tensor found in this {type(model).__name__}:\n{report}\n"
            "If one of these is a coefficient tensor, give its layout in `LoTRAConfig(coefficients=...)`"
        )
    position = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = dict(sorted(search.found.items(), key=lambda item: position[item[1][0]]))
    return result(found, report, search.passes)


def described(spec: CoefficientSpec, name: bool = True) -> str:
    """One line of text, like "spline_weight: 'o i d' (n, m, n_d) = (3, 5, 8), scale spline_scaler 'o i'"."""
    shape = spec.layout.canonical_shape
    text = f"{spec.layout.pattern!r} (n, m, n_d) = {shape[:3]}" + (f" × {shape[3:]}" if shape[3:] else "")
    text += f", slice {spec.slice!r}" if spec.slice else ""
    text += f", scale {spec.scale} {spec.scale_layout!r}" if spec.scale else ""
    return f"{spec.parameter}: {text}" if name else text


def spent(passes: Passes) -> str:
    return f"one pass of the model; {passes.forward} forward and {passes.backward} backward passes of single layers"


def join(module: str, path: str) -> str:
    return f"{module}.{path}" if module else path


def result(found: Mapping[str, tuple[str, CoefficientSpec]], report: str, passes: Passes) -> InferredCoefficients:
    result = InferredCoefficients()
    for parameter, (module, spec) in found.items():
        owned = parameter.rpartition(".")[0] == module
        result[parameter] = spec.describe() | ({} if owned else {"layer": module})
    result.report, result.forwards, result.backwards = report, passes.forward, passes.backward
    return result


def is_plain(module: nn.Module) -> bool:
    """Whether this is a torch layer. It is no KAN layer, but a KAN layer around it may use its weight."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


class _Search:
    """The coefficient tensors found so far, and the parameters that are still undecided."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[str, tuple[str, CoefficientSpec]] = {}  # by full parameter name
        self.passes = Passes()
        self.modules = {name: module for name, module in model.named_modules() if not is_plain(module)}
        self._tests = LayerTests()
        self._calls: set[str] = set()  # the modules that have run
        self._call: Call = ((), {})  # the arguments of the layer under test
        self._open = {name: 0 for name, _ in model.named_parameters()}  # the number of tests of undecided parameters
        self._lines: dict[str, list[str]] = {}  # the lines of the report, by layer
        self._left_out: dict[str, tuple[str, str]] = {}  # (layer, reason), by full parameter name
        self._registered: dict[str, list[CoefficientSpec]] = {}
        for name, layer in model.named_modules():
            specs = [] if self.is_registered(name) else known_coefficients(layer)
            if specs:
                self._registered[name] = specs

    def is_registered(self, name: str) -> bool:
        """Whether the module is a layer of a registered class, or inside one."""
        return any(name == layer or name.startswith(join(layer, "")) for layer in self._registered)

    def visit(self, name: str, layer: nn.Module, call: Call) -> None:
        """Test a layer that has just run, unless its class is registered and it uses the registered parameters."""
        self._calls.add(name)
        for spec in self._registered.get(name, ()):
            if not self._is_used(layer, spec, *call):
                reason = "registered, but a pass of the layer does not use it"
                self._left_out[join(name, spec.parameter)] = (name, reason)
                del self._registered[name]
                break
        if not self.is_registered(name):
            self._call = call
            self._test(name, layer)

    def _take_registered(self) -> None:
        for name, specs in self._registered.items():
            for spec in specs:
                self._add(name, spec, "registered")
            self._open = {full: tests for full, tests in self._open.items() if not full.startswith(join(name, ""))}

    def _is_used(self, layer: nn.Module, spec: CoefficientSpec, args: tuple, kwargs: dict) -> bool:
        self.passes.forward += 1
        with preserved(layer, training=False), torch.no_grad():
            return is_used(layer, spec, args, kwargs)

    def _infer(self, name: str, layer: nn.Module, paths: Iterable[str], passes: Passes) -> dict[str, Finding]:
        return self._tests.findings(name, layer, self._call, paths, passes)

    def _add(self, name: str, spec: CoefficientSpec, how: str) -> None:
        full = join(name, spec.parameter)
        self.found[full] = (name, spec)
        self._open.pop(full, None)
        self._left_out.pop(full, None)
        self._lines.setdefault(name, []).append(f"{described(spec)}; {how}")

    def _test(self, name: str, layer: nn.Module) -> None:
        """Test the undecided parameters in a layer."""
        prefix = join(name, "")
        passes = Passes()
        paths = [full.removeprefix(prefix) for full in self._open if full.startswith(prefix)]
        findings = self._infer(name, layer, paths, passes) if paths else {}
        if any(finding.spec for finding in findings.values()):
            findings |= self._inner(name, layer, findings, passes)
        else:
            findings |= self._as_convolution(name, layer, passes)
        cost = f"{passes.forward} forward and {passes.backward} backward passes"
        for path, finding in findings.items():
            full = prefix + path
            if finding.spec:
                how = "inferred" if finding.like is None else f"like {finding.like}, confirmed"
                self._add(name, finding.spec, f"{how}, {cost}")  # replaces a finding in an inner module
                continue
            self._open[full] += 1
            like = "" if finding.like is None else f", as in {finding.like}, a layer alike"
            self._left_out.setdefault(full, (name, finding.reason + like))
            if not finding.linear or self._open[full] >= _MOST_TESTS:
                del self._open[full]
        self.passes.forward += passes.forward
        self.passes.backward += passes.backward

    def _as_convolution(self, name: str, layer: nn.Module, passes: Passes) -> dict[str, Finding]:
        """Find the kernel axes of coefficient tensors in an inner module that receives image patches from this layer.

        The inner module sees only flattened patches.
        """
        x = next((t for t in tensors_in(self._call) if t.is_floating_point()), torch.empty(0))
        inner: dict[str, list[CoefficientSpec]] = {}
        for module, spec in self.found.values():
            n, groups, sizes = spec.layout.canonical_shape[0], spec.layout.sizes.get("g", 1), spec.layout.sizes
            patches = (
                x.ndim > 3 and n * groups > x.shape[1] and n * groups % x.shape[1] == 0 and not set("thw") & {*sizes}
            )
            if patches and not self.is_registered(module) and self._parent(module) == name:
                inner.setdefault(module, []).append(spec)
        findings: dict[str, Finding] = {}
        for module, specs in inner.items():
            paths = {join(module, s.parameter).removeprefix(join(name, "")): s for s in specs}
            found = self._infer(name, layer, paths, passes)
            if all(finding.spec and set("thw") & {*finding.spec.layout.sizes} for finding in found.values()):
                self._lines.pop(module)
                findings |= found
        return findings

    def _parent(self, module: str) -> str:
        """The innermost module around `module` that has run. Lists of modules, for example, never run."""
        while module:
            module = module.rpartition(".")[0]
            if module in self._calls:
                break
        return module

    def _inner(self, name: str, layer: nn.Module, findings: dict[str, Finding], passes: Passes) -> dict[str, Finding]:
        """Changed findings for a layer that has coefficient tensors both itself and in inner layers.

        Only the layer or the inner layers can be adapted.
        """
        prefix = join(name, "")
        inner = {
            full: module for full, (module, _) in self.found.items() if module != name and full.startswith(prefix)
        }
        if not inner:
            return {}
        if not any(map(self.is_registered, inner.values())):
            paths = [full.removeprefix(prefix) for full in inner]
            again = self._infer(name, layer, paths, passes)
            if all(finding.spec for finding in again.values()):
                for full, module in inner.items():
                    del self.found[full]
                    self._lines.pop(module, None)
                return again
        reason = f"it is used around the KAN layers {sorted(set(inner.values()))}, and both cannot be adapted"
        return {path: Finding(reason=reason) for path, finding in findings.items() if finding.spec}

    def report(self) -> str:
        self._take_registered()
        reasons: dict[tuple[str, str], list[str]] = {}
        for full in self._open:
            owner = full.rpartition(".")[0]
            plain = is_plain(self.model.get_submodule(owner)) or owner in self._calls
            reason = "a layer of torch, in no layer that could be tested" if plain else "its layer did not run"
            self._left_out.setdefault(full, (owner, reason))
        for full, (name, reason) in self._left_out.items():
            reasons.setdefault((name, reason), []).append(full.removeprefix(join(name, "")))
        for (name, reason), paths in reasons.items():
            self._lines.setdefault(name, []).append(f"{', '.join(paths)}: left out, {reason}")
        text = []
        for name, layer in self.model.named_modules():
            if name in self._lines:
                text += [f"{name or 'the model'} ({type(layer).__name__})", *(f"    {x}" for x in self._lines[name])]
        return "\n".join([*text, spent(self.passes)])
