"""The dense oracle of adapted models, comparisons of tensors, and a way to force the order of contractions."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..coefficients import CoefficientSpec
from ..layers.lotra import adapted_tensors, first_tensor
from ..standin import plan
from ..standin import tensor as standin_tensor
from ..standin.cost import DENSE, Work


@contextmanager
def forced_order(order: str) -> Iterator[SimpleNamespace]:
    """A context in which contractions use this order if they can. Yields an object whose `times` counts such plans.

    Args:
        order: one of `peft_lotra.standin.cost.ORDERS`, or `DENSE`.
    """
    taken, counted = SimpleNamespace(times=0), plan.cheapest_order
    room: Any = plan

    def forced(work: Work, _: Any) -> str:
        possible = order == DENSE or set(order) <= set(work.on_x)
        taken.times += possible
        return order if possible else ""

    room.cheapest_order = forced
    room._plan.cache_clear()
    try:
        yield taken
    finally:
        room.cheapest_order = counted
        room._plan.cache_clear()


def forget_warnings() -> None:
    """Let every `PerformanceWarning` appear once more."""
    standin_tensor._warned.clear()


def dense_model(
    base: nn.Module, model: nn.Module, weights: Mapping[str, float] | None = None, task: int | None = None
) -> nn.Module:
    """A copy of `base` with the coefficients A + Σ_j w_j · Δ_j. Every stored entry looks up its own (i, o, d, ...).

    This is the oracle for an adapted model. It shares no code with the adapter, and it can be differentiated with
    respect to the factors.

    Args:
        base: the model without adapters.
        model: the adapted model.
        weights: w by adapter. The default is 1 for each adapter that is active in a layer.
        task: the number of the task, if the adapters are families of named tasks.
    """
    oracle = copy.deepcopy(base)
    for path, layer in adapted_tensors(model).items():
        spec = layer.spec
        plain = oracle.get_submodule(path.removesuffix(spec.parameter).removesuffix("."))
        owner, _, name = spec.parameter.rpartition(".")
        holder = plain.get_submodule(owner)
        coefficients = getattr(holder, name).detach()
        total = torch.zeros_like(coefficients)
        for adapter, weight in (weights or dict.fromkeys(layer.active_adapters, 1.0)).items():
            if adapter not in layer.lotra_core:
                continue
            held = [getattr(layer, container)._parameters.get(adapter) for container in layer.adapter_layer_names]
            if task is not None:  # each task of a family has its own update
                held[0] = held[0][..., task]
            update = weight * layer.scaling[adapter] * _scattered(spec, *held)
            if spec.scale is not None:
                update = update / _repeated(spec, tensor_at(plain, spec.scale))
            whole = torch.zeros_like(coefficients, dtype=update.dtype)
            # The memory order of the entries follows the layout's axes, even if these are not the stored axes.
            whole[_region(spec)] = update.reshape(whole[_region(spec)].shape)
            total = total + whole
        del holder._parameters[name]
        setattr(holder, name, (coefficients + total).to(coefficients.dtype))
    return oracle


def tensor_at(layer: nn.Module, path: str) -> torch.Tensor:
    """The tensor at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(layer.get_submodule(owner), name)


def _scattered(spec: CoefficientSpec, core: torch.Tensor, *factors: torch.Tensor | None) -> torch.Tensor:
    """G ×₁ U1 ×₂ U2 ×₃ U3 ×₄ U4 in the stored layout. Every stored entry looks up its own (i, o, d, ...)."""
    U1, U2, U3, U4 = (
        torch.eye(n).to(core) if U is None else U for U, n in zip(factors, (*core.shape, 1), strict=False)
    )
    index = _canonical_index(spec)
    if factors[3] is not None:
        core = torch.einsum("abck,pk->abcp", core, U4)
        sizes = [int(part.max()) + 1 for part in index[3:]]
        core = core.reshape(*core.shape[:3], *sizes)
    dense = torch.einsum("abc...,ia,ob,dc->iod...", core, U1, U2, U3)
    return dense[index]


def _digits(spec: CoefficientSpec) -> dict[str, torch.Tensor]:
    """For each axis of the layout, its index at every stored entry, computed from the layout string."""
    groups, sizes = _groups(spec.layout.pattern), spec.layout.sizes
    shape = [torch.Size([sizes[axis] for axis in group]).numel() for group in groups]
    digits = {}
    for group, position in zip(groups, torch.meshgrid(*map(torch.arange, shape), indexing="ij"), strict=True):
        for axis in reversed(group):
            digits[axis] = position % sizes[axis]
            position = position // sizes[axis]
    return digits


def _groups(pattern: str) -> list[list[str]]:
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", pattern.replace("*", ""))]


def _joined(spec: CoefficientSpec, digits: dict[str, torch.Tensor], axes: list[str]) -> torch.Tensor:
    """The index along several joined axes. The last axis runs fastest."""
    index = torch.zeros_like(digits[axes[0]])
    for axis in axes:
        index = index * spec.layout.sizes[axis] + digits[axis]
    return index


def _canonical_index(spec: CoefficientSpec) -> tuple[torch.Tensor, ...]:
    """For each axis of A, its index at every stored entry."""
    digits = _digits(spec)
    modes = ([axis for axis in digits if axis[0] == letter] for letter in "iodgthw")
    return tuple(_joined(spec, digits, sorted(axes, key=lambda axis: int(axis[1:] or 0))) for axes in modes if axes)


