"""Verifies declared layouts by running a model's layers on a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..coefficients import CoefficientSpec, Layout
from ..config.lotra_config import LoTRAConfig
from ..layers.lotra import adapted_tensors
from ..preserved import check_model
from ..targets.resolve import resolve_targets
from .alike import LayerTests
from .layouts import agree
from .precision import Passes
from .response import Finding
from .search import InferredCoefficients, described, result, spent
from .walk import Call, walk


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
    layers = [(layer.get_base_layer(), layer.spec) for layer in adapted_tensors(model).values()]
    declared = [(names[layer], layer, spec) for layer, spec in layers]
    if declared and coefficients:
        raise ValueError("`coefficients` describes a base model, and this one is adapted: leave the argument out")
    if not declared:
        targets = resolve_targets(model, LoTRAConfig(r=1, coefficients=coefficients or {}))
        declared = [(target.module, model.get_submodule(target.module), target.spec) for target in targets]
    check = _Check(model, declared)
    with _without_adapters(model):
        walk(model, sample, kwargs, check.modules, check.visit)
    lines = []
    for name, layer, spec in declared:
        finding = check.found.get((name, spec.parameter))
        if finding is None:
            raise ValueError(f"KAN layer {name!r} did not run on this sample: give one on which the model uses it")
        problem = _disagreement(layer, spec, finding.spec, finding.reason)
        if problem:
            raise ValueError(f"KAN layer {name!r}, parameter {spec.parameter}: {problem}")
        lines.append(f"{name} ({type(layer).__name__})\n    {described(spec)}; verified")
    found = {f"{name}.{spec.parameter}": (name, spec) for name, _, spec in declared}
    return result(found, "\n".join([*lines, spent(check.passes)]), check.passes)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which no adapter is active. Merged adapters stay merged."""
    layers = list(adapted_tensors(model).values())
    active = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = []
        yield
    finally:
        for layer, before in zip(layers, active, strict=True):
            layer._active_adapter = before


class _Check:
    """Tests the declared tensors. `found` holds the findings by (layer, parameter)."""

    def __init__(self, model: nn.Module, declared: Sequence[tuple[str, nn.Module, CoefficientSpec]]) -> None:
        self.found: dict[tuple[str, str], Finding] = {}
        self.passes = Passes()
        self._tests = LayerTests()
        self._declared = [(name, spec) for name, _, spec in declared]
        parts = [name.split(".") for name, _ in self._declared]
        around = {"", *[".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)]}
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if name in around and not isinstance(module, BaseTunerLayer)  # its base layer is visited instead
        }

    def visit(self, name: str, layer: nn.Module, call: Call) -> None:
        prefix = f"{name}." if name else ""
        wanted: dict[str | None, dict[str, tuple[str, str]]] = {}  # the declared tensors, by slice and path
        for module, spec in self._declared:
            before = self.found.get((module, spec.parameter))
            # If this module is linear, a module around it may feed it basis functions.
            if module == name or (module.startswith(prefix) and before is not None and before.linear):
                path = f"{module}.{spec.parameter}".removeprefix(prefix)
                wanted.setdefault(spec.slice, {})[path] = module, spec.parameter
        for region, paths in wanted.items():
            found = self._tests.findings(name, layer, call, paths, self.passes, region)
            self.found |= {paths[path]: finding for path, finding in found.items()}


def _disagreement(layer: nn.Module, given: CoefficientSpec, found: CoefficientSpec | None, reason: str) -> str:
    declared = f"declared is {described(given, name=False)}"
    if found is None:
        return f"{declared}, but the layer's response does not confirm it: {reason}"
    if found.slice != given.slice or not agree(given.layout, found.layout):
        return f"{declared}, found {described(found, name=False)}{_differing_axes(given.layout, found.layout)}"
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
    """Which stored axes hold something else. The two layouts may have the same shape (n, m, n_d)."""
    if given.flattened != found.flattened:
        return ""
    pairs = enumerate(zip(given.stored_axes, found.stored_axes, strict=True))
    held = [f"axis {axis} of the parameter holds {b}, not {a}" for axis, (a, b) in pairs if a != b]
    return f": {'; '.join(held)} (i input, o output, d basis)" if held else ""
