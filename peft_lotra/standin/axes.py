"""The named axes of a coefficient tensor, followed through every view that a layer takes of it.

A layer writes `weight.view(o, -1)` or `coeffs[0:1].transpose(1, 2)`. Each axis of the result is a sequence of atoms:
pieces of the modes i, o, d, g, t, h, w that are flattened on it. All values are hashable, and none is a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch

from ..coefficients.layout import Arrangement, part_number
from ..coefficients.spec import CoefficientSpec, parse_slice

MODES = ("i", "o", "d", "g", "t", "h", "w")
NEW = ""  # the mode of an axis that a view added

Function = TypeVar("Function", bound=Callable[..., Any])


def planned(function: Function) -> Function:
    """Cache a pure function of hashable arguments.

    torch.compile and torch.export trace the function without the cache. Sizes that they keep open are None in its
    arguments.
    """
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


class Atom(NamedTuple):
    """`size` entries of a mode. Neighbours are `stride` rows of the mode's factor apart."""

    mode: str
    size: int
    stride: int


class Axis(NamedTuple):
    """Atoms flattened on one axis, with `before` and `after` entries around them that are no coefficients."""

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
    """Where a mode lies: `axis` is (before, size, after) flattened, and the mode is the part `size`."""

    axis: int
    before: int
    size: int
    after: int


Rows = range | tuple[int, ...] | None  # rows of a factor, in order; None: all rows


class Axes(NamedTuple):
    """The axes of a view, and for each mode the row of its factor at which the view begins."""

    axes: tuple[Axis, ...]
    starts: tuple[tuple[str, int], ...]

    def place(self, mode: str, ranks: Mapping[str, int] | None = None) -> Place | None:
        """Where `mode` lies if it is one piece on one axis, else None; `ranks` as for `arrangement`."""
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

    def modes(self) -> tuple[str, ...]:
        """The modes of the whole tensor, in the order of `MODES`; i, o and d come first."""
        return tuple([mode for mode, _ in self.starts])

    def size(self, mode: str) -> int:
        """How many rows of the mode's factor this view shows."""
        return math.prod([atom.size for axis in self.axes for atom in axis.atoms if atom.mode == mode])

    def shape(self) -> tuple[int, ...]:
        """How many rows of each mode this view shows, (n, m, n_d, ...)."""
        return tuple([self.size(mode) for mode in self.modes()])

    def rows(self, mode: str, count: int) -> Rows:
        """The rows of a factor of `count` rows that this view shows, in the view's order."""
        rows = [dict(self.starts)[mode]]
        for atom in [atom for axis in self.axes for atom in axis.atoms if atom.mode == mode]:
            rows = [row + atom.stride * k for row in rows for k in range(atom.size)]
        if rows == list(range(count)):
            return None
        consecutive = range(rows[0], rows[-1] + 1)
        return consecutive if rows == list(consecutive) else tuple(rows)

    def arrangement(self, ranks: Mapping[str, int], flat: int | None = None) -> Arrangement:
        """How a tensor with one axis per mode, (i, o, d, ...), is laid out like this view.

        Args:
            ranks: the ranks of modes that the tensor has ranks in place of. A rank takes the place of the first atom.
            flat: flatten the result from this axis on.
        """
        modes: dict[str, list[str]] = {mode: [] for mode in self.modes()}  # the names of atoms
        axes: list[list[str]] = []
        sizes: dict[str, int] = {}
        padding: list[int] = []
        for axis in self.axes:
            names = []
            for mode, size, _ in axis.atoms:
                if mode in ranks and modes[mode]:
                    continue
                name = f"{mode or 'new'}{len(sizes)}"
                sizes[name] = ranks.get(mode, size)
                if mode != NEW:
                    modes[mode].append(name)
                names.append(name)
            axes.append(names)
            padding = [axis.before, axis.after, *padding]  # no rank lies on a padded axis
        if flat is not None and not any(padding):
            axes, flat = [*axes[:flat], sum(axes[flat:], [])], None
        return Arrangement.of(sum(modes.values(), []), axes, sizes, tuple(padding) if any(padding) else (), flat)

    def permuted(self, order: Sequence[int]) -> Axes:
        return self._replace(axes=tuple(self.axes[k] for k in order))

    def expanded(self, shape: Sequence[int]) -> Axes | None:
        """The axes after broadcasting to `shape`."""
        axes = [Axis((Atom(NEW, size, 0),)) for size in shape[: len(shape) - len(self.axes)]]
        for axis, size in zip(self.axes, shape[len(axes) :], strict=True):
            axes.append(axis if axis.size == size else Axis((Atom(NEW, size, 0),)))
        return self._replace(axes=tuple(axes))


