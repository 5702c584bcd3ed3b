"""Finds the scale of a coefficient tensor: a parameter by which the layer multiplies it before the contraction."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from math import prod

import torch
from torch import nn

from ..coefficients import Layout
from ..coefficients.layout import GROUP
from .probe import Probe, uniform


def scale_of(
    probe: Probe, path: str, frontier: tuple[int, ...], layout: Layout
) -> tuple[str, str] | tuple[None, None]:
    """The path and layout of the scale of the parameter at `path`, or (None, None) if it has no scale."""
    value = probe.values[path]
    scaled = probe.meeting(path, frontier).of_parameter
    others = [p for p, v in probe.values.items() if p != path and any(probe.base.depends(k, v) for k in scaled)]
    if not others or layout.flattened:
        return None, None
    changed = {p: nn.Parameter(uniform(probe.values[p].shape, value, probe.random)) for p in others}
    run = probe.run(probe.x, changed)
    products = [run.tensors[k] for k in scaled]
    (factor,) = probe.gradient(products, [value], list(map(torch.ones_like, products)))
    for other in others:
        for pattern in _scale_patterns(layout, changed[other].shape):
            expanded = layout.expansion(pattern)(changed[other].detach())
            if torch.allclose(expanded, factor, rtol=probe.precision.affine, atol=0):
                return other, pattern
    return None, None


def _scale_patterns(layout: Layout, shape: torch.Size) -> Iterator[str]:
    """The layouts that consist of some axes of `layout` and fit `shape`."""
    groups = GROUP.findall(layout.pattern)
    parts = {group: group.strip("()").split() for group in groups} | {axis: [axis] for axis in layout.sizes}
    for chosen in permutations(parts, len(shape)):
        axes = [axis for part in chosen for axis in parts[part]]
        sizes = [prod(layout.sizes[axis] for axis in parts[part]) for part in chosen]
        if axes and len(set(axes)) == len(axes) and sizes == list(shape):
            yield " ".join(chosen)
