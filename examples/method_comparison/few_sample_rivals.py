"""Rivals that are no networks with a code: meta-learned starts, Gaussian processes, and a basis of the tasks seen."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import few_sample_models as models
import numpy as np
import torch
from few_sample_fits import Predict, descent
from few_sample_tasks import NOISE, Samples, Split
from torch import Tensor, nn
from torch.func import grad, vmap

TASKS, SUPPORT, QUERY, STEPS = 16, 20, 30, 3  # of a step of meta-learning


class Start(nn.Module):
    """What is common to all tasks, u, and the rates of gradient descent from there, one for each part of u."""

    def __init__(self, predict: Predict, parts: list[Tensor], further: nn.Module | None = None) -> None:
        super().__init__()
        self.predict, self.sizes, self.further = predict, [part.numel() for part in parts], further
        self.u = nn.Parameter(torch.cat([part.detach().flatten() for part in parts]))
        self.log_rates = nn.Parameter(torch.full((len(parts),), -4.0))

    @property
    def rates(self) -> Tensor:
        return self.log_rates.exp().repeat_interleave(torch.tensor(self.sizes))


def meta_batch(split: Split, source: torch.Generator, n: int) -> Samples:
    tasks = torch.tensor(split.seen)[torch.randint(len(split.seen), (TASKS,), generator=source)]
    count = split.rows.shape[1]
    rows = torch.stack([split.rows[task, torch.randperm(count, generator=source)[:n]] for task in tasks])
    return Samples(tasks, rows, split.x[rows], split.seen_y[tasks[:, None], rows])


def meta_learned(
    split: Split, start: Start, rate: float, seconds: models.Seconds, moves: Callable[[Start], Tensor]
) -> Start:
    """The loss on other samples of a task after three steps of gradient descent on 1 to 20, from `moves(start)`.

    All derivatives, as in MAML (arXiv 1703.03400), with rates that are learned, as in Meta-SGD (1707.09835).
    """
    source = torch.Generator().manual_seed(split.number)

    def loss() -> Tensor:
        n = int(torch.randint(1, SUPPORT + 1, (), generator=source))
        batch, rates = meta_batch(split, source, n + QUERY), start.rates

        def of_task(x: Tensor, y: Tensor) -> Tensor:
            def error(u: Tensor, rows: slice) -> Tensor:
                return (start.predict(u, x[rows]) - y[rows]).square().mean()

            u = moves(start)
            for _ in range(STEPS):
                u = u - rates * grad(error)(u, slice(n))
            return error(u, slice(n, None))

        return vmap(of_task)(batch.x, batch.y).mean()

    models.train(start, loss, rate, sum(seconds))
    return start


def maml(split: Split, rate: float, seconds: models.Seconds) -> Start:
    """All coefficients move."""
    torch.manual_seed(split.number)
    base = models.kan(split.x.shape[1], split.y.shape[2])
    start = Start(models.of_shapes(base), [layer.coefficients for layer in base.layers])
    return meta_learned(split, start, rate, seconds, lambda start: start.u)


def cavia(split: Split, rate: float, seconds: models.Seconds, k: int = 5) -> Start:
    """CAVIA (arXiv 1810.03642): further inputs, from zero, are all that moves for a task."""
    torch.manual_seed(split.number)
    network = models.kan(split.x.shape[1] + k, split.y.shape[2])

    def predict(z: Tensor, x: Tensor) -> Tensor:
        return network(torch.cat([x, z.expand(len(x), -1)], -1))

    start = Start(predict, [torch.zeros(k)], network)
    return meta_learned(split, start, rate, seconds, lambda start: torch.zeros(k))


def reptile(split: Split, rate: float, seconds: models.Seconds) -> Start:
    """Reptile (arXiv 1803.02999): towards the mean of what ten steps of Adam on 20 samples of a task make of it."""
    torch.manual_seed(split.number)
    source, base = torch.Generator().manual_seed(split.number), models.kan(split.x.shape[1], split.y.shape[2])
    start, begin = Start(models.of_shapes(base), [layer.coefficients for layer in base.layers]), time.process_time()
    with torch.no_grad():
        while (left := 1 - (time.process_time() - begin) / sum(seconds)) > 0:
            moved = descent(start.predict, start.u, rate, meta_batch(split, source, SUPPORT), [10])[10]
            start.u += left * (moved.mean(0) - start.u)
    return start


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
        rows = split.rows[tasks, torch.randint(split.rows.shape[1], (size,), generator=source)]
        self.inputs, self.outputs = self.columns(tasks, split.x[rows]), split.seen_y[tasks, rows].double().numpy()
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
