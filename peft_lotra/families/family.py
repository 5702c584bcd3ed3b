"""Families of tasks: the vector c(task) with which a core is contracted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from numbers import Real
from operator import mul
from typing import Any

import torch

from ..placement.constants import constant
from ..standin.axes import planned

# The other arguments of `at_task` and `adapter_at`, which also take a family's parameters by name.
_ARGUMENTS = {"model", "adapter_name", "family", "train", "task", "code", "batch_axis"}


_CPU = torch.device("cpu")
LARGEST = 100_000  # P of a family


def check_degree(degree: Any) -> None:
    """Raise ValueError unless `family_degree` is a positive integer."""
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise ValueError(f"`family_degree` should be a positive integer but the value passed is {degree!r}")


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
        """The family that the fields `family`, `family_degree` and `family_code` of a config mean.

        Raises:
            TypeError, ValueError: naming the field, the first one by `field`, and the value.
        """
        check_degree(degree)
        if code:
            return cls._coded(family, degree, code, field)
        if isinstance(family, Mapping) and family and all(_is_range(*entry) for entry in family.items()):
            if taken := sorted(_ARGUMENTS & family.keys()):
                raise ValueError(f"`{field}` names {taken}, which are arguments of `at_task` and `adapter_at`")
            for name, (a, b) in family.items():
                if not a < b:
                    raise ValueError(f"`{field}` gives {name!r} the range {(a, b)}, whose ends are not in order")
            if (size := math.comb(len(family) + degree, degree)) > LARGEST:
                raise ValueError(
                    f"`{field}` has {len(family)} parameters, which with `family_degree`={degree} makes {size:,} "
                    f"polynomials, more than {LARGEST:,}: give a lower degree, or fewer parameters"
                )
            # Sorted, as in saved configs, because the order of the names determines the order of the products.
            return cls({name: (float(a), float(b)) for name, (a, b) in sorted(family.items())}, degree=degree)
        if isinstance(family, list | tuple) and family and all(isinstance(name, str) for name in family):
            if len(set(family)) < len(family):
                raise ValueError(f"`{field}` names a task twice: {family!r}")
            if len(family) > LARGEST:
                raise ValueError(f"`{field}` has {len(family):,} tasks, more than {LARGEST:,}: make several families")
            return cls({}, tuple(family), degree)
        raise TypeError(
            f"`{field}` should map names of parameters to ranges, as in {{'lam': (1.0, 1.6)}}, or list names of tasks"
            f", but the value passed is {family!r}"
        )

    @classmethod
    def _coded(cls, family: Any, degree: int, code: int, field: str) -> Family:
        """A family with codes, of names alone or of ranges and one list of names."""
        entries = family if isinstance(family, Mapping) else {"task": family}
        listed = {name: value for name, value in entries.items() if not _is_range(name, value)}
        if len(listed) != 1:
            raise ValueError(
                f"`family_code` {code!r} with `{field}` {family!r}: codes are for one list of names of tasks, which "
                "may stand beside ranges of parameters"
            )
        ((argument, names),) = listed.items()
        tasks = cls.of(names, degree, field=field).tasks
        if code > len(tasks):
            raise ValueError(f"`family_code` {code!r} is above the number of tasks, {len(tasks)}: give a smaller one")
        ranges = {name: value for name, value in entries.items() if name != argument}
        if argument in _ARGUMENTS - {"task"} or not str(argument).isidentifier():
            raise ValueError(f"`{field}` names {argument!r}, which cannot be an argument of `at_task`")
        held = cls.of(ranges, degree, field=field).ranges if ranges else {}
        if (size := math.comb(len(held) + code + degree, degree)) > LARGEST:
            raise ValueError(
                f"`{field}` has {len(held)} parameters and a code of {code}, which with `family_degree`={degree} make "
                f"{size:,} polynomials, more than {LARGEST:,}: give a lower degree"
            )
        return cls(held, tasks, degree, code, argument)

    @property
    def plain(self) -> Any:
        """The family as plain data, for a config."""
        ranges = {name: list(bounds) for name, bounds in self.ranges.items()}
        if not self.tasks:
            return ranges
        return {**ranges, self.argument: list(self.tasks)} if ranges or self.argument != "task" else list(self.tasks)

    @property
    def exponents(self) -> list[tuple[int, ...]]:
        """The degrees of the factors of each product, by total degree."""
        return _exponents(len(self.ranges), self.degree)

    @property
    def size(self) -> int:
        """P."""
        variables = len(self.ranges) + self.code
        return math.comb(variables + self.degree, self.degree) if variables else len(self.tasks)

    def named(self, task: Any) -> dict[str, Any]:
        """A task as a mapping, from a mapping, a name (or a list of names), or the value of the only parameter.

        Raises:
            TypeError: if the family has several parameters.
        """
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

        For a batch of one sample, the shape is (P,).

        Args:
            task: for each parameter, a number or a tensor of the shape (), (batch,) or (batch, 1); for the names, a
                name, a list of names, or a tensor of their places in `tasks`. "code" may stand in place of the names:
                a tensor, shape (k,) or (batch, k).
            codes: the codes of all tasks, shape (tasks, k).
            device: where c of names is made.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
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
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
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
        warnings.warn(
            f"`{name}` is outside of the family's range [{a:g}, {b:g}]: the adapter extrapolates. To fit it there, "
            "call `change_range` first",
            stacklevel=6,
        )
        return x

    def in_terms_of(self, other: Family) -> torch.Tensor:
        """M, shape (P, P of `other`), with c(task) = M · c'(task) for the c' of another family of the same parameters.

        Since x is a linear function of x', T_k(x) = Σ_{l ≤ k} M_j[k, l] T_l(x') for each parameter j. M_j follows from
        values at the zeros of T_{degree + 1}. A product of total degree d is a sum of products of total degree up to
        d. `other` has all of them if its degree is at least that of this family. Ours.
        """
        by_parameter, to = [], other.exponents
        zeros = torch.cos(math.pi * (torch.arange(other.degree + 1, dtype=torch.float64) + 0.5) / (other.degree + 1))
        values = torch.stack(_chebyshev(zeros, other.degree), dim=-1)
        for name, (a, b) in self.ranges.items():
            low, high = other.ranges[name]
            x = (zeros * (high - low) + (high + low) - (a + b)) / (b - a)
            own = torch.stack(_chebyshev(x, self.degree), dim=-1)
            by_parameter.append(torch.linalg.solve(values, own).mT.tril())
        rows = [
            [math.prod(M[ours, theirs].item() for M, ours, theirs in zip(by_parameter, e, f, strict=True)) for f in to]
            for e in self.exponents
        ]
        return torch.tensor(rows, dtype=torch.float64)


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
    """c of a task for each family that the task fits, by the family's name. `Family.named` says which forms it takes.

    Args:
        kinds: the families.
        task: the task.
        codes: for the name of a family with codes, a function that returns them. They are read in each pass, because
            they may be trained.
        devices: where the adapters are that have one device, by the family's name.

    Raises:
        TypeError, ValueError: if the task fits no family.
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
    if not isinstance(name, str) or not name.isidentifier():
        return False
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return False
    return all(isinstance(b, Real) and not isinstance(b, bool) and math.isfinite(b) for b in bounds)


