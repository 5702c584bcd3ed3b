"""Tests one of several layers that are alike in class, settings and shapes; the others only confirm its findings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .precision import Passes
from .recording import map_tensors
from .response import Finding, confirm_layer, infer_layer
from .walk import Call


@dataclass
class LayerTests:
    """The findings of the layers of one model. A layer that is like a tested one only confirms its findings."""

    _known: dict[type, list[tuple[Any, str, dict[str, Finding]]]] = field(default_factory=dict)

    def findings(
        self,
        name: str,
        layer: nn.Module,
        call: Call,
        paths: Iterable[str],
        passes: Passes,
        region: str | None = None,
    ) -> dict[str, Finding]:
        """The findings of a tested layer that is like `layer`, if `layer` confirms them; else those of `infer_layer`.

        Findings without a coefficient tensor are reused only if their reasons hold for the whole class.
        """
        paths = list(paths)
        known = self._known.setdefault(type(layer), [])
        likeness = [_likeness(layer, call), paths, region]
        for other, of, findings in known:
            if _equal(other, likeness) and confirm_layer(layer, *call, findings, passes):
                return {path: replace(finding, like=of) for path, finding in findings.items()}
        findings = infer_layer(layer, *call, paths, passes, region)
        found = any(finding.spec for finding in findings.values())
        if found or all(finding.of_class for finding in findings.values()):
            known.append((likeness, name, findings))
        return findings


def _likeness(layer: nn.Module, call: Call) -> Any:
    """What is equal in layers that are alike: classes, attributes, shapes and dtypes, but not the tensors' values."""
    modules = []
    for name, module in layer.named_modules():
        held = {key: value for key, value in vars(module).items() if key not in ("forward", "_modules")}
        modules.append((name, type(module), held))
    return map_tensors([modules, call], lambda t: (t.shape, t.dtype, t.device, type(t)))


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one == two)
    except Exception:  # for example if an attribute is an array
        return False
