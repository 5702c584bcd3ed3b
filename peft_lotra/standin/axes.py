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


class Arrangement(NamedTuple):
    """The steps that lay out a tensor with one axis per mode, in the order of `MODES`, like a view; None: no step."""

    split: tuple[int, ...] | None  # reshape every mode into its atoms
    order: tuple[int, ...] | None  # permute the atoms into the view's order
    spread: tuple[tuple[int, ...], tuple[int, ...]] | None  # reshape and expand for axes that a view added
    shape: tuple[int, ...] | None  # reshape the atoms into axes
    padding: tuple[int, ...] | None  # pad by the entries beside the coefficients
    flat: int | None  # flatten from this axis on

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.split is not None:
            tensor = tensor.reshape(self.split)
        if self.order is not None:
            tensor = tensor.permute(self.order)
        if self.spread is not None:
            tensor = tensor.reshape(self.spread[0]).expand(self.spread[1])
        if self.shape is not None:
            tensor = tensor.reshape(self.shape)
        if self.padding is not None:
            tensor = torch.nn.functional.pad(tensor, self.padding)
        return tensor if self.flat is None else tensor.flatten(self.flat)


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

    def rows(self, mode: str, count: int) -> Rows:
        """The rows of a factor of `count` rows that this view shows, in the view's order."""
        rows = [dict(self.starts)[mode]]
        for atom in [atom for axis in self.axes for atom in axis.atoms if atom.mode == mode]:
            rows = [row + atom.stride * k for row in rows for k in range(atom.size)]
        if rows == list(range(count)):
            return None
        consecutive = range(rows[0], rows[-1] + 1)
        return consecutive if rows == list(consecutive) else tuple(rows)

    def arrangement(
        self, ranks: Mapping[str, int], given: tuple[int, ...] = (), flat: int | None = None
    ) -> Arrangement:
        """The steps that lay out a tensor with one axis per mode, (i, o, d, ...), like this view.

        Args:
            ranks: the ranks of modes that the tensor has ranks in place of. A rank takes the place of the first atom.
            given: the tensor's shape, if its axes are flattened otherwise.
            flat: flatten the result from this axis on.
        """
        parts: dict[str, list[int]] = {mode: [] for mode in self.modes()}  # the sizes of each mode's atoms
        order: list[tuple[str, int]] = []  # labels of the atoms, in the view's order
        atoms: list[tuple[str, int]] = []  # (mode, size) of the atoms, and of axes that a view added
        shape: list[int] = []
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
        labels = [(mode, k) for mode in self.modes() for k in range(len(parts[mode]))]
        # On an axis whose mode became a rank, the rows of the factor are padded instead.
        padding = [
            (axis.before, axis.after) if not any(atom.mode in ranks for atom in axis.atoms) else (0, 0)
            for axis in self.axes
        ]
        given = given or tuple([math.prod(sizes) for sizes in parts.values()])
        split = [parts[mode][k] for mode, k in labels]
        permutation = [labels.index(label) for label in order]
        permuted = [split[k] for k in permutation]
        if flat is not None and not any(map(any, padding)):
            shape = [*shape[:flat], math.prod(shape[flat:])]
        spread = None
        if any(mode == NEW and length > 1 for mode, length in atoms):
            spread = (
                tuple([1 if mode == NEW else length for mode, length in atoms]),
                tuple([length for _, length in atoms]),
            )
        if spread is None and permutation == sorted(permutation):  # one reshape does it all
            split = shape
        return Arrangement(
            None if tuple(split) == given else tuple(split),
            None if permutation == list(range(len(permutation))) else tuple(permutation),
            spread,
            None if spread is None and shape in (permuted, split) else tuple(shape),
            tuple([n for pair in reversed(padding) for n in pair]) if any(map(any, padding)) else None,
            flat if flat is not None and flat < len(shape) - 1 else None,
        )

    def permuted(self, order: Sequence[int]) -> Axes:
        return self._replace(axes=tuple(self.axes[k] for k in order))

    def reshaped(self, shape: Sequence[int]) -> Axes | None:
        """The axes after a reshape to `shape`; None if an atom would be cut unevenly."""
        pieces: list[Atom | Axis] = []  # a padded axis stays one piece
        for axis in self.axes:
            if axis.is_padded:
                pieces.append(axis)
            else:  # atoms of one entry may be dropped, except that the output axis is looked up by its name
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
            axes.append(packed[0] if packed else Axis(tuple([atom for atom in group if isinstance(atom, Atom)])))
        return None if pieces else self._replace(axes=tuple(axes))

    def expanded(self, shape: Sequence[int]) -> Axes | None:
        """The axes after broadcasting to `shape`."""
        axes = [Axis((Atom(NEW, size, 0),)) for size in shape[: len(shape) - len(self.axes)]]
        for axis, size in zip(self.axes, shape[len(axes) :], strict=True):
            axes.append(axis if axis.size == size else Axis((Atom(NEW, size, 0),)))
        return self._replace(axes=tuple(axes))

    def indexed(self, index: tuple[Any, ...]) -> Axes | None:
        """The axes after basic indexing with integers, slices, None and Ellipsis.

        None if atoms cannot describe the result. `BESIDE` if it has no coefficients, only entries packed beside them.
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
        return Axes(tuple(axes), tuple(starts.items()))


@planned
def parameter_axes(spec: CoefficientSpec, shape: tuple[int, ...]) -> Axes:
    """The axes of the parameter itself."""
    sizes, region = spec.layout.sizes.items(), spec.slice
    axes = []
    for group in spec.axes:
        atoms = []
        for name in group:
            # The parts of a mode are joined in the order of their numbers. Later parts vary faster.
            later = [size for part, size in sizes if part[0] == name[0] and _number(part) > _number(name)]
            atoms.append(Atom(name[0], spec.layout.sizes[name], math.prod(later)))
        axes.append(Axis(tuple(atoms)))
    if region is not None:
        for k, part in enumerate(parse_slice(region)):
            start, stop, _ = part.indices(shape[k])
            axes[k] = axes[k]._replace(before=start, after=shape[k] - stop)
    present = [name[0] for name, _ in sizes]
    return Axes(tuple(axes), tuple([(mode, 0) for mode in MODES if mode in present]))


def _number(part: str) -> int:
    return int(part[1:] or 0)


def spread_scale(spec: CoefficientSpec, scale: torch.Tensor) -> torch.Tensor:
    """The declared scale in a shape that broadcasts to the parameter's. Its product with A is the effective A."""
    return _scale_arrangement(spec)(scale)


@planned
def _scale_arrangement(spec: CoefficientSpec) -> Arrangement:
    size, axes, own = spec.layout.sizes, spec.axes, spec.scale_axes
    given = [name for group in own for name in group]
    names = [name for group in axes for name in group]
    order = [given.index(name) for name in names if name in given]
    # Along an axis of several names, the scale is repeated unless it has all of these names, or none.
    whole = all(len({name in given for name in group}) == 1 for group in axes)
    thin = tuple([size[name] if name in given else 1 for name in names])
    full = tuple([math.prod([size[name] for name in group if name in given or not whole]) for group in axes])
    return Arrangement(
        tuple([size[name] for name in given]) if any(len(group) > 1 for group in own) else None,
        tuple(order) if order != sorted(order) else None,
        None if whole else (thin, tuple([size[name] for name in names])),
        full,
        None,
        None,
    )


_BESIDE = Axis(())
BESIDE = Axes((), ())


def _narrowed(axis: Axis, rows: range, starts: dict[str, int]) -> Axis | None:
    """The axis restricted to `rows`; `_BESIDE` if these have no coefficients. `starts` gets the new first row."""
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
