"""Runs one layer on one sample with changed parameters or inputs, and analyses the recorded tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .precision import Passes, Precision
from .recording import Run, map_tensors, tensors_in


class Inputs(NamedTuple):
    """The numbers of u, the last tensors before the basis: one tensor, or several of one shape.

    `joined` says whether several u hold consecutive features, as in a grouped layer; otherwise they hold the same.
    """

    numbers: tuple[int, ...]
    joined: bool = True


VECTOR = "it is a vector along one axis of the input or output"


class Refused(Exception):
    """A parameter cannot be tested further. If `of_class`, this holds for all layers that are alike."""

    def __init__(self, reason: str, of_class: bool = False):
        super().__init__(reason)
        self.of_class = of_class


class Unusable(Exception):
    """The layer cannot be tested in this precision."""


class Probe:
    """A layer and its sample in one precision. The probe varies one of the inputs, x."""

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
        """If `repeats`, the layer runs twice, to check that it is deterministic."""
        self.layer, self.precision, self.which, self._passes = layer, precision, which, passes
        self._random = torch.Generator().manual_seed(0)
        dtype = precision.dtype
        self.values = {}
        for path, parameter in layer.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                value = parameter.detach().to(dtype, copy=True)
                if not value.any():  # zeros would hide what they multiply
                    value = self._noise(value)
                self.values[path] = value.requires_grad_(True)
        self._args = map_tensors((args, kwargs), lambda t: t.detach().to(_dtype_for(t, dtype)))
        tensors = tensors_in(self._args)
        self._position = [k for k, t in enumerate(tensors) if is_numeric(t)][which]
        self._changed: dict[tuple[str, ...], tuple[Run, Run]] = {}
        self._met: dict[tuple, tuple[set[int], set[int]]] = {}
        self._inputs: dict[int, set[int]] = {}
        given = tensors[self._position]
        self.x, self.base = self._first_run([self._spread(given, grow=len(tensors) == 1), given])
        if repeats:
            self._check_repeats()

    @property
    def trace(self) -> tuple:
        """The shapes and sources of all recorded tensors. Layers that take the same steps have the same trace."""
        return tuple(t.shape for t in self.base.tensors), tuple(map(tuple, self.base.sources))

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self._random, dtype=torch.float64).to(like)

    def seed(self, seed: int) -> None:
        self._random.manual_seed(seed)

    def choice(self, size: int, count: int) -> torch.Tensor:
        return torch.randint(size, (count,), generator=self._random)

    def uniform(self, shape: Iterable[int], like: torch.Tensor) -> torch.Tensor:
        """Random numbers, uniform in [0.5, 1.5] and real even if `like` is complex."""
        return (torch.rand(tuple(shape), generator=self._random, dtype=torch.float64) + 0.5).to(
            like.device, _real(like)
        )

    def _spread(self, x: torch.Tensor, grow: bool) -> torch.Tensor:
        """Values like those of x, without repetitions. If `grow`, they have enough rows to reach most functions."""
        rows = x.shape[0] if x.ndim else 0
        if grow and x.ndim > 1 and x.numel():
            places = x[0].numel() // max(x.shape[1:])  # at least, for any feature axis
            enough = max(2, -(-32 // places))
            rows = min(rows, max(enough, 2**15 // x[0].numel())) if rows >= enough else enough
        shape = (rows, *x.shape[1:]) if x.ndim else x.shape
        from_pool = x.flatten()[torch.randint(x.numel(), shape, generator=self._random).to(x.device)]
        mixed = from_pool
        if x.ndim > 1:  # take some values from the same place in the sample, since features may differ in range
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
            if self.precision.dtype == torch.float64 and any(_real(t) == torch.float32 for t in run.tensors):
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
        start = leaf.clone()  # the layer may change its input in place
        args, kwargs = map_tensors(self._args, lambda t: start if next(count) == self._position else t.clone())
        self._passes.forward += 1
        while True:
            try:
                values = self.values | (changed or {})
                run = Run(self.layer, args, kwargs, start, values, self.precision.dtype)
                run.x = leaf
                return run
            except Exception as error:  # any error of the layer
                # A module does not allow `self.P = tensor` if P is a parameter.
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
        """Evenly spaced numbers from 1 to 3, in random order."""
        order = torch.randperm(size, generator=torch.Generator().manual_seed(1)).to(like.device, _real(like))
        return 1 + 2 * order / max(size - 1, 1)

    def moved(self, t: torch.Tensor) -> list[Run]:
        """The runs at x + εt and x − εt."""
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
        """The last tensors on the way to the parameter's first output that are affine in it, by number."""
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
        # A tensor that is affine in several parameters together is affine in each. Parameters of one shape share runs.
        alike = tuple(other for other, v in self.values.items() if v.shape == value.shape)
        for paths in dict.fromkeys([alike, (path,)]):
            found = self._last_affine(value, output, *self._perturbed(paths))
            if found and all(self.moves(k) for k in found):
                return tuple(sorted(found))
        raise Refused("the layer is not affine in it, or not through functions of the input")

    def _last_affine(self, value: torch.Tensor, output: int, plus: Run, minus: Run) -> set[int]:
        """The last tensors on the way to the output for which 2 z(P) = z(P + δ) + z(P − δ)."""
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
        """The first tensors that depend on both the parameter and x, and the functions of x in them, by number."""
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

    def first_contraction(self, path: str, frontier: tuple[int, ...]) -> tuple[int, ...]:
        """The tensors in which the parameter meets x, to be used as z. A grouped layer has one for each group."""
        products, _ = self._meetings(path, frontier)
        plus_minus = next(runs for paths, runs in reversed(self._changed.items()) if path in paths)
        z = tuple(sorted(products))
        if not z or any(self._last_affine(self.values[path], k, *plus_minus) != {k} for k in z):
            raise Refused("its entries cannot be told apart by output")
        return z

    def groups(self, z: dict[str, tuple[int, ...]]) -> Iterable[tuple[list[str], tuple[int, ...]]]:
        """Lists of parameters that can be tested together, each with the tensors z."""
        by_shape: dict[Any, list[str]] = {}
        for path, value in self.values.items():
            if path in z:
                by_shape.setdefault(value.shape, []).append(path)
        by_tensors: dict[tuple[tuple[int, ...], Any], list[str]] = {}
        for shape, paths in by_shape.items():
            apart = not any(
                self.base.depends(k, self.values[p]) for p in paths for q in paths if z[p] != z[q] for k in z[q]
            )  # true for the weights of the groups of a grouped layer
            union = tuple(sorted({k for path in paths for k in z[path]}))
            for path in paths:
                tensors = union if apart else z[path]
                together = shape if apart and len(paths) > 1 else self._input_of(self._x_sides(path, tensors))
                by_tensors.setdefault((tensors, together), []).append(path)
        return [(paths, tensors) for (tensors, _), paths in by_tensors.items()]

    def inputs_of(self, paths: list[str], frontier: tuple[int, ...]) -> list[Inputs]:
        """Possible u of these parameters, the likeliest first: one tensor, or one for each function of x."""
        sides = {k for path in paths for k in self._x_sides(path, frontier)}
        found = [Inputs((self._input_of(sides),))]
        each = tuple(sorted({u for side in sides for u in self._inputs_of_side(side)}))
        shapes = sorted((self.base.tensors[u].shape for u in each), key=len)
        alike = all(shape == shapes[0] + (1,) * (len(shape) - len(shapes[0])) for shape in shapes)
        if len(each) > 1 and 0 not in each and alike and not any({*each} & (self.ancestors([u]) - {u}) for u in each):
            # Tensors from disjoint parts of x probably hold different features. The other case is tried last.
            parts = [self._part_of_x(u) for u in each]
            joined = int(torch.stack(parts).sum(0).max()) == 1
            found += [Inputs(each, joined), Inputs(each, not joined)]
        return found

    def _inputs_of_side(self, side: int) -> set[int]:
        """The number of u of a function of x, or the numbers of u of the functions that it is composed of."""
        if side not in self._inputs:  # cached: k residual blocks have 2ᵏ paths to one tensor
            u = self._input_of({side})
            parts = [k for k in self.base.sources[side] if self.moves(k)]
            self._inputs[side] = {u} if u or not parts else {u for k in parts for u in self._inputs_of_side(k)}
        return self._inputs[side]

    def _part_of_x(self, u: int) -> torch.Tensor:
        """Which entries of x a recorded tensor depends on."""
        self._passes.backward += 1
        tensor = self.base.tensors[u]
        weights = self.uniform(tensor.shape, tensor).to(tensor.dtype)
        (found,) = torch.autograd.grad(tensor, self.base.x, weights, retain_graph=True, materialize_grads=True)
        return found != 0

    def _input_of(self, sides: set[int]) -> int:
        """The number of u, the last tensor no larger than x on all paths from x to these functions (0 is x itself)."""
        tensors = self.base.tensors
        most = min(self.x.numel(), sum(tensors[k].numel() for k in sides) // 2)
        before = self.ancestors(sides)
        for u in sorted(before - {0} - self.base.overwritten, reverse=True):
            if 0 < tensors[u].numel() <= most and 0 in before and 0 not in self.ancestors(sides, without={u}):
                equal = tensors[u].numel() == self.x.numel() and torch.equal(tensors[u].flatten(), self.x.flatten())
                return 0 if equal or not is_numeric(tensors[u]) else u
        return 0

    def ancestors(self, numbers: Iterable[int], without: Collection[int] = ()) -> set[int]:
        """These numbers, and the numbers of all tensors from which these tensors are computed."""
        seen, stack = set(), list(numbers)
        while stack:
            k = stack.pop()
            if k not in seen and k not in without:
                seen.add(k)
                stack += self.base.sources[k]
        return seen

    def sees_x(self, path: str, frontier: tuple[int, ...]) -> bool:
        """Whether the parameter multiplies x itself."""
        sides = [self.base.tensors[k] for k in self._x_sides(path, frontier)]
        return bool(sides) and all(
            t.numel() == self.x.numel() and torch.equal(t.flatten(), self.x.flatten()) for t in sides
        )

    def shaping(self, path: str, frontier: tuple[int, ...]) -> list[str]:
        """Other parameters that give each entry of this parameter its own function, as in Wav-KAN."""
        value, tensors = self.values[path], self.base.tensors
        sides = [k for k in self._x_sides(path, frontier) if tensors[k].ndim > value.ndim]
        edges = [k for k in sides if tensors[k].shape[-value.ndim :] == value.shape]
        within = self.ancestors(edges)
        others = {id(v): other for other, v in self.values.items() if v.shape == value.shape and other != path}
        return [other for key, other in others.items() if any(id(tensors[k]) == key for k in within)]

    def in_basis(self, path: str, frontier: tuple[int, ...], u: Collection[int], other: str) -> bool:
        """Whether the functions of u that the parameter multiplies depend on the parameter `other`."""
        between = self.ancestors(self._x_sides(path, frontier), without=u)
        return any(self.base.tensors[k] is self.values[other] for k in between)

    def gradients(self, tensors, weights, paths) -> dict[str, torch.Tensor]:
        """∂/∂P Σ weights · tensors for each parameter P in `paths`."""
        self._passes.backward += 1
        values = [self.values[path] for path in paths]
        found = torch.autograd.grad(tensors, values, weights, retain_graph=True, materialize_grads=True)
        return dict(zip(paths, found, strict=True))

    def input_gradient(
        self, u: tuple[int, ...], frontier: tuple[int, ...], weights: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """∂/∂u Σ weights · z for each u. The results are differentiable."""
        self._passes.backward += 1
        z = [self.base.tensors[k] for k in frontier]
        inner = [self.base.x if k == 0 else self.base.tensors[k] for k in u]
        return list(torch.autograd.grad(z, inner, weights, create_graph=True, materialize_grads=True))


def is_numeric(tensor: torch.Tensor) -> bool:
    """Whether derivatives with respect to the tensor exist: it has entries, and they are real or complex floats."""
    return tensor.numel() > 0 and (tensor.is_floating_point() or tensor.is_complex())


def _real(tensor: torch.Tensor) -> torch.dtype:
    """The tensor's dtype, or the dtype of its real part if it is complex."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def _dtype_for(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype | None:
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else None
