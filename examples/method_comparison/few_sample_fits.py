"""What moves when a new task's samples come: least squares by Levenberg–Marquardt with a prior, and gradient descent.

Both solve B problems at once. u is what is unknown of a task: a code, or all numbers of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from few_sample_tasks import Samples
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

Predict = Callable[[Tensor, Tensor], Tensor]  # u (K,), x (n, inputs) → y (n, outputs)


def least_squares(
    predict: Predict,
    centre: Tensor,
    factor: Tensor | float,
    sigma: Tensor | float,
    samples: Samples,
    iterations: int,
    starts: Tensor | None = None,
) -> Tensor:
    """min over v of ½ Σ ((f(u, x) − y) / σ)² + ½ |v|², u = centre + factor v: the prior N(centre, factor factorᵀ).

    Args:
        centre: shape (K,).
        factor: of the prior's covariance, shape (K, K), or a number.
        sigma: a number, or shape (outputs,).
        starts: v of which the four with the least losses are starts, shape (any, K); None for the centre. The lowest
            result counts.

    Returns:
        u. shape: (B, K)
    """
    starts = torch.zeros(1, len(centre), dtype=centre.dtype) if starts is None else starts
    B, S = len(samples.x), min(4, len(starts))

    def at(v: Tensor) -> Tensor:
        return centre + (v * factor if isinstance(factor, float) else v @ factor.mT)

    def residuals(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return ((predict(at(v), x) - y) / sigma).flatten()

    def loss(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (residuals(v, x, y).square().sum() + v.square().sum()) / 2

    losses = vmap(vmap(loss, (0, None, None)), (None, 0, 0))(starts, samples.x, samples.y)
    v = starts[losses.nan_to_num(torch.inf).argsort(1)[:, :S]].flatten(0, 1)
    x, y = samples.x.repeat_interleave(S, 0), samples.y.repeat_interleave(S, 0)
    losses, damping = vmap(loss)(v, x, y), torch.full((B * S,), 1e-3, dtype=centre.dtype)

    def by_sample(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return vmap(jacrev(residuals), (None, 0, 0))(v, x[:, None], y[:, None]).flatten(0, 1)

    derivative = by_sample if len(centre) > y[0].numel() else jacfwd(residuals)
    for _ in range(iterations):
        r, J = vmap(residuals)(v, x, y), vmap(derivative)(v, x, y)
        g = torch.einsum("brk,br->bk", J, r) + v
        # JᵀJ + (1 + damping · its mean diagonal) I, inverted in the smaller of the two spaces
        shift = (1 + damping * J.square().sum((1, 2)) / len(centre))[:, None]
        if J.shape[1] < J.shape[2]:
            inner = J @ J.mT + shift[..., None] * torch.eye(J.shape[1], dtype=J.dtype)
            image = torch.linalg.solve(inner, torch.einsum("brk,bk->br", J, g))
            step = (g - torch.einsum("brk,br->bk", J, image)) / shift
        else:
            step = torch.linalg.solve(J.mT @ J + shift[..., None] * torch.eye(J.shape[2], dtype=J.dtype), g)
        lower = vmap(loss)(v - step, x, y)
        better = lower < losses  # False for NaN
        v, losses = torch.where(better[:, None], v - step, v), torch.where(better, lower, losses)
        damping = torch.where(better, damping / 5, damping * 4)
    best = losses.reshape(B, S).argmin(1)
    return at(v.reshape(B, S, -1)[torch.arange(B), best])


def descent(
    predict: Predict, start: Tensor, rate: Tensor | float, samples: Samples, marks: Iterable[int], adam: bool = True
) -> dict[int, Tensor]:
    """u after so many steps of Adam, or of plain gradient descent, on the mean squared error. shape: (B, K) each

    Args:
        rate: a number, or shape (B, 1) or (K,).
    """

    def loss(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (predict(u, x) - y).square().mean()

    slope, marks = vmap(grad(loss)), sorted(marks)
    u = start.expand(len(samples.x), -1).clone()
    mean, square = torch.zeros_like(u), torch.zeros_like(u)
    found = {0: u} if 0 in marks else {}
    for k in range(1, marks[-1] + 1):
        g = slope(u, samples.x, samples.y)
        if adam:
            mean, square = mean.lerp(g, 0.1), square.lerp(g.square(), 0.001)
            g = mean / (1 - 0.9**k) / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
        u = u - rate * g
        if k in marks:
            found[k] = u
    return found


def curve(predict: Predict, u: Tensor, x: Tensor) -> Tensor:
    """f(u, x) of B tasks at all points. shapes: (B, K), (B, points, inputs) → (B, points, outputs)"""
    return vmap(predict)(u, x)


def deviations(predict: Predict, u: Tensor, factor: Tensor, sigma: Tensor, samples: Samples, x: Tensor) -> Tensor:
    """sqrt(diag(J C Jᵀ) + σ²) at all points, C the Laplace posterior's covariance. shape: (B, points, outputs)"""
    J = vmap(jacfwd(predict))(u, samples.x) @ factor / sigma[:, None]  # shape: (B, n, outputs, k)
    J = J.flatten(1, 2)
    C = torch.linalg.inv(J.mT @ J + torch.eye(u.shape[1], dtype=u.dtype))
    J = vmap(jacfwd(predict), (0, None))(u, x) @ factor
    return (torch.einsum("bpok,bkl,bpol->bpo", J, C, J) + sigma.square()).sqrt()


def prior_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor of the covariance (Ledoit–Wolf) of the seen tasks' codes. shapes: (tasks, k) → (k,), (k, k)"""
    from sklearn.covariance import ledoit_wolf

    covariance: Any = ledoit_wolf(codes.numpy())[0]
    return codes.mean(0), torch.linalg.cholesky(torch.as_tensor(covariance, dtype=codes.dtype))
