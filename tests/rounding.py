"""Comparisons in low precision, by the rounding of a dense formula."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peft_lotra.preserved import first_tensor
from peft_lotra.testing import dense_model
from peft_lotra.testing.oracle import margin


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