def _region(spec: CoefficientSpec) -> tuple[slice, ...]:
    """The part of the parameter that is the coefficient tensor."""
    ranges = [part.split(":") for part in (spec.slice or ":").split(",")]
    return tuple(slice(*(int(bound) if bound.strip() else None for bound in bounds)) for bounds in ranges)


def _repeated(spec: CoefficientSpec, scale: torch.Tensor) -> torch.Tensor:
    """The scale at every stored entry of the coefficients."""
    digits = _digits(spec)
    return scale.detach()[tuple(_joined(spec, digits, axes) for axes in _groups(spec.scale_layout or ""))]


def margin() -> float:
    """What every tolerance is divided by: the environment variable PEFT_LOTRA_MARGIN, or 1."""
    return float(os.environ.get("PEFT_LOTRA_MARGIN", 1))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Assert equal dtype and shape, and max |actual − expected| ≤ tolerance · max |expected|; 0 demands equal bits.

    It is for fp64, where 1e-10 is far above rounding and far below what a wrong formula does, and for equal bits.
    `Rounding` compares in lower precision.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    exact = not (expected.is_floating_point() or expected.is_complex())
    assert exact or expected.dtype in (torch.float64, torch.complex128) or tolerance == 0, (
        f"{expected.dtype} is compared by its rounding (`Rounding`), or bit by bit (tolerance 0)"
    )
    if not expected.numel():
        return
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    allowed = tolerance / margin()
    assert error <= allowed * size, f"off by {error:.3g}, allowed are {allowed:g} of {size:.3g}"


class Rounding:
    """How far results in low precision may be from a dense formula in fp64.

    allowed = 4 · |dense − exact| + 16 · max_k |nudged_k − exact| + 16 · eps · |exact|, in the maximum norm. `dense` is
    the dense formula in low precision. `nudged_k` is the exact formula at inputs and parameters that differ from the
    given ones by one rounding, up or down at random. It grows with the terms of sums that cancel, where the result is
    small and its rounding error is not. Ours.

    Attributes:
        exact: the results in fp64.
        allowed: the largest permitted error of each.
    """

    def __init__(
        self,
        formula: Callable[..., Any],
        tensors: Sequence[torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            formula: takes tensors like `tensors` of any precision, and returns the dense results, a tensor or several.
            tensors: inputs and parameters in low precision.
            dtype: the lowest precision of the computation, if it is not that of the results.
        """
        dense = _results(formula(*tensors))
        self.dtypes = [result.dtype for result in dense]
        wide = [_wide(tensor) for tensor in tensors]
        self.exact = [result.detach() for result in _results(formula(*wide))]
        eps = torch.finfo(dtype).eps if dtype else max(torch.finfo(kind).eps for kind in self.dtypes)
        generator = torch.Generator().manual_seed(0)
        moved = [0.0] * len(dense)
        for _ in range(3):
            nudged = [_nudged(tensor, eps, generator) for tensor in wide]
            results = _results(formula(*nudged))
            moved = [max(m, _distance(r, e)) for m, r, e in zip(moved, results, self.exact, strict=True)]
        self.allowed = [
            4 * _distance(d, e) + 16 * m + 16 * eps * e.abs().max().item()
            for d, e, m in zip(dense, self.exact, moved, strict=True)
        ]

    def check(self, *actual: torch.Tensor) -> None:
        """Assert the dtypes of the dense results, and errors within the bound."""
        for result, exact, dtype, allowed in zip(_results(actual), self.exact, self.dtypes, self.allowed, strict=True):
            assert result.dtype == dtype
            error = _distance(result, exact)
            assert error <= allowed / margin(), f"off by {error:.3g}, allowed are {allowed / margin():.3g}"


def _results(returned: Any) -> list[torch.Tensor]:
    results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    return [torch.view_as_real(result) if result.is_complex() else result for result in results]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in fp64 or complex128."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return wide.requires_grad_(tensor.requires_grad)


def _nudged(tensor: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    """t · (1 ± eps / 2), each sign drawn."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator) - 0.5
    return (tensor.detach() * (1 + eps * signs.to(tensor.device))).requires_grad_(tensor.requires_grad)


def _distance(result: torch.Tensor, exact: torch.Tensor) -> float:
    assert result.shape == exact.shape
    return (result.detach().to(exact.dtype) - exact).abs().max().item()


def rounding_of(
    base: nn.Module, model: nn.Module, *args: Any, dtype: torch.dtype | None = None, **weights: Any
) -> Rounding:
    """The `Rounding` of an adapted model's output: the formula is `dense_model`, the tensors are all parameters,
    buffers and arguments.

    Args:
        base, model, weights: as in `dense_model`.
        args: the arguments of the models.
        dtype: the lowest precision of the computation, if it is not that of the output.
    """
    held = [tensor for module in (base, model) for tensor in (*module.parameters(), *module.buffers())]

    def formula(*tensors: torch.Tensor) -> torch.Tensor:
        own = copy.deepcopy(base), copy.deepcopy(model)
        places = [tensor for module in own for tensor in (*module.parameters(), *module.buffers())]
        for place, tensor in zip(places, tensors, strict=False):
            place.data = tensor.detach()
        with torch.no_grad():
            return first_tensor(dense_model(*own, **weights)(*tensors[len(held) :]))

    return Rounding(formula, [*held, *args], dtype)


def assert_differs(actual: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that two tensors are not nearly equal, so that a later `assert_close` is not trivial."""
    assert (actual - other).abs().max() > 1e-3 * other.abs().max()
