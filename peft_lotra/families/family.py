"""Families of tasks: the vector c(task) with which a core is contracted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import mul
from typing import Any

import torch

from ..placement.constants import constant
from ..preserved import is_number
from ..standin.axes import planned

# The other arguments of `at_task` and `adapter_at`, which also take a family's parameters by name.
_ARGUMENTS = {"model", "adapter_name", "family", "train", "task", "code", "batch_axis"}

_CPU = torch.device("cpu")
LARGEST = 100_000  # P of a family


@dataclass(frozen=True)
class Family:
    """c(task), shape (P,), for tasks that have names, continuous parameters, or both.

    For parameters μ_1 … μ_k in ranges [a_j, b_j], c consists of the products T_{e_1}(x_1) ⋯ T_{e_k}(x_k) of Chebyshev
    polynomials of total degree Σ e_j ≤ `degree`, where x_j = 2 (μ_j − a_j) / (b_j − a_j) − 1. A named task has a code
    z, whose numbers are further variables x_j of these products. Without codes, c of named tasks is one-hot. Ours.

    Attributes:
        ranges: (a, b) by name of the parameter; empty if tasks have names alone.
        tasks: the names of the tasks; empty if they have parameters alone.
        degree: the largest total degree of the polynomials.
        code: k, how many numbers the code of a named task has; 0: none.
        argument: the argument of `at_task` that takes names.
    """

    ranges: Mapping[str, tuple[float, float]]
    tasks: tuple[str, ...] = ()
    degree: int = 4
    code: int = 0
    argument: str = "task"

    @classmethod
    def of(cls, family: Any, degree: int, code: int = 0, field: str = "family") -> Family:
        """The family that the fields `family`, called `field` in errors, `family_degree` and `family_code` mean."""
        if type(degree) is not int or degree < 1:
            raise ValueError(f"`family_degree` should be a positive integer but the value passed is {degree!r}")
        entries = family if isinstance(family, Mapping) else {}
        # Sorted, as in saved configs, because the order of the names determines the order of the products.
        names = sorted(name for name, bounds in entries.items() if _is_range(name, bounds))
        ranges = {name: tuple(entries[name]) for name in names}
        lists = {name: e for name, e in entries.items() if name not in ranges} if entries else {"task": family}
        if code and len(lists) != 1:
            raise ValueError(
                f"`family_code` {code!r} with `{field}` {family!r}: codes are for one list of names of tasks, which "
                "may stand beside ranges of parameters"
            )
        argument, tasks = next(iter(lists.items()), ("task", ()))
        is_list = isinstance(tasks, list | tuple) and all(isinstance(name, str) for name in tasks)
        if lists and (not is_list or not tasks or (entries and not code)):
            raise TypeError(
                f"`{field}` should map names of parameters to ranges, as in {{'lam': (1.0, 1.6)}}, or list names of "
                f"tasks, but the value passed is {family!r}"
            )
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"`{field}` names a task twice: {family!r}")
        taken = [name for name in ranges if name in _ARGUMENTS]
        taken += [name for name in lists if name in _ARGUMENTS - {"task"} or not str(name).isidentifier()]
        if taken:
            raise ValueError(f"`{field}` names {taken}, which cannot be an argument of `at_task` and `adapter_at`")
        for name, (a, b) in ranges.items():
            if not a < b:
                raise ValueError(f"`{field}` gives {name!r} the range {(a, b)}, whose ends are not in order")
        if code > len(tasks):
            raise ValueError(f"`family_code` {code!r} is above the number of tasks, {len(tasks)}: give a smaller one")
        found = cls(
            {name: (float(a), float(b)) for name, (a, b) in ranges.items()}, tuple(tasks), degree, code, argument
        )
        if found.size > LARGEST:
            what = f"{len(ranges)} parameters" + f" and a code of {code}" * bool(code)
            what += f", which with `family_degree`={degree} makes {found.size:,} polynomials"
            raise ValueError(
                f"`{field}` has {what if ranges or code else f'{len(tasks):,} tasks'}, more than {LARGEST:,}: give a "
                "lower degree, or make several families"
            )
        return found

    @property
    def plain(self) -> Any:
        """The family as plain data, for a config."""
        ranges = {name: list(bounds) for name, bounds in self.ranges.items()}
        if not self.tasks:
            return ranges
        return {**ranges, self.argument: list(self.tasks)} if ranges or self.argument != "task" else list(self.tasks)

    @property
    def size(self) -> int:
        """P."""
        variables = len(self.ranges) + self.code
        return math.comb(variables + self.degree, self.degree) if variables else len(self.tasks)

    def named(self, task: Any) -> dict[str, Any]:
        """A task as a mapping, from a mapping, a name (or a list of names), or the value of the only parameter."""
        if isinstance(task, Mapping):
            return dict(task)
        if len(self._arguments) > 1:
            raise TypeError(f"a task of this family is given by {self._arguments}, but {task!r} is passed")
        return {self._arguments[0]: task}

    @property
    def _arguments(self) -> list[str]:
        return [*self.ranges, *[self.argument] * bool(self.tasks)]

    def weights(
        self, task: Mapping[str, Any], codes: torch.Tensor | None = None, device: torch.device = _CPU
    ) -> torch.Tensor:
        """c of one task, shape (P,), or of a task for each sample, shape (batch, P); float64 unless tensors are given.

        For a batch of one sample, the shape is (P,). A task has, for each parameter, a number or a tensor of the shape
        (), (batch,) or (batch, 1); for the names, a name, a list of names, or a tensor of their places in `tasks`, or
        a "code", shape (k,) or (batch, k). `codes`, shape (tasks, k), are those of all tasks; c of names is made on
        `device`.
        """
        if "code" in task and self.code:
            return self.at_code({name: value for name, value in task.items() if name != "code"}, task["code"])
        if sorted(task) != sorted(self._arguments):
            raise TypeError(f"a task of this family is given by {self._arguments}, but {sorted(task)} is passed")
        if not self.tasks:
            return _one_sample(self._products(task))
        places = self.places(task[self.argument], device if codes is None else codes.device)
        if not self.code:
            return _one_sample(torch.nn.functional.one_hot(places, len(self.tasks)).double())
        assert codes is not None
        rows = codes.index_select(0, places.flatten())
        return self.at_code({name: task[name] for name in self.ranges}, rows.view(*places.shape, -1))

    def at_code(self, parameters: Mapping[str, Any], code: Any) -> torch.Tensor:
        """c at a code, shape (k,) or (batch, k), and at values of the parameters."""
        if not isinstance(code, torch.Tensor) or code.dim() not in (1, 2) or code.shape[-1] != self.code:
            given = tuple(code.shape) if isinstance(code, torch.Tensor) else code
            raise ValueError(f"`code` should be a tensor of {self.code} numbers, or of such rows, but is {given}")
        if sorted(parameters) != sorted(self.ranges):
            raise TypeError(f"beside `code`, a task of this family has {list(self.ranges)}, got {sorted(parameters)}")
        return _one_sample(self._products(parameters, code))

    def places(self, names: Any, device: torch.device) -> torch.Tensor:
        """The places in `tasks` of a name, shape (), or of a list of names, or of places, shape (batch,)."""
        if isinstance(names, torch.Tensor) and not names.is_floating_point():
            some = names.numel() > 0 and is_readable(names)
            if some and not 0 <= int(names.min()) <= int(names.max()) < len(self.tasks):
                raise ValueError(f"`{self.argument}` has places outside of the family's {len(self.tasks)} tasks")
            return names.to(device, torch.long)
        held = _places_of(self.tasks)
        given = list(names) if isinstance(names, list | tuple) else [names]
        for name in given:
            if not isinstance(name, str) or name not in held:
                raise ValueError(
                    f"`{self.argument}` {name!r} is not one of the family's tasks {shortened(list(self.tasks))}"
                )
        places = constant(tuple([held[name] for name in given]), device)
        return places if isinstance(names, list | tuple) else places[0]

    def _products(self, task: Mapping[str, Any], code: torch.Tensor | None = None) -> torch.Tensor:
        x: Any = [self._scaled(name, task[name]) for name in self.ranges]
        if code is not None:
            x = [*x, *code.unbind(-1)]
        if tensors := [value for value in x if isinstance(value, torch.Tensor)]:
            device = next((value.device for value in tensors if value.device != _CPU), _CPU)
            x = [
                value.to(device)
                if isinstance(value, torch.Tensor)
                else torch.full((), value, dtype=torch.float64, device=device)
                for value in x
            ]
            x = torch.stack(torch.broadcast_tensors(*x), dim=-1)
        else:
            x = torch.tensor(x, dtype=torch.float64)
        values = torch.stack(_chebyshev(x, self.degree), dim=-1).flatten(-2)
        if len(self.ranges) + self.code == 1:
            return values
        factors = _places(len(self.ranges) + self.code, self.degree)
        return reduce(mul, [values.index_select(-1, constant(places, values.device)) for places in factors])

    def _scaled(self, name: str, value: Any) -> float | torch.Tensor:
        """x in [-1, 1] for a parameter within its range, a number or of the shape () or (batch,)."""
        a, b = self.ranges[name]
        if not isinstance(value, torch.Tensor):
            if not is_number(value):
                raise TypeError(
                    f"`{name}` should be a number or a tensor of numbers but the value passed is {value!r}"
                )
            value = float(value)
        elif value.dim() == 2 and value.shape[1] == 1:
            value = value.squeeze(1)
        elif value.dim() > 1:
            raise ValueError(f"`{name}` should have the shape (), (batch,) or (batch, 1) but has {tuple(value.shape)}")
        x = 2 * (value - a) / (b - a) - 1
        if torch.compiler.is_compiling():
            return x
        if isinstance(value, torch.Tensor):
            if not is_readable(x) or (x.detach().abs() <= 1 + 1e-6).all():
                return x
            given = value.detach()
            if not given.isfinite().all():
                raise ValueError(f"`{name}` should be finite but has {given[~given.isfinite()][0].item()}")
        elif abs(x) <= 1 + 1e-6:
            return x
        told = f"`{name}` is outside of the family's range [{a:g}, {b:g}]: the adapter extrapolates"
        warnings.warn(f"{told}. To fit it there, call `change_range` first", stacklevel=6)
        return x

    def in_terms_of(
        self, other: Family, B: torch.Tensor | None = None, mean: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """M, shape (P, P of `other`), with c(μ, B z + mean) = M · c'(μ, z) for the c' of a family of the same names.

        Affine maps keep the total degree of polynomials, so products of a higher degree, which come last in c', are
        not needed. The others follow from values at places with the density for which they are orthogonal. Ours.
        """
        k, same, generator = len(self.ranges), replace(other, degree=self.degree), torch.Generator().manual_seed(0)
        angles = math.pi * torch.rand(4 * self.size + 10, k + self.code, generator=generator, dtype=torch.float64)
        x = torch.cos(angles)
        ends = zip(other.ranges.items(), x.unbind(1), strict=False)
        task = {name: a + (b - a) * (own + 1) / 2 for (name, (a, b)), own in ends}
        z = x[:, k:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of places outside of the range
            own = self._products(task, z if B is None else z @ B.mT + mean)
            M = torch.linalg.lstsq(same._products(task, z), own).solution.mT
        return torch.nn.functional.pad(M, (0, other.size - self.size))


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether to look at values: to look at those on an accelerator would wait for it."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device == _CPU


Weights = torch.Tensor | Callable[[], torch.Tensor]  # c, or what gives it when a layer runs


def weights_of(
    kinds: Mapping[str, Family],
    task: Any,
    codes: Callable[[str], Callable[[], torch.Tensor]],
    devices: Mapping[str, torch.device],
) -> dict[str, Weights]:
    """c of a task, in a form that `Family.named` takes, for each family that it fits, by name; or else an error.

    `codes` gives a function for the name of a family with codes. It is called in each pass: codes may be trained.
    `devices` are those of the adapters that have one device.
    """
    weights: dict[str, Weights] = {}
    errors: list[TypeError | ValueError] = []
    for name, kind in kinds.items():
        try:
            named = kind.named(task)
            if kind.code and "code" not in named:
                table = codes(name)
                if kind.argument in named:  # looked up once, and checked now
                    named = {**named, kind.argument: kind.places(named[kind.argument], devices.get(name, _CPU))}
                kind.weights(named, table())
                weights[name] = partial(_read, kind, named, table)
            else:
                weights[name] = kind.weights(named, device=devices.get(name, _CPU))
        except (TypeError, ValueError) as error:  # the task may be of another family
            errors.append(error)
    if not weights:
        raise type(errors[0])("; ".join(map(str, errors)))
    return weights


def _read(kind: Family, task: Mapping[str, Any], codes: Callable[[], torch.Tensor]) -> torch.Tensor:
    return kind.weights(task, codes())


def _one_sample(c: torch.Tensor) -> torch.Tensor:
    return c[0] if c.dim() == 2 and len(c) == 1 else c


@planned
def _places_of(tasks: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(tasks)}


def shortened(names: list[str], most: int = 20) -> list[str]:
    """The first names, and how many more there are."""
    return names if len(names) <= most else [*names[:most], f"… {len(names) - most} more"]


def _is_range(name: Any, bounds: Any) -> bool:
    """Whether `name` can be a keyword argument and `bounds` are two finite numbers."""
    is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(map(is_number, bounds))
    return is_pair and isinstance(name, str) and name.isidentifier()


@planned
def _places(k: int, degree: int) -> list[tuple[int, ...]]:
    """The places of every product's first, second, … factor in T_e(x_j), shape (k, degree + 1), flattened.

    Products of total degree d are multisets of d variables.
    """
    places = [[0] * math.comb(k + degree, degree) for _ in range(min(k, degree))]  # T_0 = 1 where there is no factor
    chosen = [variables for d in range(degree + 1) for variables in _multisets(0, k, d)]
    for product, variables in enumerate(chosen):
        for own, j in zip(places, dict.fromkeys(variables), strict=False):
            own[product] = j * (degree + 1) + sum([other == j for other in variables])
    return [tuple(own) for own in places]


def _multisets(first: int, k: int, size: int) -> list[tuple[int, ...]]:
    """Sorted multisets of `first` … k − 1. (torch.compile does not know that of itertools.)"""
    return [(j, *rest) for j in range(first, k) for rest in _multisets(j, k, size - 1)] if size else [()]


def _chebyshev(x: torch.Tensor, degree: int) -> list[torch.Tensor]:
    """T_0(x), …, T_degree(x)."""
    values = [torch.ones_like(x), x]
    while len(values) <= degree:
        values.append(2 * x * values[-1] - values[-2])
    return values
