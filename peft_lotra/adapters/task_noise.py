"""How far a family is from its own tasks: the noise that makes the intervals of a new task honest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from .task_problem import Prior, Problem, Residual, deviations, prior_of, with_numbers

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
    """σ and τ of r = σ ε + J_δ δ, ε ~ N(0, 1), δ ~ N(0, τ² s²), from residuals of tasks that the family knows.

    The code of each task is fitted to its samples, with a prior from the other tasks. σ in `total` is such that 95 %
    of the residuals are below 1.96 σ. Of that, as much is the core's as makes the residuals of all tasks most likely
    (evidence), with the same mean variance.

    Args:
        model: a PeftModel with a trained family adapter, which is active.
        residual: as `fit_task` takes it.
        samples: what `residual` takes as `data`, by name of the task; for a family with parameters alone, a list of
            such data of several tasks. Some tens of samples of each task are enough, also those of the training;
            with fewer of them than numbers in a code, nothing is left for σ.
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
    if unknown := [name for name in given if kind.code and name not in kind.tasks]:
        raise ValueError(f"`samples` has {unknown}, which are no tasks of {family!r}")
    if not given:
        raise ValueError("`samples` is empty: give data of at least one task")

    def problems() -> Iterator[tuple[Problem, Prior, torch.Tensor]]:
        for name, data in tqdm(given.items(), "task_noise", disable=not progressbar, leave=False):
            yield Problem(model, kind, layers, family, residual, data, 1.0), *prior_of(kind, layers, family, name)

    with torch.no_grad():
        sigma: Any = None
        for _ in range(2):  # the second time with the σ of all tasks
            ends, parts = [], []
            for problem, prior, centres in problems():
                found = problem.minimised(prior, centres, sigma, 4, 20)
                ends.append(found.unknown)
                parts.append(problem.residuals(found.unknown))
            together = [torch.cat(own) for own in zip(*parts, strict=True)]
            sigma = [own.abs().quantile(0.95, 0).clamp(min=1e-12) / 1.96 for own in together]
        total = deviations(sigma, parts[0])
        terms = [_terms(problem, prior, z) for (problem, prior, _), z in zip(problems(), ends, strict=True)]
    deviation = [torch.cat([s.expand_as(part).flatten() for s, part in zip(total, own, strict=True)]) for own in parts]
    # τ² s² adds as much to the variance as the σ of `rest` lacks of that of `total`.
    size = sum([float(s.square().sum()) for s in deviation]) / sum([float(B.trace()) for *_, B in terms])

    def evidence(ratio: float) -> float:
        """log N(r; mean, J C Jᵀ + τ² B + σ²) of the residuals of all tasks, but for a constant."""
        found = 0.0
        for (r, A, B), s in zip(terms, deviation, strict=True):
            K = A + size * (1 - ratio**2) * B + torch.diag((ratio * s).square())
            L = torch.linalg.cholesky(K)
            found -= float(torch.linalg.solve_triangular(L, r[:, None], upper=False).square().sum() / 2)
            found -= float(L.diagonal().log().sum())
        return found

    best = max(RATIOS, key=evidence)
    return TaskNoise(total, tuple([best * s for s in total]), (size * (1 - best**2)) ** 0.5)


def _terms(problem: Problem, prior: Prior, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residuals at the prior's mean by linearisation, and their covariances by the code and by e, for τ = 1."""
    parts, J = problem.linearised(torch.cat([z, z.new_zeros(problem.core_size)])[None])
    r, derivatives = torch.cat([part.flatten() for part in parts]), torch.cat([own[0].flatten(0, 1) for own in J])
    by_code, by_core = derivatives.split([problem.k, problem.core_size], 1)
    A = by_code @ torch.linalg.solve(prior.precision, by_code.mT)
    return r + by_code @ (prior.mean - z), A, by_core @ by_core.mT
