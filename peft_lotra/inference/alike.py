"""Layers alike in class, settings and shapes: the first is tested, the others confirm what was found there."""

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
    """Findings of the layers of one model; what one layer has shown, others like it have only to confirm."""

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
        """`infer_layer`, or, after a layer alike, its findings if one pass of this layer bears them out.

        Where nothing was found, for a reason that may be owed to the sample or to values, the layer is tested itself.
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
    """What is equal in layers that are alike: classes, attributes, shapes and dtypes, not values of tensors."""
    modules = []
    for name, module in layer.named_modules():
        held = {key: value for key, value in vars(module).items() if key not in ("forward", "_modules")}
        modules.append((name, type(module), held))
    return map_tensors([modules, call], lambda t: (t.shape, t.dtype, t.device, type(t)))


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one == two)
    except Exception:  # such as an attribute that is an array
        return False
