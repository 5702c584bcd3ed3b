"""Families of tasks: the numbers c(task) that a core is contracted with, and the task that a running call is at.

The task is on a stack of the thread, so calls in other threads, and calls inside of this call, do not see it.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from operator import mul
from typing import Any

import torch
from torch import nn

# The arguments of `at_task` and `adapter_at`, which take a family's parameters by name.
_ARGUMENTS = {"model", "adapter_name", "family", "train", "task"}


@dataclass(frozen=True)
class Family:
    """c(task) of shape (P,), for tasks that have names or continuous parameters.

    For parameters μ_1 … μ_k in ranges [a_j, b_j], c has the products T_{e_1}(x_1) ⋯ T_{e_k}(x_k) of Chebyshev
    polynomials, x_j = 2 (μ_j − a_j) / (b_j − a_j) − 1, of total degree Σ e_j ≤ `degree`. For named tasks, c is
    one-hot. Ours.

    Attributes:
        ranges: (a, b) by the name of a parameter; empty if tasks have names.
        tasks: the names of the tasks; empty if they have parameters.
        degree: the largest total degree of the polynomials.
    """

    ranges: Mapping[str, tuple[float, float]]
    tasks: tuple[str, ...] = ()
    degree: int = 4

    @classmethod
    def of(cls, family: Any, degree: int, field: str = "family") -> Family:
        """The family that the fields of a config mean. In errors, the first field has the name `field`.

        Raises:
            TypeError, ValueError: naming the field and the value.
        """
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise ValueError(f"`family_degree` should be a positive integer but the value passed is {degree!r}")
        if isinstance(family, Mapping) and family and all(_is_range(*entry) for entry in family.items()):
            if taken := sorted(_ARGUMENTS & family.keys()):
                raise ValueError(f"`{field}` names {taken}, which are arguments of `at_task` and `adapter_at`")
            for name, (a, b) in family.items():
                if not a < b:
                    raise ValueError(f"`{field}` gives {name!r} the range {(a, b)}, whose ends are not in order")
            # Sorted, as in saved configs, because the order of the names decides on the order of the products.
            return cls({name: (float(a), float(b)) for name, (a, b) in sorted(family.items())}, degree=degree)
        if isinstance(family, list | tuple) and family and all(isinstance(name, str) for name in family):
            if len(set(family)) < len(family):
                raise ValueError(f"`{field}` names a task twice: {family!r}")
            return cls({}, tuple(family), degree)
        raise TypeError(
            f"`{field}` should map names of parameters to ranges, as in {{'lam': (1.0, 1.6)}}, or list names of tasks"
            f", but the value passed is {family!r}"
        )

    @property
    def exponents(self) -> list[tuple[int, ...]]:
        """The degrees of the factors of each product, by total degree."""
        every = itertools.product(range(self.degree + 1), repeat=len(self.ranges))
        return sorted((e for e in every if sum(e) <= self.degree), key=lambda e: (sum(e), [-k for k in e]))

    @property
    def size(self) -> int:
        """P, without `family_rank`."""
        return len(self.tasks) or math.comb(len(self.ranges) + self.degree, self.degree)

    def named(self, task: Any) -> dict[str, Any]:
        """A task by the names of its arguments, from these, a name (or a list of names), or the one parameter's value.

        Raises:
            TypeError: if the family has several parameters.
        """
        if isinstance(task, Mapping):
            return dict(task)
        if len(self.ranges) > 1:
            raise TypeError(f"a task of this family is given by {list(self.ranges)}, but {task!r} is passed")
        return {next(iter(self.ranges), "task"): task}

    def weights(self, task: Mapping[str, Any]) -> torch.Tensor:
        """c of one task, shape (P,), or of a task for each sample, shape (batch, P); float64 unless tensors are given.

        For a batch of one sample, it is the c of its task.

        Args:
            task: a number, or a tensor of the shape (), (batch,) or (batch, 1), for each parameter; or under "task" a
                name, or a list of names.

        Raises:
            TypeError, ValueError: naming what does not fit.
        """
        wanted = ["task"] if self.tasks else list(self.ranges)
        if sorted(task) != sorted(wanted):
            raise TypeError(f"a task of this family is given by {wanted}, but {sorted(task)} is passed")
        c = self._one_hot(task["task"]) if self.tasks else self._products(task)
        return c[0] if c.dim() == 2 and len(c) == 1 else c

    def _products(self, task: Mapping[str, Any]) -> torch.Tensor:
        x = torch.broadcast_tensors(*[self._scaled(name, task[name]) for name in self.ranges])
        powers = [_chebyshev(value, self.degree) for value in x]  # T_0 … of each parameter
        products = [reduce(mul, [T[k] for T, k in zip(powers, e, strict=True)]) for e in self.exponents]
        return torch.stack(products, dim=-1)

    def _one_hot(self, task: Any) -> torch.Tensor:
        names = list(task) if isinstance(task, list | tuple) else [task]
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(f"`task` {unknown[0]!r} is not one of the family's tasks {list(self.tasks)}")
        places = torch.tensor([self.tasks.index(name) for name in names], dtype=torch.long)
        rows = torch.nn.functional.one_hot(places, len(self.tasks)).double()
        return rows[0] if isinstance(task, str) else rows

    def _scaled(self, name: str, value: Any) -> torch.Tensor:
        """x in [-1, 1] for a parameter within its range."""
        a, b = self.ranges[name]
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise TypeError(
                    f"`{name}` should be a number or a tensor of numbers but the value passed is {value!r}"
                )
            value = torch.tensor(float(value), dtype=torch.float64)
        if value.dim() == 2 and value.shape[1] == 1:
            value = value.squeeze(1)
        if value.dim() > 1:
            raise ValueError(f"`{name}` should have the shape (), (batch,) or (batch, 1) but has {tuple(value.shape)}")
        x = 2 * (value - a) / (b - a) - 1
        if not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)):
            if (x.detach().abs() > 1 + 1e-6).any():
                warnings.warn(
                    f"`{name}` is outside of the family's range [{a:g}, {b:g}]: the adapter extrapolates; after "
                    "`change_range` it can be fitted there",
                    stacklevel=6,
                )
        return x

    def in_terms_of(self, other: Family) -> torch.Tensor:
        """M, shape (P, P of `other`), with c(task) = M · c'(task) for the c' of another family of the same parameters.

        x = q · x' + r between the ranges, so that T_k(x) = Σ_{l ≤ k} M_j[k, l] T_l(x') for each parameter j, from
        values at the zeros of T_{degree + 1}. A product of total degree d has products up to d, which are all there if
        `other` has the degree of this family or more. Ours.
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


