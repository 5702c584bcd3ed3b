"""The named axes of a coefficient tensor, followed through every view that a layer takes of it.

A layer writes `weight.view(o, -1)` or `coeffs[0:1].transpose(1, 2)`. Each axis of the result is known as a row of
atoms: pieces of the modes i, o, d, g, t, h, w that lie flattened on it. Plain Python, no tensors of A's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..coefficients.spec import CoefficientSpec, parse_slice

MODES = ("i", "o", "d", "g", "t", "h", "w")
NEW = ""  # the mode of an axis that a view added


class Atom(NamedTuple):
    """`size` entries of a mode, `stride` rows of its factor apart."""

    mode: str
    size: int
    stride: int


class Axis(NamedTuple):
    """Atoms flattened on one axis, with entries beside them that belong to no coefficient (a packed parameter)."""

    atoms: tuple[Atom, ...]
    before: int = 0
    after: int = 0

    @property
    def is_padded(self) -> bool:
        return bool(self.before or self.after)

    @property
    def inner(self) -> int:
        return math.prod([atom.size for atom in self.atoms])

    @property
    def size(self) -> int:
        return self.before + self.inner + self.after


class Place(NamedTuple):
    """Where a mode lies: on `axis`, `size` entries with `before` · · · `after` others flattened around them."""

    axis: int
    before: int
    size: int
    after: int


class Axes(NamedTuple):
    """All axes of a view, and for each mode the row of its factor at which the view begins."""

    axes: tuple[Axis, ...]
    starts: dict[str, int]

    @classmethod
    def of(cls, spec: CoefficientSpec, shape: torch.Size) -> Axes:
        """The axes of the parameter itself."""
        arguments = spec.axes, tuple(spec.layout.sizes.items()), spec.slice, tuple(shape)
        return (_parameter_axes if torch.compiler.is_compiling() else _cached_axes)(*arguments)

    def place(self, mode: str, ranks: Mapping[str, int] | None = None) -> Place | None:
        """Where `mode` lies if it lies on one axis in one piece, else None; `ranks` as in `arrange`."""
        found = [k for k, axis in enumerate(self.axes) if any(atom.mode == mode for atom in axis.atoms)]
        if len(found) != 1:
            return None
        atoms = self.axes[found[0]].atoms
        own = [k for k, atom in enumerate(atoms) if atom.mode == mode]
        first, last = own[0], own[-1] + 1
        if last - first > len(own):
            return None
        sizes = [atom.size for atom in atoms]
        for other, rank in (ranks or {}).items():
            replaced = [k for k, atom in enumerate(atoms) if atom.mode == other]
            for k in replaced:
                sizes[k] = rank if k == replaced[0] else 1
        return Place(found[0], math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:]))

    def rows(self, factor: torch.Tensor, mode: str, dim: int = 0) -> torch.Tensor:
        """The rows of a factor that this view shows, in the view's order, along `dim`."""
        atoms = [atom for axis in self.axes for atom in axis.atoms if atom.mode == mode]
        whole = 1
        for atom in reversed(atoms):
            whole = whole * atom.size if atom.stride == whole or atom.size == 1 else math.inf
        if self.starts[mode] == 0 and whole == factor.shape[dim]:
            return factor
        rows = torch.tensor([self.starts[mode]], device=factor.device)
        for _, size, stride in atoms:
            rows = (rows[:, None] + stride * torch.arange(size, device=factor.device)).flatten()
        return factor.index_select(dim, rows)

    def arrange(self, tensor: torch.Tensor, ranks: Mapping[str, int]) -> torch.Tensor:
        """A tensor with one axis per mode, in the order of `MODES`, laid out like this view.

        Args:
            tensor: shape (i, o, d, ...): the rows of each mode that the view shows, modes of `ranks` excepted.
            ranks: modes that are replaced by a rank, and the rank; each takes the place of the mode's first atom.
        """
        parts: dict[str, list[int]] = {mode: [] for mode in MODES}  # sizes of a mode's atoms
        order, atoms, shape = [], [], []  # labels of atoms as they come; their sizes; the sizes of the axes
        for axis in self.axes:
            size = 1
            for mode, length, _ in axis.atoms:
                if mode in ranks:
                    if parts[mode]:
                        continue
                    length = ranks[mode]
                if mode != NEW:
                    order.append((mode, len(parts[mode])))
                    parts[mode].append(length)
                atoms.append((mode, length))
                size *= length
            shape.append(size)
        labels = [(mode, k) for mode in MODES for k in range(len(parts[mode]))]
        tensor = tensor.reshape([parts[mode][k] for mode, k in labels])
        tensor = tensor.permute([labels.index(label) for label in order])
        if any(mode == NEW and length > 1 for mode, length in atoms):
            tensor = tensor.reshape([1 if mode == NEW else length for mode, length in atoms])
            tensor = tensor.expand([length for _, length in atoms])
        tensor = tensor.reshape(shape)
        # On an axis whose mode became a rank, the entries beside the coefficients are those of the factor's rows.
        padding = [
            (axis.before, axis.after) if not any(atom.mode in ranks for atom in axis.atoms) else (0, 0)
            for axis in self.axes
        ]
        if any(pair != (0, 0) for pair in padding):
            tensor = torch.nn.functional.pad(tensor, [n for pair in reversed(padding) for n in pair])
        return tensor

    def permuted(self, order: list[int]) -> Axes:
        return self._replace(axes=tuple(self.axes[k] for k in order))

    def reshaped(self, shape: torch.Size) -> Axes | None:
        """The axes after a reshape to `shape`; None if it cuts an atom unevenly."""
        pieces: list[Atom | Axis] = []  # a padded axis is one piece
        for axis in self.axes:
            if axis.is_padded:
                pieces.append(axis)
            else:  # one entry is one row of its mode, wherever it lies; but an output axis is looked for by name
                pieces.extend(atom for atom in axis.atoms if atom.size > 1 or atom.mode == "o")
        pieces.reverse()
        axes = []
        for position, size in enumerate(shape):
            last = position == len(shape) - 1
            group: list[Atom | Axis] = []
            filled = 1
            while pieces and (filled < size or (not group and pieces[-1].size == 1) or last):
                piece = pieces.pop()
                rest = size // filled
                if rest % piece.size:
                    if isinstance(piece, Axis) or piece.size % rest:
                        return None
                    inner = piece.size // rest
                    pieces.append(Atom(piece.mode, inner, piece.stride))
                    piece = Atom(piece.mode, rest, piece.stride * inner)
                group.append(piece)
                filled *= piece.size
            if filled != size:
                return None
            packed = [piece for piece in group if isinstance(piece, Axis)]
            if packed and len(group) > 1:
                return None
            axes.append(packed[0] if packed else Axis(tuple(group)))
        return None if pieces else self._replace(axes=tuple(axes))

    def expanded(self, shape: torch.Size) -> Axes | None:
        """The axes after broadcasting to `shape`."""
        axes = [Axis((Atom(NEW, size, 0),)) for size in shape[: len(shape) - len(self.axes)]]
        for axis, size in zip(self.axes, shape[len(axes) :], strict=True):
            axes.append(axis if axis.size == size else Axis((Atom(NEW, size, 0),)))
        return self._replace(axes=tuple(axes))

    def indexed(self, index: tuple[Any, ...]) -> Axes | None:
        """The axes after basic indexing with integers, slices, None and Ellipsis.

        None if atoms cannot describe the result; `BESIDE` if it has no coefficients, only what is packed beside them.
        """
        given = sum(part is not None and part is not Ellipsis for part in index)
        if Ellipsis not in index:
            index = (*index, Ellipsis)
        axes: list[Axis] = []
        starts = dict(self.starts)
        rest = list(self.axes)
        for part in index:
            if part is None:
                axes.append(Axis((Atom(NEW, 1, 0),)))
            elif part is Ellipsis:
                whole = len(self.axes) - given
                axes += rest[:whole]
                rest = rest[whole:]
            else:
                axis = rest.pop(0)
                rows = range(axis.size)[part]
                narrowed = _narrowed(axis, rows if isinstance(part, slice) else range(rows, rows + 1), starts)
                if narrowed is None or narrowed is _BESIDE:
                    return None if narrowed is None else BESIDE
                if isinstance(part, slice):
                    axes.append(narrowed)
        return Axes(tuple(axes), starts)


