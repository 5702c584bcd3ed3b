"""Coefficient tensors found, and declared layouts verified, by running a model's layers on a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..coefficients import CoefficientSpec, Layout, known_coefficients
from ..config import LoTRAConfig
from ..layer import adapted_tensors
from ..preserved import check_model, preserved
from ..standin.placing import is_used
from ..targets import resolve_targets
from .layouts import agree
from .recording import map_tensors, tensors_in
from .response import Finding, Passes, infer_layer

_MOST_TESTS = 2  # a linear weight is tested in the layer around it and, once more, in the one around that


class InferredCoefficients(dict):
    """Maps coefficient parameters to their descriptions, for `LoTRAConfig(coefficients=...)`; prints as a report.

    Attributes:
        report: per layer its coefficient tensors and how they were found, or why it has none.
        forwards, backwards: the passes of single layers that were spent.
    """

    report = ""
    forwards = backwards = 0

    def __str__(self) -> str:
        return self.report or super().__str__()


def infer_coefficients(model: nn.Module, *sample: Any, **kwargs: Any) -> InferredCoefficients:
    """The coefficient tensors of a model's KAN layers, found by running it on a sample.

        coefficients = infer_coefficients(model, x)
        print(coefficients)
        model = get_peft_model(model, LoTRAConfig(coefficients=coefficients))

    The model runs once, then each layer a few times on what it received, in float64 where it can, on the device where
    it is. From the derivatives of y_o = Σ_i Σ_d A[i, o, d]·φ_d(x_i) by the stored entries follows to which input,
    output and basis function each belongs. Layers of registered classes run once, and are taken as registered if they
    use what is registered. In every run modules are in eval mode, and random numbers the same. The model is left
    exactly as it was. The sample should be like the data: basis functions that it does not reach are not seen.

    Raises:
        TypeError: if `model` is none.
        ValueError: if the model does not run on the sample, or no coefficient tensor is found; the text then says why
            for each parameter.
    """
    check_model(model=model)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"the model has adapters already, on {adapted[:5]}: infer from the base model, or check the layers that "
            "are adapted by `verify_coefficients`"
        )
    search = _Search(model, _recorded_calls(model, sample, kwargs))
    for name, layer in model.named_modules():
        search.take_registered(name, layer)
    for name, layer in reversed(list(model.named_modules())):  # inner ones first
        if not search.is_registered(name):
            search.test(name, layer)
    report = search.report()
    if not search.found:
        raise ValueError(
            f"no KAN coefficient tensor found in this {type(model).__name__}:\n{report}\n"
            "If one of these is a coefficient tensor, give its layout in `LoTRAConfig(coefficients=...)`"
        )
    position = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = dict(sorted(search.found.items(), key=lambda item: position[item[1][0]]))
    return _result(found, report, search.passes)


def verify_coefficients(
    model: nn.Module, *sample: Any, coefficients: Mapping[str, Any] | None = None, **kwargs: Any
) -> InferredCoefficients:
    """Check the declared layouts of a model's coefficient tensors by running it on a sample.

    Declared are those of registered classes and those in `coefficients`, in the form of
    `LoTRAConfig(coefficients=...)`; in a model that LoTRA has adapted, those of its layers. See `infer_coefficients`.

    Raises:
        TypeError: if `model` is none, or `coefficients` no mapping.
        ValueError: naming the first layer and parameter whose layout, slice or scale is not the one found.
    """
    check_model(model=model)
    names = {module: name for name, module in model.named_modules()}
    layers = [(layer.get_base_layer(), layer.spec) for layer in adapted_tensors(model).values()]
    declared = [(names[layer], layer, spec) for layer, spec in layers]
    if declared and coefficients:
        raise ValueError("`coefficients` describes a base model, and this one is adapted: leave the argument out")
    if not declared:
        targets = resolve_targets(model, LoTRAConfig(r=1, coefficients=coefficients or {}))
        declared = [(target.module, model.get_submodule(target.module), target.spec) for target in targets]
    calls = _recorded_calls(model, sample, kwargs, plain=True)
    passes, lines = Passes(), []
    for name, layer, spec in declared:
        if name not in calls:
            raise ValueError(f"KAN layer {name!r} did not run on this sample: give one on which the model uses it")
        path, around = spec.parameter, name
        finding = infer_layer(layer, *calls[name], [path], passes, spec.slice)[path]
        while finding.linear and around:  # a linear layer: the one around it may feed it with a basis
            around, _, inner = around.rpartition(".")
            path = f"{inner}.{path}"
            if around in calls:
                finding = infer_layer(model.get_submodule(around), *calls[around], [path], passes, spec.slice)[path]
        problem = _disagreement(layer, spec, finding.spec, finding.reason)
        if problem:
            raise ValueError(f"KAN layer {name!r}, parameter {spec.parameter}: {problem}")
        lines.append(f"{name} ({type(layer).__name__})\n    {_described(spec)}; verified")
    found = {f"{name}.{spec.parameter}": (name, spec) for name, _, spec in declared}
    return _result(found, "\n".join([*lines, _spent(passes)]), passes)


def _disagreement(layer: nn.Module, given: CoefficientSpec, found: CoefficientSpec | None, reason: str) -> str:
    declared = f"declared is {_described(given, name=False)}"
    if found is None:
        return f"{declared}, but the layer's response does not confirm it: {reason}"
    if found.slice != given.slice or not agree(given.layout, found.layout):
        return f"{declared}, found {_described(found, name=False)}{_differing_axes(given.layout, found.layout)}"
    if given.scale is not None and given.scale_layout is not None:
        size = layer.get_parameter(given.scale).shape if given.scale == found.scale else None
        test = None if size is None else torch.arange(float(size.numel())).view(size)
        same = (
            test is not None
            and found.scale_layout is not None
            and torch.equal(
                given.layout.expand(test, given.scale_layout), found.layout.expand(test, found.scale_layout)
            )
        )
        if not same:
            return f"{declared}, found the scale {found.scale} {found.scale_layout or ''}".rstrip()
    return ""


def _differing_axes(given: Layout, found: Layout) -> str:
    """What the stored axes hold, where the two differ: both shapes (n, m, n_d) may be the same."""
    pairs = enumerate(zip(given.stored_axes, found.stored_axes, strict=True))
    held = [f"axis {axis} of the parameter holds {b}, not {a}" for axis, (a, b) in pairs if a != b]
    return f": {'; '.join(held)} (i input, o output, d basis)" if held else ""


def _described(spec: CoefficientSpec, name: bool = True) -> str:
    """A line such as "spline_weight: 'o i d' (n, m, n_d) = (3, 5, 8), scale spline_scaler 'o i'"."""
    shape = spec.layout.canonical_shape
    text = f"{spec.layout.pattern!r} (n, m, n_d) = {shape[:3]}" + (f" × {shape[3:]}" if shape[3:] else "")
    text += f", slice {spec.slice!r}" if spec.slice else ""
    text += f", scale {spec.scale} {spec.scale_layout!r}" if spec.scale else ""
    return f"{spec.parameter}: {text}" if name else text


def _spent(passes: Passes) -> str:
    return f"one pass of the model; {passes.forward} forward and {passes.backward} backward passes of single layers"


def _join(module: str, path: str) -> str:
    return f"{module}.{path}" if module else path


def _result(found: Mapping[str, tuple[str, CoefficientSpec]], report: str, passes: Passes) -> InferredCoefficients:
    result = InferredCoefficients()
    for parameter, (module, spec) in found.items():
        owned = parameter.rpartition(".")[0] == module
        result[parameter] = spec.describe() | ({} if owned else {"layer": module})
    result.report, result.forwards, result.backwards = report, passes.forward, passes.backward
    return result


def _is_plain(module: nn.Module) -> bool:
    """Whether this is a layer of torch: none is a KAN layer, but its weight may be the coefficients of one around."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def _recorded_calls(
    model: nn.Module, sample: tuple, kwargs: dict[str, Any], plain: bool = False
) -> dict[str, tuple[tuple, dict]]:
    """What each module, also each plain one if `plain`, received the first time in one run of the model; by name."""
    calls: dict[str, tuple[tuple, dict]] = {}

    def recording(name: str, forward: Callable) -> Callable:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name not in calls:
                calls[name] = map_tensors((args, kwargs), lambda t: t.detach().clone())
            return forward(*args, **kwargs)

        return run

    with preserved(model, training=False), torch.no_grad():
        for name, module in model.named_modules():
            if (plain or not _is_plain(module)) and not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = recording(name, module.forward)  # some call it without `__call__`
        try:
            model(*sample, **kwargs)
        except Exception as error:
            raise ValueError(
                f"the model fails on this sample, which should be what its forward takes, of the right shape, dtype "
                f"and device: {type(error).__name__}: {error}"
            ) from error
    return calls


