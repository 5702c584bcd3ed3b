"""One layer on one sample: runs with changed parameters or inputs, and what they show about single parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import nn

from ..coefficients import Layout
from .layouts import Tolerance
from .recording import Run, map_tensors, tensors_in


@dataclass
class Passes:
    """How often layers were run forward and backward."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    affine: float
    tolerance: Tolerance


# In float64 where the layer can; some make float32 tensors of their own.
PRECISIONS = (
    Precision(torch.float64, 1e-7, Tolerance(ratio=1e-6, product=1e-7, zero=1e-9)),
    Precision(torch.float32, 1e-3, Tolerance(ratio=2e-3, product=1e-3, zero=1e-3)),
)

FINITE_DIFFERENCES = Tolerance(ratio=1e-3, product=1e-5, zero=1e-5)  # in float64


VECTOR = "it is a vector along one axis of the input or output"


class Refused(Exception):
    """A parameter cannot be tested further; `of_class`: nor can it in any layer of this class, settings and shapes."""

    def __init__(self, reason: str, of_class: bool = False):
        super().__init__(reason)
        self.of_class = of_class


class Unusable(Exception):
    """The layer cannot be tested in this precision."""


class Probe:
    """A layer with its sample at one precision; one of its inputs, x, is varied."""

    def __init__(
        self,
        layer: nn.Module,
        args: tuple,
        kwargs: dict,
        precision: Precision,
        which: int,
        passes: Passes,
        repeats: bool = True,
    ):
        """With `repeats`, the layer runs a second time, to see that it does the same."""
        self.layer, self.precision, self.which, self._passes = layer, precision, which, passes
        self._random = torch.Generator().manual_seed(0)
        dtype = precision.dtype
        self.values = {}
        for path, parameter in layer.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                value = parameter.detach().to(dtype, copy=True)
                if not value.any():  # a zero may hide what it multiplies
                    value = self._noise(value)
                self.values[path] = value.requires_grad_(True)
        self._args = map_tensors((args, kwargs), lambda t: t.detach().to(dtype if t.is_floating_point() else None))
        tensors = tensors_in(self._args)
        self._position = [k for k, t in enumerate(tensors) if t.is_floating_point() and t.numel()][which]
        self._changed: dict[tuple[str, ...], tuple[Run, Run]] = {}
        self._met: dict[tuple, tuple[set[int], set[int]]] = {}
        given = tensors[self._position]
        self.x, self.base = self._first_run([self._spread(given, grow=len(tensors) == 1), given])
        if repeats:
            self._check_repeats()

    @property
    def trace(self) -> tuple:
        """The shapes of the recorded tensors and what each was made of: equal where a layer took equal steps."""
        return tuple(t.shape for t in self.base.tensors), tuple(map(tuple, self.base.sources))

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self._random, dtype=torch.float64).to(like)

    def seed(self, seed: int) -> None:
        self._random.manual_seed(seed)

    def choice(self, size: int, count: int) -> torch.Tensor:
        return torch.randint(size, (count,), generator=self._random)

    def uniform(self, shape: Iterable[int], like: torch.Tensor) -> torch.Tensor:
        """Uniform in [0.5, 1.5]."""
        return (torch.rand(tuple(shape), generator=self._random, dtype=torch.float64) + 0.5).to(like)

    def _spread(self, x: torch.Tensor, grow: bool) -> torch.Tensor:
        """Values like those of x, but none twice, in enough rows for most of the basis functions to be met."""
        rows = x.shape[0] if x.ndim else 0
        if grow and x.ndim > 1 and x.numel():
            places = x[0].numel() // max(x.shape[1:])  # of a row, at least: whichever axis is that of the features
            enough = max(2, -(-32 // places))
            rows = min(rows, max(enough, 2**15 // x[0].numel())) if rows >= enough else enough
        shape = (rows, *x.shape[1:]) if x.ndim else x.shape
        from_pool = x.flatten()[torch.randint(x.numel(), shape, generator=self._random).to(x.device)]
        mixed = from_pool
        if x.ndim > 1:  # some from the same place in the sample: features may have ranges of their own
            own = x.gather(0, torch.randint(x.shape[0], shape, generator=self._random).to(x.device))
            mixed = torch.where(self.uniform(shape, x) < 0.5 + min(1.0, 4 / x.shape[0]), from_pool, own)
        width = x.std() if x.numel() > 1 and x.std() > 0 else x.new_tensor(0.5)
        return mixed + 0.1 * width * (self.uniform(shape, x) - 1)

    def _first_run(self, candidates: list[torch.Tensor]) -> tuple[torch.Tensor, Run]:
        problem = ""
        for x in candidates:
            try:
                run = self.run(x)
            except Unusable as unusable:
                problem = str(unusable)
                continue
            if self.precision.dtype == torch.float64 and any(t.dtype == torch.float32 for t in run.tensors):
                problem = "its layer computes in float32"
            elif not run.returned:
                raise Unusable("its layer returns no floating-point tensor")
            elif all(t.isfinite().all() for t in run.returned):
                return x, run
            else:
                problem = "its layer returns infinite or undefined numbers on this sample"
        raise Unusable(problem)

    def run(self, x: torch.Tensor, changed: dict[str, torch.Tensor] | None = None) -> Run:
        count = iter(range(len(tensors_in(self._args))))
        leaf = x.detach().clone().requires_grad_(True)
        start = leaf.clone()  # the layer may write into it
        args, kwargs = map_tensors(self._args, lambda t: start if next(count) == self._position else t.clone())
        self._passes.forward += 1
        while True:
            try:
                values = self.values | (changed or {})
                run = Run(self.layer, args, kwargs, start, values, self.precision.dtype)
                run.x = leaf
                return run
            except Exception as error:  # whatever a layer may raise
                # A module refuses `self.P = tensor` where P is a parameter.
                name = re.search(r"cannot assign .* as parameter '(\w+)'", str(error))
                paths = [path for path in self.values if name and path.rpartition(".")[2] == name[1]]
                if not paths:
                    text = f"{type(error).__name__}: {error}".split("\n")[0]
                    raise Unusable(f"its layer fails on this sample: {text}") from None
                for path in paths:
                    del self.values[path]

    def _check_repeats(self) -> None:
        for one, two in zip(self.base.returned, self.run(self.x).returned, strict=True):
            if one.shape != two.shape or (one - two).abs().max() > self.precision.affine * one.abs().max():
                raise Unusable("its layer is random: two runs on the same input differ, although in eval mode")

    def numbers(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """1 … 3 in even steps, in random order."""
        order = torch.randperm(size, generator=torch.Generator().manual_seed(1)).to(like)
        return 1 + 2 * order / max(size - 1, 1)

    def moved(self, t: torch.Tensor) -> list[Run]:
        """The runs at x + εt and x - εt."""
        spread = self.x.std() if self.x.numel() > 1 else 0
        step = 1e-5 * (spread if spread > 0 else 1) * t
        return self._alike([self.run(self.x + step), self.run(self.x - step)])

    def _alike(self, runs: list[Run]) -> list[Run]:
        if any([t.shape for t in run.tensors] != [t.shape for t in self.base.tensors] for run in runs):
            raise Refused("its layer takes other steps when its input or this parameter changes")
        return runs

    def moves(self, number: int) -> bool:
        """Whether a recorded tensor depends on x."""
        return self.base.depends(number, self.base.x)

    def contractions(self, path: str) -> tuple[int, ...]:
        """The numbers of the last tensors on the way to the first output that are affine in the parameter."""
        if path in self.base.reassigned or path not in self.values:
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
        # What is affine in several parameters together is so in each; of these in those of one shape, to save runs.
        alike = tuple(other for other, v in self.values.items() if v.shape == value.shape)
        for paths in dict.fromkeys([alike, (path,)]):
            found = self._last_affine(value, output, *self._perturbed(paths))
            if found and all(self.moves(k) for k in found):
                if any(self.base.tensors[k].is_complex() for k in found):
                    raise Refused("it is multiplied by complex functions")
                return tuple(sorted(found))
        raise Refused("the layer is not affine in it, or not through functions of the input")

    def _last_affine(self, value: torch.Tensor, output: int, plus: Run, minus: Run) -> set[int]:
        """The last tensors on the way to the output that have 2 z(P) = z(P + δ) + z(P - δ)."""
        found, stack, seen = set(), [output], set()
        while stack:
            k = stack.pop()
            if k in seen:
                continue
            seen.add(k)
            one, middle, two = (run.tensors[k] for run in (plus, self.base, minus))
            if (one + two - 2 * middle).abs().max() <= self.precision.affine * (one - middle).abs().max():
                found.add(k)
            else:
                stack += [source for source in self.base.sources[k] if self.base.depends(source, value)]
        return found

    def _perturbed(self, paths: tuple[str, ...]) -> tuple[Run, Run]:
        """The runs at P ± δ."""
        if paths not in self._changed:
            before = {path: self.values[path].detach() for path in paths}
            steps = {path: self._noise(v) * (v.square().mean().sqrt()) for path, v in before.items()}
            plus, minus = (
                self.run(self.x, {path: (v + s * steps[path]).requires_grad_(True) for path, v in before.items()})
                for s in (1, -1)
            )
            self._alike([plus, minus])
            self._changed[paths] = plus, minus
        return self._changed[paths]

    def _meetings(self, path: str, frontier: tuple[int, ...]) -> tuple[set[int], set[int]]:
        """The first tensors that depend on the parameter and on x, and the functions of x in them; by number."""
        if (path, frontier) not in self._met:
            value, products, sides, stack, seen = self.values[path], set(), set(), list(frontier), set()
            while stack:
                k = stack.pop()
                if k in seen or not self.base.depends(k, value) or not self.moves(k):
                    continue
                seen.add(k)
                sources = self.base.sources[k]
                if any(self.base.depends(s, value) and not self.moves(s) for s in sources):
                    products.add(k)
                    sides |= {s for s in sources if self.moves(s) and not self.base.depends(s, value)}
                stack += sources
            self._met[path, frontier] = products, sides
        return self._met[path, frontier]

    def _x_sides(self, path: str, frontier: tuple[int, ...]) -> set[int]:
        return self._meetings(path, frontier)[1]

    def first_contraction(self, path: str, frontier: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """z and u, with the one tensor in which the parameter meets x as z."""
        products, _ = self._meetings(path, frontier)
        plus_minus = next(runs for paths, runs in reversed(self._changed.items()) if path in paths)
        z = tuple(products)
        if len(z) != 1 or self._last_affine(self.values[path], z[0], *plus_minus) != products:
            raise Refused("its entries cannot be told apart by output")
        return z, self._input_of([path], z)

    def groups(self, z: dict[str, tuple[int, ...]]) -> Iterable[tuple[list[str], tuple[int, ...], int]]:
        """Parameters that can be tested at once: (paths, their tensors z, the number of their u)."""
        by_shape: dict[Any, list[str]] = {}
        for path, value in self.values.items():
            if path in z:
                by_shape.setdefault(value.shape, []).append(path)
        by_tensors: dict[tuple[tuple[int, ...], int], list[str]] = {}
        for paths in by_shape.values():
            apart = not any(
                self.base.depends(k, self.values[p]) for p in paths for q in paths if z[p] != z[q] for k in z[q]
            )  # such as the weights of the groups of a grouped layer
            union = tuple(sorted({k for path in paths for k in z[path]}))
            for path in paths:
                tensors = union if apart else z[path]
                u = self._input_of(paths if apart else [path], tensors)
                by_tensors.setdefault((tensors, u), []).append(path)
        return [(paths, *key) for key, paths in by_tensors.items()]

    def _input_of(self, paths: list[str], frontier: tuple[int, ...]) -> int:
        """The number of u: of the last tensor, no larger than x, through which x reaches the basis."""
        sides, tensors = {k for path in paths for k in self._x_sides(path, frontier)}, self.base.tensors
        most = min(self.x.numel(), sum(tensors[k].numel() for k in sides) // 2)
        before = self._ancestors(sides)
        for u in sorted(before - {0} - self.base.overwritten, reverse=True):
            if 0 < tensors[u].numel() <= most and 0 in before and 0 not in self._ancestors(sides, without=u):
                equal = tensors[u].numel() == self.x.numel() and torch.equal(tensors[u].flatten(), self.x.flatten())
                return 0 if equal or not tensors[u].is_floating_point() else u
        return 0

    def _ancestors(self, numbers: Iterable[int], without: int | None = None) -> set[int]:
        """The numbers, and those of everything that these tensors are made of."""
        seen, stack = set(), list(numbers)
        while stack:
            k = stack.pop()
            if k not in seen and k != without:
                seen.add(k)
                stack += self.base.sources[k]
        return seen

    def sees_x(self, path: str, frontier: tuple[int, ...]) -> bool:
        """Whether what the parameter multiplies is x itself."""
        return any(
            t.numel() == self.x.numel() and torch.equal(t.flatten(), self.x.flatten())
            for t in (self.base.tensors[k] for k in self._x_sides(path, frontier))
        )

    def in_basis(self, path: str, frontier: tuple[int, ...], u: int, other: str) -> bool:
        """Whether another parameter has a part in the functions of u that the parameter multiplies."""
        between = self._ancestors(self._x_sides(path, frontier), without=u)
        return any(self.base.tensors[k] is self.values[other] for k in between)

    def gradients(self, tensors, weights, paths) -> dict[str, torch.Tensor]:
        """∂/∂P Σ weights · tensors for each parameter P."""
        self._passes.backward += 1
        values = [self.values[path] for path in paths]
        found = torch.autograd.grad(tensors, values, weights, retain_graph=True, materialize_grads=True)
        return dict(zip(paths, found, strict=True))

    def input_gradient(self, u: int, frontier: tuple[int, ...], weights: list[torch.Tensor]) -> torch.Tensor:
        """∂/∂u Σ weights · z, itself differentiable."""
        self._passes.backward += 1
        z = [self.base.tensors[k] for k in frontier]
        inner = self.base.x if u == 0 else self.base.tensors[u]
        return torch.autograd.grad(z, inner, weights, create_graph=True, materialize_grads=True)[0]

    def scale(self, path: str, frontier: tuple[int, ...], layout: Layout) -> tuple[str, str] | tuple[None, None]:
        """The parameter, and its layout, that is multiplied onto this one before it meets x."""
        value = self.values[path]
        numbers = {
            s
            for k in self._ancestors(frontier)
            if self.moves(k)
            for s in self.base.sources[k]
            if self.base.depends(s, value) and not self.moves(s)
        }
        others = [p for p, v in self.values.items() if p != path and any(self.base.depends(k, v) for k in numbers)]
        if not others:
            return None, None
        changed = {p: self.uniform(self.values[p].shape, value).requires_grad_(True) for p in others}
        run = self.run(self.x, changed)
        products = [run.tensors[k] for k in numbers]
        factor = self.gradients(products, [torch.ones_like(product) for product in products], [path])[path]
        for other in others:
            for pattern in _scale_patterns(layout, changed[other].shape):
                expanded = layout.expand(changed[other].detach(), pattern)
                if torch.allclose(expanded, factor, rtol=self.precision.affine, atol=0):
                    return other, pattern
        return None, None


def _scale_patterns(layout: Layout, shape: torch.Size) -> list[str]:
    """The layouts of some of a layout's axes that fit `shape`."""
    groups = re.findall(r"\([^()]*\)|[^\s()]+", layout.pattern)
    parts = {group: group.strip("()").split() for group in groups} | {axis: [axis] for axis in layout.sizes}
    fits = []
    for chosen in permutations(parts, len(shape)):
        axes = [axis for part in chosen for axis in parts[part]]
        sizes = [torch.Size(layout.sizes[axis] for axis in parts[part]).numel() for part in chosen]
        if axes and len(set(axes)) == len(axes) and sizes == list(shape):
            fits.append(" ".join(chosen))
    return fits
