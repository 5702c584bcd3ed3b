"""How far a family is from its own tasks: the noise that makes the intervals of a new task honest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributions import MultivariateNormal
from tqdm import tqdm

from .task_problem import Parts, Prior, Problem, Residual, prior_of, with_numbers

COUNTS = (1, 3, 10)  # how many samples of each task are fitted, to see how far the others are from the result
RATIOS = [2 ** (-step / 2) for step in range(11)]  # of σ in `rest` to σ in `total`: what is tried


class TaskNoise(NamedTuple):
    """What `task_noise` returns, for `fit_task(..., noise=...)`.

    Attributes:
        total: σ of each column of residuals if the code alone is fitted; one tensor for each tensor of residuals.
        rest: σ if the core is fitted as well.
        spread: τ, by which the core of a task may differ from G ×₅ c(z), in units of the cores' own differences.
    """

    total: tuple[torch.Tensor, ...]
    rest: tuple[torch.Tensor, ...]
    spread: float


def task_noise(
    model: nn.Module,
    residual: Residual,
    samples: Mapping[str, Any] | Sequence[Any],
    *,
    family: str = "default",
    progressbar: bool = True,
) -> TaskNoise:
    """σ and τ of r = σ ε + J_δ δ, ε ~ N(0, 1), δ ~ N(0, τ² s²), from residuals of several tasks.

    The code of each task is fitted to its first 1, 3 and 10 samples, with a prior from the family's other tasks. With
    σ in `total`, 95 % of its other samples lie in the intervals of 95 % that `predict` states. Of that, as much is the
    core's as makes the residuals of all tasks most likely (evidence), with the same mean variance.

    Args:
        model: a PeftModel with a trained family adapter, which is active.
        residual: as `fit_task` takes it.
        samples: what `residual` takes as `data`, by name of the task; for a family with parameters alone, a list of
            such data of several tasks. Five to ten tasks are best that the family was not trained on: on its own tasks
            it is better than on new ones. Some tens of samples of each are enough, in random order.
        family: the name of the family adapter.
        progressbar: whether to show progress.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: ours.
    """
    _, kind, layers = with_numbers(model, family)
    if kind.code and not isinstance(samples, Mapping):
        raise TypeError(f"`samples` should map names of tasks to their data but is a {type(samples).__name__}")
    given: dict[Any, Any] = dict(samples) if isinstance(samples, Mapping) else dict(enumerate(samples))
    if not given:
        raise ValueError("`samples` is empty: give data of at least one task")

    problems = [
        (Problem(model, kind, layers, family, residual, data, 1.0), *prior_of(kind, layers, family, name))
        for name, data in given.items()
    ]
    with torch.no_grad(), tqdm(total=4 * len(given), desc="task_noise", disable=not progressbar, leave=False) as bar:
        ends, parts = [], []
        for problem, prior, centres in problems:
            ends.append(problem.minimised(prior, centres, None, 4, 20).unknown)
            parts.append(problem.parts(problem.residuals(ends[-1])))
            bar.update()
        total = fitted = _in_interval(parts)
        fewest = min([len(part) for own in parts for part in own])
        for _ in range(2):  # the covariance of the codes depends on σ
            relative = []
            for problem, prior, centres in problems:
                left = [_beyond(problem, prior, centres, total, rows) for rows in COUNTS if rows < fewest]
                relative.append(tuple(map(torch.cat, zip(*left, strict=True))))
                bar.update()
            if fewest > COUNTS[0]:
                total = tuple([s * factor for s, factor in zip(total, _in_interval(relative), strict=True)])
        terms = []
        for (problem, prior, _), z in zip(problems, ends, strict=True):
            terms.append((*_terms(problem, prior, z), problem.flat(fitted).to("cpu", torch.float64)))
            bar.update()
    # τ² s² adds as much to the variance as the σ of `rest` lacks of that of `total`.
    size = sum([float(s.square().sum()) for *_, s in terms]) / sum([float(B.trace()) for _, _, B, _ in terms])

    def evidence(ratio: float) -> float:
        """log N(r; mean, J C Jᵀ + τ² B + σ²) of the residuals of all tasks."""
        found = 0.0
        for r, A, B, s in terms:
            K = A + size * (1 - ratio**2) * B + torch.diag((ratio * s).square())
            found += float(MultivariateNormal(torch.zeros_like(r), K, validate_args=False).log_prob(r))
        return found

    best = max(RATIOS, key=evidence)
    larger = float(torch.cat([s / own for s, own in zip(total, fitted, strict=True)]).mean())
    return TaskNoise(total, tuple([best * s for s in total]), larger * (size * (1 - best**2)) ** 0.5)


def _in_interval(of_tasks: list[Parts]) -> Parts:
    """By which columns are divided for 95 % of a new task's to lie in a normal distribution's interval of 95 %.

    That is the quantile of all tasks, times that of each task in units of the others': tasks differ.
    """
    found = []
    for own in zip(*[[part.abs() for part in parts] for parts in of_tasks], strict=True):
        quantile = torch.cat(own).quantile(0.95, 0)
        if len(own) > 2:
            others = [torch.cat([*own[:k], *own[k + 1 :]]).quantile(0.95, 0) for k in range(len(own))]
            ratios = torch.cat([part / other for part, other in zip(own, others, strict=True)])
            quantile = quantile * ratios.quantile(0.95, 0).clamp(min=1)
        found.append(quantile.clamp(min=1e-12) / 1.96)
    return tuple(found)


def _beyond(problem: Problem, prior: Prior, centres: torch.Tensor, sigma: Parts, rows: int) -> Parts:
    """Residuals of the rows to which a code was not fitted, in units of the deviation that `predict` states."""
    problem.rows = rows
    found = problem.minimised(prior, centres, sigma, 4, 20)
    problem.rows = None
    r, J = (part[0] for part in problem.linearised(found.unknown[None]))
    variance = torch.einsum("nk,kl,nl->n", J, found.covariance, J) + problem.flat(sigma).square()
    return tuple([part[rows:] for part in problem.parts(r / variance.sqrt())])


def _terms(problem: Problem, prior: Prior, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residuals at the prior's mean by linearisation, and their covariances by the code and by e, for τ = 1."""
    cores = sum(problem.core_sizes)
    r, J = (part[0] for part in problem.linearised(torch.cat([z, z.new_zeros(cores)])[None]))
    # In fp32 a code that acts much more than σ would leave the covariance of the residuals indefinite.
    r, J, away, precision = (t.to("cpu", torch.float64) for t in (r, J, prior.mean - z, prior.precision))
    by_code, by_core = J.split([problem.k, cores], 1)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(precision), by_code.mT, upper=False)
    return r + by_code @ away, half.mT @ half, by_core @ by_core.mT