@dataclass
class _Search:
    """The coefficient tensors found so far, and the parameters that may still be some."""

    model: nn.Module
    calls: dict[str, tuple[tuple, dict]]
    found: dict[str, tuple[str, CoefficientSpec]] = field(default_factory=dict)  # by full parameter name
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        self._open = {name: 0 for name, _ in self.model.named_parameters()}  # how often tested
        self._registered: list[str] = []
        self._lines: dict[str, list[str]] = {}  # of found tensors, by layer
        self._left_out: dict[str, tuple[str, str]] = {}  # (layer, reason), by full parameter name

    def is_registered(self, name: str) -> bool:
        """Whether the module is a registered layer, or lies in one."""
        return any(name == layer or name.startswith(f"{layer}." if layer else "") for layer in self._registered)

    def take_registered(self, name: str, layer: nn.Module) -> None:
        specs = [] if self.is_registered(name) else known_coefficients(layer)
        for spec in specs:
            if name in self.calls and not self._is_used(layer, spec, *self.calls[name]):
                reason = "registered, but a pass of the layer does not use it"
                self._left_out[_join(name, spec.parameter)] = (name, reason)
                return
        for spec in specs:
            self._add(name, spec, "registered")
        if specs:
            self._registered.append(name)
            self._open = {full: tests for full, tests in self._open.items() if not full.startswith(_join(name, ""))}

    def _is_used(self, layer: nn.Module, spec: CoefficientSpec, args: tuple, kwargs: dict) -> bool:
        self.passes.forward += 1
        with preserved(layer, training=False), torch.no_grad():
            return is_used(layer, spec, args, kwargs)

    def _add(self, name: str, spec: CoefficientSpec, how: str) -> None:
        full = _join(name, spec.parameter)
        self.found[full] = (name, spec)
        self._open.pop(full, None)
        self._left_out.pop(full, None)
        self._lines.setdefault(name, []).append(f"{_described(spec)}; {how}")

    def test(self, name: str, layer: nn.Module) -> None:
        """Test the parameters in a layer that are still open."""
        if name not in self.calls or _is_plain(layer):
            return
        prefix = _join(name, "")
        passes = Passes()
        paths = [full.removeprefix(prefix) for full in self._open if full.startswith(prefix)]
        findings = infer_layer(layer, *self.calls[name], paths, passes) if paths else {}
        if any(finding.spec for finding in findings.values()):
            findings |= self._inner(name, layer, findings, passes)
        else:
            findings |= self._as_convolution(name, layer, passes)
        how = f"inferred, {passes.forward} forward and {passes.backward} backward passes"
        for path, finding in findings.items():
            full = prefix + path
            if finding.spec:
                self._add(name, finding.spec, how)  # in the place of what was found in a module inside
                continue
            self._open[full] += 1
            self._left_out.setdefault(full, (name, finding.reason))
            if not finding.linear or self._open[full] >= _MOST_TESTS:
                del self._open[full]
        self.passes.forward += passes.forward
        self.passes.backward += passes.backward

    def _as_convolution(self, name: str, layer: nn.Module, passes: Passes) -> dict[str, Finding]:
        """Coefficient tensors found in a module that this layer feeds with patches of images, with their kernel axes.

        The module in it knows only the flattened patches.
        """
        x = next((t for t in tensors_in(self.calls[name]) if t.is_floating_point()), torch.empty(0))
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
            paths = {_join(module, s.parameter).removeprefix(_join(name, "")): s for s in specs}
            found = infer_layer(layer, *self.calls[name], list(paths), passes)
            if all(finding.spec and set("thw") & {*finding.spec.layout.sizes} for finding in found.values()):
                self._lines.pop(module)
                findings |= found
        return findings

    def _parent(self, module: str) -> str:
        """The module around, passing over those that are never called, such as lists of modules."""
        while module:
            module = module.rpartition(".")[0]
            if module in self.calls:
                break
        return module

    def _inner(self, name: str, layer: nn.Module, findings: dict[str, Finding], passes: Passes) -> dict[str, Finding]:
        """What to change where a layer has coefficient tensors, and so have layers in it: only one can be wrapped."""
        prefix = _join(name, "")
        inner = {
            full: module for full, (module, _) in self.found.items() if module != name and full.startswith(prefix)
        }
        if not inner:
            return {}
        if not any(map(self.is_registered, inner.values())):
            paths = [full.removeprefix(prefix) for full in inner]
            again = infer_layer(layer, *self.calls[name], paths, passes)
            if all(finding.spec for finding in again.values()):
                for full, module in inner.items():
                    del self.found[full]
                    self._lines.pop(module, None)
                return again
        reason = f"it is used around the KAN layers {sorted(set(inner.values()))}, and both cannot be adapted"
        return {path: Finding(reason=reason) for path, finding in findings.items() if finding.spec}

    def report(self) -> str:
        reasons: dict[tuple[str, str], list[str]] = {}
        for full in self._open:
            owner = full.rpartition(".")[0]
            plain = _is_plain(self.model.get_submodule(owner)) or owner in self.calls
            reason = "a layer of torch, in no layer that could be tested" if plain else "its layer did not run"
            self._left_out.setdefault(full, (owner, reason))
        for full, (name, reason) in self._left_out.items():
            reasons.setdefault((name, reason), []).append(full.removeprefix(_join(name, "")))
        for (name, reason), paths in reasons.items():
            self._lines.setdefault(name, []).append(f"{', '.join(paths)}: left out, {reason}")
        text = []
        for name, layer in self.model.named_modules():
            if name in self._lines:
                text += [f"{name or 'the model'} ({type(layer).__name__})", *(f"    {x}" for x in self._lines[name])]
        return "\n".join([*text, _spent(self.passes)])
