"""Finds the scale of a coefficient tensor: a parameter by which the layer multiplies it before the contraction."""

from __future__ import annotations

from itertools import permutations

import torch

from ..coefficients import Layout
from ..coefficients.spec import GROUP
from .probe import Probe


def scale_of(
    probe: Probe, path: str, frontier: tuple[int, ...], layout: Layout
) -> tuple[str, str] | tuple[None, None]:
    """The path and layout of the scale of the parameter at `path`, or (None, None) if it has no scale."""
    if layout.flattened:
        return None, None
    value = probe.values[path]
    numbers = {
        s
        for k in probe.ancestors(frontier)
        if probe.moves(k)
        for s in probe.base.sources[k]
        if probe.base.depends(s, value) and not probe.moves(s)
    }
    others = [p for p, v in probe.values.items() if p != path and any(probe.base.depends(k, v) for k in numbers)]
    if not others:
        return None, None
    changed = {p: probe.uniform(probe.values[p].shape, value).requires_grad_(True) for p in others}
    run = probe.run(probe.x, changed)
    products = [run.tensors[k] for k in numbers]
    factor = probe.gradients(products, [torch.ones_like(product) for product in products], [path])[path]
    for other in others:
        for pattern in _scale_patterns(layout, changed[other].shape):
            expanded = layout.expand(changed[other].detach(), pattern)
            if torch.allclose(expanded, factor, rtol=probe.precision.affine, atol=0):
                return other, pattern
    return None, None


def _scale_patterns(layout: Layout, shape: torch.Size) -> list[str]:
    """The layouts that consist of some axes of `layout` and fit `shape`."""
    groups = GROUP.findall(layout.pattern)
    parts = {group: group.strip("()").split() for group in groups} | {axis: [axis] for axis in layout.sizes}
    fits = []
    for chosen in permutations(parts, len(shape)):
        axes = [axis for part in chosen for axis in parts[part]]
        sizes = [torch.Size(layout.sizes[axis] for axis in parts[part]).numel() for part in chosen]
        if axes and len(set(axes)) == len(axes) and sizes == list(shape):
            fits.append(" ".join(chosen))
    return fits
