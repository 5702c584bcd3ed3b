"""How a new task's samples are taken in: least squares with a prior, gappy POD, and Gaussian processes.

B problems are solved at once. u is what is unknown of a task: a code, or all numbers of a network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from few_sample_tasks import NOISE, Samples, Split
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

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


def pod(split: Split, k: int, samples: Samples) -> Tensor:
    """mean + Σ_j z_j b_j, b the first singular vectors of the tasks seen at all points, with their variances as prior.

    Gappy POD. It needs all tasks at the same points. shape: (B, points, outputs)
    """
    seen = split.y[split.seen].double()
    mean, shape = seen.mean(0), seen.shape[1:]
    U, S, V = torch.linalg.svd((seen - mean).flatten(1), full_matrices=False)
    S, V, rest = S[:k] / len(seen) ** 0.5, V[:k].reshape(-1, *shape), (U[:, k:] * S[k:]) @ V[k:]
    measured = NOISE * split.spread[split.seen].double().mean(0)
    noise = rest.reshape(-1, *shape).square().mean((0, 1)) + measured.square()
    basis = (S[:, None, None] * V)[:, samples.rows]  # shape: (k, B, n, outputs)
    J = (basis / noise.sqrt()).permute(1, 2, 3, 0).flatten(1, 2)
    r = ((samples.y - mean[samples.rows]) / noise.sqrt()).flatten(1)
    z = torch.linalg.solve(J.mT @ J + torch.eye(len(S), dtype=J.dtype), torch.einsum("brk,br->bk", J, r))
    return mean + torch.einsum("bk,kpo->bpo", z, S[:, None, None] * V)


class GaussianProcesses:
    """One for each output: k₁(x, what is known) + k₂(x) · [same task] + noise, fitted to samples of the tasks seen."""

    def __init__(self, split: Split, size: int = 500) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        source = torch.Generator().manual_seed(split.number)
        self.split, known = split, split.domain.known
        self.known = known if known is not None else torch.zeros(len(split.y), 0)
        tasks = torch.tensor(split.seen)[torch.randint(len(split.seen), (size,), generator=source)]
        rows = torch.randint(len(split.x), (size,), generator=source)
        self.inputs, self.outputs = self.columns(tasks, split.x[rows]), split.y[tasks, rows].double().numpy()
        n, w, free, without, one = split.x.shape[1], self.known.shape[1], (0.1, 100.0), (1e5, 1e5), (1e-3, 1e-3)

        def kernel(of_known: tuple[float, float], of_task: tuple[float, float]) -> Any:
            bounds = [free] * n + [of_known] * w + [of_task]
            start = [1.0 if low < high else low for low, high in bounds]
            return ConstantKernel(0.5, (1e-4, 1e3)) * RBF(start, np.array(bounds))

        form = kernel(free, without) + kernel(without, one) + WhiteKernel(1e-4, (1e-7, 1.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bounds that are reached, L-BFGS that stops early
            self.kernels = [GaussianProcessRegressor(form).fit(self.inputs, y).kernel_ for y in self.outputs.T]

    def columns(self, tasks: Tensor, x: Tensor) -> np.ndarray:
        """x, what is known, and the task's number, at which the second kernel is 1 or 0."""
        return torch.cat([x.double(), self.known[tasks].double(), tasks[:, None].double()], 1).numpy()

    def predicted(self, samples: Samples) -> Tensor:
        from sklearn.gaussian_process import GaussianProcessRegressor

        found = []
        for task, x, y in zip(samples.tasks, samples.x, samples.y, strict=True):
            inputs = np.concatenate([self.inputs, self.columns(task.expand(len(x)), x)])
            outputs = np.concatenate([self.outputs, y.numpy()])
            points = self.columns(task.expand(len(self.split.x)), self.split.x)
            parts = [
                GaussianProcessRegressor(kernel, optimizer=None).fit(inputs, column).predict(points)
                for kernel, column in zip(self.kernels, outputs.T, strict=True)
            ]
            found.append(torch.as_tensor(np.stack(parts, 1)))
        return torch.stack(found)