def _parameter_axes(
    names: tuple[tuple[str, ...], ...], sizes: tuple[tuple[str, int], ...], region: str | None, shape: tuple[int, ...]
) -> Axes:
    axes = []
    for group in names:
        atoms = []
        for name in group:
            # A mode's parts are joined in the order of their numbers: the later ones vary faster.
            later = [size for part, size in sizes if part[0] == name[0] and _number(part) > _number(name)]
            atoms.append(Atom(name[0], dict(sizes)[name], math.prod(later)))
        axes.append(Axis(tuple(atoms)))
    if region is not None:
        for k, part in enumerate(parse_slice(region)):
            start, stop, _ = part.indices(shape[k])
            axes[k] = axes[k]._replace(before=start, after=shape[k] - stop)
    present = [name[0] for name, _ in sizes]
    return Axes(tuple(axes), {mode: 0 for mode in MODES if mode in present})


_cached_axes = lru_cache(maxsize=1024)(_parameter_axes)


def _number(part: str) -> int:
    return int(part[1:] or 0)


def expanded_scale(spec: CoefficientSpec, scale: torch.Tensor) -> torch.Tensor:
    """The declared scale, repeated to the parameter's shape as a view where that is possible."""
    sizes = spec.layout.sizes
    own = [name for group in spec.scale_axes for name in group]
    names = [name for group in spec.axes for name in group]
    scale = scale.reshape([sizes[name] for name in own]).permute([own.index(name) for name in names if name in own])
    scale = scale.reshape([sizes[name] if name in own else 1 for name in names])
    scale = scale.expand([sizes[name] for name in names])
    return scale.reshape([math.prod([sizes[name] for name in group]) for group in spec.axes])


_BESIDE = Axis(())
BESIDE = Axes((), {})


def _narrowed(axis: Axis, rows: range, starts: dict[str, int]) -> Axis | None:
    """The axis restricted to `rows`, its first row noted in `starts`; `_BESIDE` if `rows` has no coefficients."""
    if rows == range(axis.size):
        return axis
    step = rows.step if len(rows) > 1 else 1
    if step < 1 or not axis.atoms or not rows:
        return None
    start = max(rows.start - axis.before, 0)
    stop = min(rows.start + (len(rows) - 1) * step + 1 - axis.before, axis.inner)
    if stop <= start:
        return _BESIDE
    before = max(axis.before - rows.start, 0)
    after = max(len(rows) - before - (stop - start), 0) if step == 1 else 0
    if step > 1 and (axis.is_padded):
        return None
    first, *others = axis.atoms
    block = math.prod([atom.size for atom in others])
    if start == 0 and stop == axis.inner and step == 1:
        return Axis(axis.atoms, before, after)
    if others and (step > 1 or start % block or stop % block):
        return None
    if first.mode != NEW:
        starts[first.mode] += start // block * first.stride
    count = len(rows) if step > 1 else (stop - start) // block
    return Axis((Atom(first.mode, count, first.stride * step), *others), before, after)