def _products(k: int, degree: int) -> list[tuple[tuple[int, int], ...]]:
    """The factors (j, e_j), e_j > 0, of each product of total degree up to `degree` of k parameters."""
    found: list[tuple[tuple[int, int], ...]] = []

    def append(factors: tuple[tuple[int, int], ...], first: int, rest: int) -> None:
        if not rest:
            found.append(factors)
            return
        for j in range(first, k):  # the last parameter takes what is left
            for e in range(rest, 0 if j < k - 1 else rest - 1, -1):
                append((*factors, (j, e)), j + 1, rest - e)

    for total in range(degree + 1):
        append((), 0, total)
    return found


@planned
def _exponents(k: int, degree: int) -> list[tuple[int, ...]]:
    found = []
    for factors in _products(k, degree):
        e = [0] * k
        for j, exponent in factors:
            e[j] = exponent
        found.append(tuple(e))
    return found


@planned
def _places(k: int, degree: int) -> list[tuple[int, ...]]:
    """The places of every product's first, second, … factor in T_e(x_j), shape (k, degree + 1), flattened."""
    places = [[0] * math.comb(k + degree, degree) for _ in range(min(k, degree))]  # T_0 = 1 where there is no factor
    for product, factors in enumerate(_products(k, degree)):
        for own, (j, e) in zip(places, factors, strict=False):
            own[product] = j * (degree + 1) + e
    return [tuple(own) for own in places]


def _chebyshev(x: torch.Tensor, degree: int) -> list[torch.Tensor]:
    """T_0(x), …, T_degree(x)."""
    values = [torch.ones_like(x), x]
    while len(values) <= degree:
        values.append(2 * x * values[-1] - values[-2])
    return values