def weights_of(kinds: Mapping[str, Family], task: Any) -> dict[str, torch.Tensor]:
    """c of a task, in a form that `Family.named` takes, by the names of those families that it fits.

    Raises:
        TypeError, ValueError: if it fits none.
    """
    weights: dict[str, torch.Tensor] = {}
    errors: list[TypeError | ValueError] = []
    for name, kind in kinds.items():
        try:
            weights[name] = kind.weights(kind.named(task))
        except (TypeError, ValueError) as error:  # of another family
            errors.append(error)
    if not weights:
        raise type(errors[0])("; ".join(map(str, errors)))
    return weights


def _is_range(name: Any, bounds: Any) -> bool:
    """Whether this is a name for a keyword argument, and two finite numbers."""
    if not isinstance(name, str) or not name.isidentifier():
        return False
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return False
    return all(isinstance(b, Real) and not isinstance(b, bool) and math.isfinite(b) for b in bounds)


def _chebyshev(x: torch.Tensor, degree: int) -> list[torch.Tensor]:
    """T_0(x), …, T_degree(x)."""
    values = [torch.ones_like(x), x]
    while len(values) <= degree:
        values.append(2 * x * values[-1] - values[-2])
    return values


class _Calls(threading.local):
    def __init__(self) -> None:  # no attribute of the class: torch.compile guards on what is in __dict__
        self.stack: tuple[tuple[Mapping[str, torch.Tensor], Collection[nn.Module]], ...] = ()


_calls = _Calls()


@contextmanager
def entered(weights: Mapping[str, torch.Tensor], layers: Collection[nn.Module]) -> Iterator[None]:
    """While this is entered, the thread's calls of layers are at these tasks, c by adapter, beside those before."""
    before = _calls.stack
    _calls.stack = (*before, (weights, layers))
    try:
        yield
    finally:
        _calls.stack = before


def current(adapter: str, layer: nn.Module) -> torch.Tensor | None:
    """c of the running call for an adapter of a layer, shape (P,) or (batch, P)."""
    for weights, layers in reversed(_calls.stack):
        if adapter in weights and layer in layers:
            return weights[adapter]
    return None


def per_sample(adapters: Iterable[str], layer: nn.Module) -> dict[str, torch.Tensor]:
    """c of the adapters of a layer for which the running call has a task for each sample."""
    found = {}
    for name in adapters:
        c = current(name, layer)
        if c is not None and c.dim() == 2:
            found[name] = c
    return found
