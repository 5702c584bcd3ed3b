"""Verifies declared layouts by running a model's layers on a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..coefficients import CoefficientSpec
from ..config.lotra_config import LoTRAConfig
from ..layers.lotra import adapted_tensors
from ..preserved import check_model, preserved
from ..targets.resolve import resolve_targets
from .layouts import agree
from .recording import Call, Passes
from .response import Finding, LayerTests
from .search import InferredCoefficients, described, inside, result
from .walk import walk


def verify_coefficients(
    model: nn.Module, *sample: Any, coefficients: Mapping[str, Any] | None = None, **kwargs: Any
) -> InferredCoefficients:
    """Check the declared layouts of a model's coefficient tensors by running it on a sample.

    The registered classes and `coefficients` declare layouts, in the form of `LoTRAConfig(coefficients=...)`. In a
    model that LoTRA has adapted, the adapted layers' layouts are checked. See `infer_coefficients` for the test.

    Raises:
        TypeError: if `model` is not a module, or `coefficients` is not a mapping.
        ValueError: if a layout, slice or scale is not the one found, naming the first such layer and parameter; if
            the model does not run on the sample, or does not use a declared layer; if an adapted model is given
            `coefficients`.
    """
    check_model(model=model)
    names = {module: name for name, module in model.named_modules()}
    adapted = adapted_tensors(model).values()
    declared = [(names[layer.get_base_layer()], layer.spec) for layer in adapted]
    if declared and coefficients:
        raise ValueError("`coefficients` describes a base model, and this one is adapted: leave the argument out")
    if not declared:
        targets = resolve_targets(model, LoTRAConfig(r=1, coefficients=coefficients or {}))
        declared = [(target.module, target.spec) for target in targets]
    check = _Check(model, declared)
    with preserved(model):
        for layer in adapted:
            layer._active_adapter = []  # merged adapters stay merged
        walk(model, sample, kwargs, check.modules, check.visit)
    for name, spec in declared:
        finding = check.found.get((name, spec.parameter))
        if finding is None:
            raise ValueError(f"KAN layer {name!r} did not run on this sample: give one on which the model uses it")
        problem = _disagreement(model.get_submodule(name), spec, finding)
        if problem:
            raise ValueError(
                f"KAN layer {name!r}, parameter {spec.parameter}: declared is {described(spec)}, {problem}"
            )
    found = {inside(name) + spec.parameter: (name, spec, "verified") for name, spec in declared}
    return result(model, found, {}, check.passes)


class _Check:
    """Tests the declared tensors. `found` holds the findings by (layer, parameter)."""

    def __init__(self, model: nn.Module, declared: Sequence[tuple[str, CoefficientSpec]]) -> None:
        self.found: dict[tuple[str, str], Finding] = {}
        self.passes = Passes()
        self._tests, self._declared = LayerTests(), declared
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if any(inside(layer).startswith(inside(name)) for layer, _ in declared)
            and not isinstance(module, BaseTunerLayer)  # its base layer is visited instead
        }

    def visit(self, name: str, layer: nn.Module, call: Call) -> None:
        wanted: dict[str | None, dict[str, tuple[str, str]]] = {}  # the declared tensors, by slice and path
        for module, spec in self._declared:
            before = self.found.get((module, spec.parameter))
            # If this module is linear, a module around it may feed it basis functions.
            if module == name or (inside(module).startswith(inside(name)) and before is not None and before.linear):
                path = f"{module}.{spec.parameter}".removeprefix(inside(name))
                wanted.setdefault(spec.slice, {})[path] = module, spec.parameter
        for region, paths in wanted.items():
            found = self._tests.findings(name, layer, call, paths, self.passes, region)
            self.found |= {paths[path]: finding for path, finding in found.items()}


def _disagreement(layer: nn.Module, given: CoefficientSpec, finding: Finding) -> str:
    """How the finding differs from what was given, or ""."""
    found = finding.spec
    if found is None:
        return f"but the layer's response does not confirm it: {finding.reason}"
    if not agree(given.layout, found.layout):
        pairs = zip(given.layout.stored_axes, found.layout.stored_axes, strict=False)
        held = [f"axis {axis} of the parameter holds {b}, not {a}" for axis, (a, b) in enumerate(pairs) if a != b]
        known = held and given.layout.flattened == found.layout.flattened
        return f"found {described(found)}" + (f": {'; '.join(held)} (i input, o output, d basis)" if known else "")
    same = given.scale == found.scale and _scale_entries(layer, given).equal(_scale_entries(layer, found))
    return "" if same else f"found the scale {found.scale} {found.scale_layout or ''}".rstrip()


def _scale_entries(layer: nn.Module, spec: CoefficientSpec) -> torch.Tensor:
    """The number of the entry of the scale that belongs to each entry of the coefficient tensor; 0 without a scale."""
    if spec.scale is None or spec.scale_layout is None:
        return torch.zeros(())
    size = layer.get_parameter(spec.scale).shape
    entries: torch.Tensor = spec.spread(torch.arange(float(size.numel())).view(size))
    return entries
