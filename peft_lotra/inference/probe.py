"""Runs one layer on one sample with changed parameters or inputs, and analyses the recorded tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..coefficients import Layout
from ..preserved import reached
from .layouts import Precision, Refused, axes_of
from .recording import Call, Passes, Run, is_numeric, tensors_in

Tensors = Sequence[torch.Tensor]
Test = tuple[tuple[str, ...], tuple[int, ...]]  # parameters that are tested together, and their tensors z

VECTOR = "it is a vector no longer than an axis of the input or output"


class Inputs(NamedTuple):
    """u, the last tensors before the basis: one tensor, or several of one shape."""

    numbers: tuple[int, ...]  # among the recorded tensors
    joined: bool = True  # whether several u hold consecutive features, as in a grouped layer; else they hold the same


class Meeting(NamedTuple):
    """Where a parameter meets x, as numbers of recorded tensors."""

    products: set[int]  # the first tensors that depend on both
    of_x: set[int]  # what x has become in these products
    of_parameter: set[int]  # what the parameter has become in them


class Unusable(Exception):
    """The layer cannot be tested in this precision."""


class Underivable(Unusable):
    """A backward pass through the layer fails."""


class Probe:
    """A layer and its sample in one precision. The probe varies one of the inputs, x.

    Attributes:
        values: the tensors in place of the layer's parameters, by path.
        x, base: the values of the varied input, and the run on them.
    """

    def __init__(
        self, layer: nn.Module, call: Call, precision: Precision, which: int, passes: Passes, repeats: bool = True
    ):
        """If `repeats`, the layer runs twice, to check that it is deterministic."""
        self.layer, self.precision, self.which, self._passes = layer, precision, which, passes
        self.random = torch.Generator().manual_seed(0)
        dtype = precision.dtype
        self.values = {}
        for path, parameter in layer.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                value = parameter.detach().to(dtype, copy=True)
                # Zeros would hide what they multiply.
                self.values[path] = nn.Parameter(value if value.any() else self._noise(value))

        def converted(t: torch.Tensor) -> torch.Tensor:
            kind = dtype.to_complex() if t.is_complex() else dtype if t.is_floating_point() else None
            return t.detach().to(kind)

        self._call = tree_map_only(torch.Tensor, converted, call)
        tensors = tensors_in(self._call)
        self._position = [k for k, t in enumerate(tensors) if is_numeric(t)][which]
        self._changed: dict[tuple[str, ...], list[Run]] = {}
        self.x = self._spread(tensors[self._position], grow=len(tensors) == 1)
        try:
            self.base = self._checked_run()
        except Unusable:  # for example if the layer needs the sample's number of rows
            self.x = tensors[self._position]
            self.base = self._checked_run()
        if repeats:
            for one, two in zip(self.base.returned, self.run(self.x).returned, strict=False):
                if one.shape != two.shape or _largest(one - two) > precision.affine * _largest(one):
                    raise Unusable("its layer is random: two runs on the same input differ, although in eval mode")

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self.random, dtype=torch.float64).to(like)

    def _spread(self, x: torch.Tensor, grow: bool) -> torch.Tensor:
        """Values like those of x, without repetitions. If `grow`, they have enough rows to reach most functions."""
        rows = x.shape[0] if x.ndim else 0
        if grow and x.ndim > 1:
            places = x[0].numel() // max(x.shape[1:])  # at least, for any feature axis
            enough = max(2, -(-32 // places))
            rows = min(rows, max(enough, 2**15 // x[0].numel())) if rows >= enough else enough
        shape = (rows, *x.shape[1:]) if x.ndim else x.shape
        mixed = from_pool = x.flatten()[torch.randint(x.numel(), shape, generator=self.random).to(x.device)]
        if x.ndim > 1:  # take some values from the same place in the sample, since features may differ in range
            own = x.gather(0, torch.randint(x.shape[0], shape, generator=self.random).to(x.device))
            share = 0.5 + min(1.0, 4 / x.shape[0])
            mixed = torch.where(uniform(shape, x, self.random) < share, from_pool, own)
        return mixed + 0.1 * _spacing(x, 0.5) * (uniform(shape, x, self.random) - 1)

    def _checked_run(self) -> Run:
        run = self.run(self.x)
        if not run.returned:
            raise Unusable("its layer returns no floating-point tensor")
        if self.precision.dtype == torch.float64 and any(t.real.dtype == torch.float32 for t in run.tensors):
            raise Unusable("its layer computes in float32")
        if not all(t.isfinite().all() for t in run.returned):
            raise Unusable("its layer returns infinite or undefined numbers on this sample")
        return run

    def run(self, x: torch.Tensor, changed: dict[str, nn.Parameter] | None = None) -> Run:
        """The run on other values of the varied input, with other values of some parameters."""
        leaf = x.detach().clone().requires_grad_(True)
        varied = leaf.clone()  # the layer may change its input in place
        place = count()
        call = tree_map_only(
            torch.Tensor, lambda t: varied if next(place) == self._position else t.clone(), self._call
        )
        self._passes.forward += 1
        try:
            return Run(self.layer, call, varied, leaf, self.values | (changed or {}), self.precision.dtype)
        except Exception as error:  # any error of the layer
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            raise Unusable(f"its layer fails on this sample: {text}") from None

    def gradient(
        self, outputs: Tensors, inputs: Tensors, weights: Tensors, again: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """∂/∂inputs Σ weights · outputs. If `again`, the results can be differentiated."""
        self._passes.backward += 1
        try:
            return torch.autograd.grad(
                outputs, inputs, weights, retain_graph=True, create_graph=again, materialize_grads=True
            )
        except Exception as error:  # any error of the layer's own functions, or a tensor was changed in place
            raise Underivable(f"it cannot be tested: {type(error).__name__}: {error}") from None

    def moved(self, t: torch.Tensor) -> list[Run]:
        """The runs at x + εt and x − εt."""
        step = 1e-5 * _spacing(self.x, 1) * t
        return self._alike([self.run(self.x + step), self.run(self.x - step)])

    def _perturbed(self, paths: tuple[str, ...]) -> list[Run]:
        """The runs at P ± δ for all parameters P in `paths`."""
        if paths not in self._changed:
            before = {path: self.values[path].detach() for path in paths}
            steps = {path: self._noise(v) * (v.square().mean().sqrt()) for path, v in before.items()}
            changed = [{path: nn.Parameter(v + s * steps[path]) for path, v in before.items()} for s in (1, -1)]
            self._changed[paths] = self._alike([self.run(self.x, values) for values in changed])
        return self._changed[paths]

    def _alike(self, runs: list[Run]) -> list[Run]:
        if any([t.shape for t in run.tensors] != [t.shape for t in self.base.tensors] for run in runs):
            raise Refused("its layer takes other steps when its input or this parameter changes")
        return runs

    def contractions(self, path: str) -> tuple[int, ...]:
        """The last tensors on the way to the parameter's first output that are affine in it, by number."""
        if path in self.base.reassigned:
            raise Refused("the forward pass assigns it anew, so that an adapter would be lost", of_class=True)
        value = self.values[path]
        if value.dim() == 1 and value.numel() <= max(max(t.shape, default=1) for t in [self.x, *self.base.returned]):
            raise Refused(VECTOR, of_class=True)
        output = next((k for k in self.base.outputs if self.base.depends(k, value)), None)
        if output is None:
            parameter = self.layer.get_parameter(path)
            if any(self.base.depends(k, parameter) for k in self.base.outputs):
                raise Refused("the forward pass reads it through an alias, so that an adapter would be ignored")
            raise Refused("no output responds to it")
        # A tensor that is affine in several parameters together is affine in each. Parameters of one shape share runs.
        alike = tuple(other for other, v in self.values.items() if v.shape == value.shape)
        for paths in dict.fromkeys([alike, (path,)]):
            found = self._last_affine(value, output, *self._perturbed(paths))
            if found and all(map(self.base.moves, found)):
                return tuple(sorted(found))
        raise Refused("the layer is not affine in it, or not through functions of the input")

    def _last_affine(self, value: torch.Tensor, output: int, plus: Run, minus: Run) -> set[int]:
        """The last tensors on the way to the output for which 2 z(P) = z(P + δ) + z(P − δ)."""

        @cache
        def affine(k: int) -> bool:
            one, middle, two = (run.tensors[k] for run in (plus, self.base, minus))
            return _largest(one + two - 2 * middle) <= self.precision.affine * _largest(one - middle)

        return set(filter(affine, reached([output], lambda k: [] if affine(k) else self._sources_in(k, value))))

    def _sources_in(self, number: int, value: torch.Tensor) -> list[int]:
        """The sources of a recorded tensor that depend on the parameter."""
        return [k for k in self.base.sources[number] if self.base.depends(k, value)]

    def meeting(self, path: str, frontier: tuple[int, ...]) -> Meeting:
        run, value = self.base, self.values[path]

        def depends_on_both(numbers: Iterable[int]) -> list[int]:
            return [k for k in numbers if run.moves(k) and run.depends(k, value)]

        both = reached(depends_on_both(frontier), lambda k: depends_on_both(run.sources[k]))
        of_parameter = {k: {s for s in self._sources_in(k, value) if not run.moves(s)} for k in both}
        products = {k for k in both if of_parameter[k]}
        of_x = {s for k in products for s in run.sources[k] if run.moves(s) and not run.depends(s, value)}
        return Meeting(products, of_x, set().union(*of_parameter.values()))

    def first_contraction(self, path: str, frontier: tuple[int, ...]) -> tuple[int, ...]:
        """The tensors in which the parameter meets x, to be used as z. A grouped layer has one for each group."""
        z = tuple(sorted(self.meeting(path, frontier).products))
        plus_minus = next(runs for paths, runs in reversed(self._changed.items()) if path in paths)
        if not z or any(self._last_affine(self.values[path], k, *plus_minus) != {k} for k in z):
            raise Refused("its entries cannot be told apart by output")
        return z

    def groups(self, z: dict[str, tuple[int, ...]]) -> list[Test]:
        """Parameters that can be tested together, with the tensors z."""
        by_shape: dict[torch.Size, list[str]] = {}
        for path in z:
            by_shape.setdefault(self.values[path].shape, []).append(path)
        found: dict[tuple[tuple[int, ...], Any], list[str]] = {}
        for shape, paths in by_shape.items():
            apart = not any(
                self.base.depends(k, self.values[p]) for p in paths for q in paths if z[p] != z[q] for k in z[q]
            )  # true for the weights of the groups of a grouped layer
            union = tuple(sorted({k for path in paths for k in z[path]}))
            for path in paths:
                tensors = union if apart else z[path]
                together = shape if apart and len(paths) > 1 else self._input_of(self.meeting(path, tensors).of_x)
                found.setdefault((tensors, together), []).append(path)
        return [(tuple(paths), tensors) for (tensors, _), paths in found.items()]

    def inputs_of(self, paths: tuple[str, ...], frontier: tuple[int, ...]) -> list[Inputs]:
        """Possible u of these parameters, the likeliest first: one tensor, or one for each function of x."""
        tensors, sides = self.base.tensors, set().union(*(self.meeting(path, frontier).of_x for path in paths))
        found = [Inputs((self._input_of(sides),))]
        each = self._inputs_of_each(sides)
        shapes = sorted((tensors[u].shape for u in each), key=len)
        alike = all(shape == shapes[0] + (1,) * (len(shape) - len(shapes[0])) for shape in shapes)
        nested = any({*each} & (self.base.ancestors([u]) - {u}) for u in each)
        if len(each) > 1 and 0 not in each and alike and not nested:
            # Tensors from disjoint parts of x probably hold different features. The other case is tried last.
            parts = []  # the entries of x on which each u depends
            for u in map(tensors.__getitem__, each):
                weights = uniform(u.shape, u, self.random).to(u.dtype)
                parts.append(self.gradient([u], [self.base.x], [weights])[0] != 0)
            joined = int(torch.stack(parts).sum(0).max()) == 1
            found += [Inputs(each, joined), Inputs(each, not joined)]
        return found

    def _inputs_of_each(self, sides: set[int]) -> tuple[int, ...]:
        """The number of u of each function of x, or the numbers of u of the functions that it is composed of."""

        def parts(side: int) -> list[int]:
            return [k for k in self.base.sources[side] if self.base.moves(k)]

        u = cache(lambda side: self._input_of({side}))
        visited = reached(sides, lambda side: [] if u(side) else parts(side))
        return tuple(sorted({u(side) for side in visited if u(side) or not parts(side)}))

    def _input_of(self, sides: set[int]) -> int:
        """The number of u, the last tensor no larger than x on all paths from x to these functions (0 is x itself)."""
        run, tensors = self.base, self.base.tensors
        most = min(self.x.numel(), sum(tensors[k].numel() for k in sides) // 2)
        before = run.ancestors(sides)
        for u in sorted(before - {0} - run.overwritten, reverse=True):
            if 0 < tensors[u].numel() <= most and 0 in before and 0 not in run.ancestors(sides, without={u}):
                return u if is_numeric(tensors[u]) and not self._is_x(u) else 0
        return 0

    def _is_x(self, number: int) -> bool:
        """Whether a recorded tensor has the values of x."""
        tensor = self.base.tensors[number]
        return tensor.numel() == self.x.numel() and torch.equal(tensor.flatten(), self.x.flatten())

    def scale_of(self, path: str, frontier: tuple[int, ...], layout: Layout) -> tuple[str, str] | tuple[None, None]:
        """The path and layout of the parameter by which the layer multiplies this one first; (None, None): of none."""
        value = self.values[path]
        scaled = self.meeting(path, frontier).of_parameter
        others = [p for p, v in self.values.items() if p != path and any(self.base.depends(k, v) for k in scaled)]
        if not others or layout.flattened:
            return None, None
        changed = {p: nn.Parameter(uniform(self.values[p].shape, value, self.random)) for p in others}
        run = self.run(self.x, changed)
        products = [run.tensors[k] for k in scaled]
        (factor,) = self.gradient(products, [value], list(map(torch.ones_like, products)))
        for other, scale in changed.items():
            for pattern in axes_of(layout, scale.shape):
                expanded = layout.expansion(pattern)(scale.detach())
                if torch.allclose(expanded, factor, rtol=self.precision.affine, atol=0):
                    return other, pattern
        return None, None

    def sees_x(self, path: str, frontier: tuple[int, ...]) -> bool:
        """Whether the parameter multiplies x itself."""
        sides = self.meeting(path, frontier).of_x
        return bool(sides) and all(map(self._is_x, sides))

    def shaping(self, path: str, frontier: tuple[int, ...]) -> list[str]:
        """Other parameters that give each entry of this parameter its own function, as in Wav-KAN."""
        value, tensors = self.values[path], self.base.tensors
        sides = [k for k in self.meeting(path, frontier).of_x if tensors[k].ndim > value.ndim]
        edges = [k for k in sides if tensors[k].shape[-value.ndim :] == value.shape]
        within = self.base.ancestors(edges)
        alike = [other for other, v in self.values.items() if v.shape == value.shape and other != path]
        return [other for other in alike if self._is_in(within, other)]

    def in_basis(self, path: str, frontier: tuple[int, ...], u: Collection[int], other: str) -> bool:
        """Whether the functions of u that the parameter multiplies depend on the parameter `other`."""
        return self._is_in(self.base.ancestors(self.meeting(path, frontier).of_x, without=u), other)

    def _is_in(self, numbers: set[int], path: str) -> bool:
        return any(self.base.tensors[k] is self.values[path] for k in numbers)


def uniform(shape: Iterable[int], like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random numbers, uniform in [0.5, 1.5] and real even if `like` is complex."""
    return (torch.rand(tuple(shape), generator=random, dtype=torch.float64) + 0.5).to(like.device, like.real.dtype)


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _spacing(x: torch.Tensor, otherwise: float) -> torch.Tensor | float:
    """The standard deviation, or `otherwise` if all entries are equal."""
    return x.std() if x.numel() > 1 and x.std() > 0 else otherwise
