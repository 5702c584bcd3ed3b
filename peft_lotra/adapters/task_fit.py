"""Finds a task of a family from a few samples: its code or its parameters, with a covariance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import jacrev, vmap

from ..families.family import Family
from ..model import LoTRAModel
from .family import adapter_at
from .family_growth import add_task
from .task_noise import TaskNoise
from .task_problem import Found, Prior, Problem, Residual, prior_of, with_numbers


@dataclass
class TaskFit:
    """What `fit_task` has found.

    Attributes:
        task: the name of the task; or its parameters, with the names of the family.
        code: the code, shape (k,); or the parameters, scaled to [-1, 1] by their ranges.
        covariance: of the Laplace posterior of `code`, shape (k, k).
        noise: the standard deviation of every residual's columns, one tensor (outputs,) for each tensor of residuals.
        loss: half of the weighted sum of squares, with the prior's part.
    """

    task: Any
    code: torch.Tensor
    covariance: torch.Tensor
    noise: tuple[torch.Tensor, ...]
    loss: float
    _problem: Problem
    _found: Found

    @property
    def deviations(self) -> Any:
        """The standard deviation of each parameter, by name, or of the code."""
        deviations = self.covariance.diagonal().sqrt()
        if not isinstance(self.task, Mapping):
            return deviations
        ranges = self._problem.kind.ranges
        return {name: float(d) * (b - a) / 2 for (name, (a, b)), d in zip(ranges.items(), deviations, strict=True)}

    def predict(self, *inputs: Any, **parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's outputs at the task, and their standard deviations: sqrt(diag(J C Jᵀ) + σ²).

        Args:
            inputs, parameters: those of the model. If the core was fitted as well, the rows of the inputs have to be
                samples that do not see each other.

        Returns:
            Two tensors of the outputs' shape, (rows, outputs). σ is that of the first tensor of residuals.
        """
        mean, J = self._with_jacobian(inputs, parameters)
        variance = torch.einsum("...k,kl,...l->...", J, self._found.covariance, J)
        return mean, (variance + self.noise[0].square()).sqrt()

    def suggest(self, candidates: Any, n: int = 1, **parameters: Any) -> list[int]:
        """The rows of `candidates` whose measurement lowers the mean variance of the predictions at all of them most.

        Each of the n rows is chosen with those before it measured. A measurement gives all outputs of its row.

        Args:
            candidates: inputs of the model, with as many rows as there are candidates.
            n: how many rows.
            parameters: further arguments of the model.
        """
        rows = len(candidates)
        if not isinstance(n, int) or not 0 < n <= rows:
            raise ValueError(f"`n` should be an integer from 1 to the {rows} candidates but the value passed is {n!r}")
        _, J = self._with_jacobian((candidates,), parameters)
        J, C = J.reshape(rows, -1, J.shape[-1]), self._found.covariance
        chosen: list[int] = []
        noise = torch.diag(self.noise[0].square().expand(J.shape[1]))
        for _ in range(n):
            gain = J @ C  # shape: (rows, outputs, P)
            weights = torch.linalg.inv(gain @ J.mT + noise)
            # The variances of all outputs fall by |J C Jᵀ|² in the weights of the new measurement's own variance.
            M = torch.einsum("jop,joq->pq", gain, gain)
            fall = torch.einsum("ixp,pq,iyq,ixy->i", J, M, J, weights)
            if chosen:
                fall[chosen] = -torch.inf
            best = int(fall.argmax())
            chosen.append(best)
            C = C - gain[best].mT @ weights[best] @ gain[best]
        return chosen

    @torch.no_grad()
    def _with_jacobian(self, inputs: Any, parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's outputs at the task, and their derivatives, with one more axis, (P,)."""
        unknown, problem = self._found.unknown, self._problem
        if len(unknown) == len(self.code):
            mean, J = problem.linearised(unknown[None], lambda u: problem.net_at(u, *inputs, **parameters))
            return mean[0], J[0]

        def of_one(*sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            def y(u: torch.Tensor) -> torch.Tensor:
                return problem.net_at(u, *[part[None] for part in sample], **parameters)[0]

            return y(unknown), jacrev(y)(unknown)

        return vmap(of_one)(*inputs)


def fit_task(
    model: nn.Module,
    name: str | None,
    residual: Residual,
    data: Any,
    *,
    noise: float | torch.Tensor | Sequence[float | torch.Tensor] | TaskNoise | None = None,
    prior: tuple[torch.Tensor, torch.Tensor] | None = None,
    train: str = "code",
    starts: int = 4,
    iterations: int = 20,
    family: str = "default",
) -> TaskFit:
    """min over z of ½ Σ (r(z) / σ)² + ½ (z − μ)ᵀ Σ⁻¹ (z − μ): a task from a few samples, by Gauss–Newton.

    For a family with codes, z is the code of a new task, of k numbers, and N(μ, Σ) the distribution of the codes of
    the family's tasks (covariance by Ledoit and Wolf). Other families have parameters: z are those, scaled to [-1, 1],
    with N(0, 1). Of several starts, the one with the lowest result counts.

    >>> fit = fit_task(model, "R1234yf", lambda net, data: net(data[0]) - data[1], (x, y))
    >>> mean, std = fit.predict(x_new)
    >>> fit_task(model, None, residual, sensors).task                # {"lam": 1.31}

    Args:
        model: a PeftModel with a family adapter, which is active.
        name: the new task's name, under which it is added to the family; None adds nothing.
        residual: a function of a net and of `data` that returns residuals, shape (rows,) or (rows, outputs), or a
            tuple of such tensors. `net` is the model at the task: call it as the model. If a family with
            codes also has parameters, give them by name: `net(x, T=T)`. `net.task` maps the parameters' names to
            their values (or "code" to the code), for an equation in which they stand.
        data: what `residual` takes.
        noise: σ, the standard deviation of the samples and of the family's misfit together: what `task_noise`
            returns; or a number, or one for each output; a sequence of these for a tuple. None estimates it from the
            residuals at the result, which are small if the samples are few.
        prior: μ, shape (k,), and Σ, shape (k, k), in place of those above.
        train: "code": z alone. "core": the core as well, G ×₅ c(z) + δ, where δ ~ N(0, τ² s²) has the spread τ of
            `task_noise`; with more samples than the code needs, this is better. The result is an ordinary adapter.
        starts: how many of the mean and of the tasks' codes, those with the lowest losses, to start from.
        iterations: the most steps of each start.
        family: the name of the family adapter.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The model is then as it was before.
        ImportError: if the family has codes and scikit-learn is missing.

    Source: ours; codes after CoDA (arXiv 2202.01889).
    """
    tuner, kind, layers = with_numbers(model, family)
    if name is not None and not kind.code and train == "code":
        raise ValueError(f"`name` {name!r}: tasks of {family!r} have parameters and no names; pass None")
    if name is not None and (not isinstance(name, str) or name in kind.tasks):
        raise ValueError(f"`name` should be a new name of a task, or None, but the value passed is {name!r}")
    for argument, value in (("starts", starts), ("iterations", iterations)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{argument}` should be a positive integer but the value passed is {value!r}")
    if train not in ("code", "core"):
        raise ValueError(f"`train` should be 'code' or 'core' but the value passed is {train!r}")
    if train == "core" and not isinstance(noise, TaskNoise):
        raise ValueError("`train` 'core' takes how far cores move from `noise`: give what `task_noise` returns")
    if name is not None and train == "core":
        tuner.check_new(name)
    total, spread = (noise.total, noise.spread) if isinstance(noise, TaskNoise) else (noise, 0.0)
    problem = Problem(model, kind, layers, family, residual, data, spread)
    of_tasks, centres = prior_of(kind, layers, family, given=prior)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".*is outside of the family's range", UserWarning)
        found = problem.minimised(of_tasks, centres, total, starts, iterations)
        if isinstance(noise, TaskNoise) and train == "core":
            found = _with_core(problem, of_tasks, found, noise, iterations)
    k = problem.k
    code, covariance = found.unknown[:k], found.covariance[:k, :k]
    _check_found(code, covariance, of_tasks, kind)
    task: Any = name
    if not kind.code:
        task = problem.task(code)
        kind.weights(task)  # warns outside of the range
    if name is not None and train == "code":
        add_task(model, name, family=family, code=code)
    elif name is not None:
        _add_adapter(model, tuner, name, family, problem, found)
    return TaskFit(task, code, covariance, found.noise, found.loss, problem, found)


def _with_core(problem: Problem, prior: Prior, found: Found, noise: TaskNoise, iterations: int) -> Found:
    """The minimum over the code and the core, from that over the code."""
    size, like = sum(problem.core_sizes), found.unknown
    precision = torch.block_diag(prior.precision, torch.eye(size).to(like))
    both = Prior(torch.cat([prior.mean, like.new_zeros(size)]), precision)
    return problem.minimised(both, torch.cat([like, like.new_zeros(size)])[None], noise.rest, 1, iterations)


def _add_adapter(model: nn.Module, tuner: LoTRAModel, name: str, family: str, problem: Problem, found: Found) -> None:
    """An adapter of its own, with the core that was found. What is active stays active."""
    active = list(tuner.active_adapters)
    adapter_at(model, name, family=family, **problem.task(found.unknown[: problem.k]))
    with torch.no_grad():
        for core, move in problem.core_moves(found.unknown[problem.k :]).items():
            model.get_parameter(core.removesuffix(family) + name).add_(move)
    tuner.set_adapter(active)
    model.active_adapter = active[0]  # type: ignore[assignment]


def _check_found(code: torch.Tensor, covariance: torch.Tensor, prior: Prior, kind: Family) -> None:
    k = len(code)
    if torch.logdet(covariance @ prior.precision) > -1e-3 * k:
        warnings.warn("the samples say nothing of the task: the result is the mean of the prior", stacklevel=3)
    distance = float(prior.squared_distance(code))
    if kind.code and float(torch.special.gammaincc(torch.tensor(k / 2.0), torch.tensor(distance / 2))) < 1e-4:
        warnings.warn(
            f"the task is unlike those of the family: its code is {distance**0.5:.1f} standard deviations "
            "(Mahalanobis) from their mean. Look at the samples, or train an adapter of its own",
            stacklevel=3,
        )