@planned
def parameter_axes(spec: CoefficientSpec, shape: tuple[int, ...]) -> Axes:
    """The axes of the parameter itself, or of its `flat` form if the layout has a star."""
    sizes = spec.layout.sizes
    axes = []
    for group in spec.axes:
        atoms = []
        for name in group:
            # The parts of a mode are joined in the order of their numbers. Later parts vary faster.
            later = [sizes[part] for part in sizes if part[0] == name[0] and part_number(part) > part_number(name)]
            atoms.append(Atom(name[0], sizes[name], math.prod(later)))
        axes.append(Axis(tuple(atoms)))
    for k, part in enumerate(parse_slice(spec.slice) if spec.slice is not None else ()):
        start, stop, _ = part.indices(shape[k])
        axes[k] = axes[k]._replace(before=start, after=shape[k] - stop)
    present = {name[0] for name in sizes}
    return Axes(tuple(axes), tuple([(mode, 0) for mode in MODES if mode in present]))


_BESIDE = Axis(())
BESIDE = Axes((), ())


@planned
def reshaped(view: Axes, shape: tuple[int, ...]) -> Axes | None:
    """The axes of a view after a reshape to `shape`; None if an atom would be cut unevenly, or an axis is padded."""
    if any([axis.is_padded for axis in view.axes]):
        return view if shape == tuple([axis.size for axis in view.axes]) else None
    # Atoms of one entry may be dropped, except that the output axis is looked up by its name.
    pieces = [atom for axis in view.axes for atom in axis.atoms if atom.size > 1 or atom.mode == "o"][::-1]
    axes = []
    for position, size in enumerate(shape):
        last = position == len(shape) - 1
        group: list[Atom] = []
        filled = 1
        while pieces and (filled < size or (not group and pieces[-1].size == 1) or last):
            piece = pieces.pop()
            rest = size // filled
            if rest % piece.size:
                if piece.size % rest:
                    return None
                inner = piece.size // rest
                pieces.append(Atom(piece.mode, inner, piece.stride))
                piece = Atom(piece.mode, rest, piece.stride * inner)
            group.append(piece)
            filled *= piece.size
        if filled != size:
            return None
        axes.append(Axis(tuple(group)))
    return None if pieces else view._replace(axes=tuple(axes))


@planned
def indexed(view: Axes, index: tuple[Any, ...]) -> Axes | None:
    """The axes of a view after basic indexing with integers, (start, stop, step) of slices, None and Ellipsis.

    None if atoms cannot describe the result. `BESIDE` if it has no coefficients, only entries packed beside them.
    """
    given = sum(part is not None and part is not Ellipsis for part in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    axes: list[Axis] = []
    starts = dict(view.starts)
    rest = list(view.axes)
    for part in index:
        if part is None:
            axes.append(Axis((Atom(NEW, 1, 0),)))
        elif part is Ellipsis:
            whole = len(view.axes) - given
            axes += rest[:whole]
            rest = rest[whole:]
        else:
            axis = rest.pop(0)
            is_slice = isinstance(part, tuple)
            rows = range(axis.size)[slice(*part)] if is_slice else range(axis.size)[part:][:1]
            narrowed = _narrowed(axis, rows, starts)
            if narrowed is None or narrowed is _BESIDE:
                return None if narrowed is None else BESIDE
            if is_slice:
                axes.append(narrowed)
    return Axes(tuple(axes), tuple(starts.items()))


def _narrowed(axis: Axis, rows: range, starts: dict[str, int]) -> Axis | None:
    """The axis restricted to `rows`; `_BESIDE` if these have no coefficients. `starts` gets the new first row."""
    if rows == range(axis.size):
        return axis
    step = rows.step if len(rows) > 1 else 1
    if not (rows and axis.atoms) or (step > 1 and axis.is_padded):
        return None
    start, stop = max(rows[0], axis.before), min(rows[-1] + 1, axis.before + axis.inner)
    if stop <= start:
        return _BESIDE
    before, after = start - rows[0], rows[-1] + 1 - stop
    first, *others = axis.atoms
    block = math.prod([atom.size for atom in others])
    start, stop = start - axis.before, stop - axis.before
    if start % block or stop % block or (others and step > 1):
        return None
    if first.mode != NEW:
        starts[first.mode] += start // block * first.stride
    count = len(rows) if step > 1 else (stop - start) // block
    return Axis((Atom(first.mode, count, first.stride * step), *others), before, after)
