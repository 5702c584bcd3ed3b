"""Losses that are convex in a model's outputs: values, residuals and factors of Hessians of each sample, in fp64."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

# The label of a token that does not count, as in torch's cross_entropy.
IGNORED = -100
# Second derivatives below this are raised to it. H changes negligibly, and r stays finite where H vanishes.
_LEAST_CURVATURE = 1e-30


@runtime_checkable
class OutputLoss(Protocol):
    """ℓ(o, y) of each sample, convex in its outputs o: H = ∂²ℓ/∂o² = L Lᵀ.

    `outputs` are those of `residual_fn` in fp64, shape (N,) or (N, ..., k). `targets` are as `residual_fn` gives them.

    ```python
    class SquaredError:
        def value(self, outputs, targets):  # (N,)
            return (outputs - targets).square().sum(dim=1)

        def gradient(self, outputs, targets):  # the outputs' shape
            return 2 * (outputs - targets)

        def factor(self, outputs, targets):  # (N, ..., k, m), for outputs of (N,): (N, 1, m)
            return 2**0.5 * torch.eye(outputs.shape[1]).double().expand(len(outputs), -1, -1)
    ```

    H is block-diagonal over the axes in the dots: it has one block of k × k for each token, for example. The gradient
    need not be in the range of L. Where ℓ is linear, L = 0.
    """

    def value(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor: ...

    def gradient(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor: ...

    def factor(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor: ...


class ConvexLoss(ABC):
    """What makes a loss a least-squares problem: F with ∂²ℓ/∂o² = 2 F Fᵀ, and r with ∂ℓ/∂o = 2 F r."""

    def check(self, outputs: torch.Tensor, targets: Any) -> str | None:
        """What is wrong with the outputs or the targets; None if they fit."""
        return None

    @abstractmethod
    def value(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        """ℓ. shape: (N,)"""

    @abstractmethod
    def factor(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        """F. shape: (N, ..., k, m)"""

    @abstractmethod
    def residual(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        """r. shape: (N, ..., m)"""

    def counted(self, outputs: torch.Tensor, targets: Any) -> int | torch.Tensor:
        """How many samples the mean is taken over."""
        return len(outputs)


class OfEachOutput(ConvexLoss):
    """ℓ = Σ_i ℓ_i(o_i, y_i), where `terms` of (o, y) are ℓ_i, ℓ_i' and ℓ_i'', and y is from 0 to `most`."""

    def __init__(self, terms: Callable[..., tuple[torch.Tensor, ...]], most: float, allowed: str) -> None:
        self.terms, self.most, self.allowed = terms, most, allowed

    def check(self, outputs: torch.Tensor, targets: Any) -> str | None:
        if not isinstance(targets, torch.Tensor) or targets.shape != outputs.shape:
            return f"targets of the outputs' shape, {tuple(outputs.shape)}, but they are {described(targets)}"
        if not (targets.isfinite() & (targets >= 0) & (targets <= self.most)).all():
            return f"targets {self.allowed}, but they go from {targets.min()} to {targets.max()}"
        return None

    def value(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.terms(outputs, targets.double())[0].reshape(len(outputs), -1).sum(dim=1)

    def factor(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        _, _, second = self.terms(outputs, targets.double())
        return (second / 2).clamp(min=_LEAST_CURVATURE).sqrt()[..., None, None]

    def residual(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        _, first, _ = self.terms(outputs, targets.double())
        return first.unsqueeze(-1) / (2 * self.factor(outputs, targets).squeeze(-1))


def _poisson(o: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """ℓ = exp(o) − y·o, for counts y of rate exp(o)."""
    return o.exp() - y * o, o.exp() - y, o.exp()


def _bernoulli(o: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """ℓ = log(1 + exp(o)) − y·o, for y of 0 or 1 with the probability 1/(1 + exp(−o)) of 1, or between."""
    value = F.softplus(o, threshold=40) - y * o  # the default's error is 2e-9
    return value, o.sigmoid() - y, o.sigmoid() * (-o).sigmoid()


class LeastSquares(ConvexLoss):
    """ℓ = ‖o‖². The outputs are the residuals, there are no targets, and F = I."""

    def value(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return outputs.square().reshape(len(outputs), -1).sum(dim=1)

    def factor(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return torch.ones(*outputs.shape, 1, 1, dtype=outputs.dtype, device=outputs.device)

    def residual(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return outputs.unsqueeze(-1)


class CrossEntropy(ConvexLoss):
    """ℓ = −Σ_c y_c log p_c with p = softmax(o), over the C classes on the last axis, summed over the other axes.

    H = s(diag(p) − ppᵀ) = 2 F Fᵀ with s = Σ_c y_c and F = √(s/2) · (diag(√p) − p√pᵀ), and r = (sp − y)/√(2sp).
    """

    def check(self, outputs: torch.Tensor, targets: Any) -> str | None:
        shape, classes = tuple(outputs.shape), outputs.shape[-1]
        if outputs.ndim < 2:
            return f"outputs of shape (N, C) or (N, T, C), but they are {described(outputs)}"
        if not isinstance(targets, torch.Tensor) or targets.shape not in (shape, shape[:-1]):
            wanted = f"labels of shape {shape[:-1]} or probabilities of shape {shape}"
            return f"{wanted} beside outputs of shape {shape}, but they are {described(targets)}"
        soft = targets.shape == shape
        if soft != targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            wanted = "probabilities in floating point" if soft else "whole numbers as labels"
            return f"{wanted}, but they are {described(targets)}"
        good = targets.isfinite() & (targets >= 0) if soft else (targets >= 0) & (targets < classes)
        if not (good | (targets == IGNORED) & (not soft)).all():
            wanted = "probabilities of at least 0" if soft else f"labels from 0 to {classes - 1}, or {IGNORED},"
            return f"{wanted} but they go from {targets.min()} to {targets.max()}"
        return None

    def _probabilities(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """y, zero where a token does not count. shape: (N, ..., C)"""
        if targets.is_floating_point():
            return targets.double()
        counted = (targets != IGNORED).unsqueeze(-1)
        # Not `one_hot`, which looks at the labels: on an accelerator, that waits for them.
        return torch.zeros_like(outputs).scatter(-1, targets.long().unsqueeze(-1) * counted, counted.to(outputs))

    def value(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        y = self._probabilities(outputs, targets)
        terms = torch.where(y > 0, y * outputs.log_softmax(dim=-1), 0)  # 0 · log 0 = 0
        return -terms.reshape(len(outputs), -1).sum(dim=1)

    def factor(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = self._probabilities(outputs, targets).sum(dim=-1)[..., None, None]
        p = outputs.softmax(dim=-1)
        roots = p.clamp(min=_LEAST_CURVATURE).sqrt()
        return (total / 2).sqrt() * (torch.diag_embed(roots) - p.unsqueeze(-1) * roots.unsqueeze(-2))

    def residual(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        y, p = self._probabilities(outputs, targets), outputs.softmax(dim=-1)
        total = y.sum(dim=-1, keepdim=True)
        return (total * p - y) / (2 * total.clamp(min=_LEAST_CURVATURE) * p.clamp(min=_LEAST_CURVATURE)).sqrt()

    def counted(self, outputs: torch.Tensor, targets: torch.Tensor) -> int | torch.Tensor:
        """How many labels are not ignored, as in torch's mean."""
        return targets[..., 0].numel() if targets.is_floating_point() else (targets != IGNORED).sum()


class Given(ConvexLoss):
    """An OutputLoss that the caller gives. Here r = 0, and the gradient is a further term of the system."""

    def __init__(self, loss: OutputLoss) -> None:
        self.loss = loss

    def value(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return self._answer("value", outputs, targets, (len(outputs),))

    def gradient(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        """∂ℓ/∂o, in the shape of the outputs."""
        return self._answer("gradient", outputs, targets, tuple(outputs.shape))

    def factor(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        blocks = tuple(outputs.shape) if outputs.ndim > 1 else (len(outputs), 1)
        return self._answer("factor", outputs, targets, (*blocks, "m")) / 2**0.5

    def residual(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        return torch.zeros_like(self.factor(outputs, targets)[..., 0, :])

    def check_gradient(self, outputs: torch.Tensor, targets: Any) -> None:
        """Raise ValueError if `gradient` is not the derivative of `value`, where autograd can differentiate that."""
        with torch.enable_grad():
            own = outputs.detach().clone().requires_grad_()
            value = self.value(own, targets).sum()
        if not value.requires_grad:
            return
        (expected,) = torch.autograd.grad(value, own)
        found = self.gradient(outputs, targets)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
            raise ValueError(
                "`loss.gradient` should be the derivative of `loss.value` by the outputs of each sample, without a "
                f"mean over samples, but it gives {found[0].tolist()} for the first one, and autograd "
                f"{expected[0].tolist()}"
            )

    def _answer(self, method: str, outputs: torch.Tensor, targets: Any, shape: tuple[Any, ...]) -> torch.Tensor:
        answer = getattr(self.loss, method)(outputs, targets)
        found = tuple(answer.shape) if isinstance(answer, torch.Tensor) else ()
        if len(found) != len(shape) or any(b not in (a, "m") for a, b in zip(found, shape, strict=True)):
            wanted = str(shape).replace("'", "")
            raise ValueError(
                f"`loss.{method}` should give a tensor of shape {wanted} for outputs of shape {tuple(outputs.shape)}, "
                f"but it gave {described(answer)}"
            )
        return answer.double()


_LOSSES = {
    "least_squares": LeastSquares(),
    "cross_entropy": CrossEntropy(),
    "poisson": OfEachOutput(_poisson, math.inf, "of at least 0, as counts are"),
    "bernoulli": OfEachOutput(_bernoulli, 1.0, "from 0 to 1"),
}


def checked_losses(loss: Any, names: list[str]) -> dict[str, ConvexLoss]:
    """The loss of every kind of residuals. ValueError or TypeError if there is none, or it has other keys."""
    if not isinstance(loss, Mapping):
        return dict.fromkeys(names, _checked(loss))
    if set(loss) != set(names):
        wanted = "be one loss, as `residual_fn` is one function" if names == [""] else f"have the keys {sorted(names)}"
        raise ValueError(f"`loss` should {wanted}, but it has the keys {sorted(loss)}")
    return {name: _checked(loss[name]) for name in names}


def _checked(loss: Any) -> ConvexLoss:
    if isinstance(loss, str) and loss in _LOSSES:
        return _LOSSES[loss]
    if not isinstance(loss, str | type) and isinstance(loss, OutputLoss):
        return Given(loss)
    raise (ValueError if isinstance(loss, str) else TypeError)(
        f"`loss` should be one of {[*_LOSSES]}, or an object with the methods `value`, `gradient` and `factor` of "
        f"`peft_lotra.OutputLoss`, but the value passed is {loss!r}"
    )


def described(value: Any) -> str:
    """A description of a value, for an error."""
    if isinstance(value, torch.Tensor):
        return f"of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__qualname__}"
