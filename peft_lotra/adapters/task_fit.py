"""Finds a task of a family from a few samples: its code or its parameters, with a covariance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..families.family import Family
from ..layers.codes import container_of_codes
from ..layers.lotra import adapted_tensors
from ..model import lotra_model
from ..placement.sharded import full_tensor
from ..registration import TASK
from .family_growth import add_task

# residual(net, data) -> (rows,) or (rows, outputs), or a tuple of such tensors; net is the model at the task.
Residual = Callable[[Callable[..., torch.Tensor], Any], torch.Tensor | tuple[torch.Tensor, ...]]


class Prior(NamedTuple):
    """N(mean, covariance) of what is unknown of a task, with the inverse of the covariance."""

    mean: torch.Tensor  # shape: (k,)
    precision: torch.Tensor  # shape: (k, k)

    def squared_distance(self, unknown: torch.Tensor) -> torch.Tensor:
        """The square of the Mahalanobis distance from the mean."""
        away = unknown - self.mean
        return away @ self.precision @ away


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
    _net: Callable[..., torch.Tensor]  # of a code, and of the model's inputs
    _widths: Mapping[str, float]  # of the parameters, by which `code` is scaled

    @property
    def deviations(self) -> Any:
        """The standard deviation of each parameter, by name, or of the code."""
        deviations = self.covariance.diagonal().sqrt()
        if not isinstance(self.task, Mapping):
            return deviations
        return {name: float(d) * width for (name, width), d in zip(self._widths.items(), deviations, strict=True)}

    def predict(self, *inputs: Any, **parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's outputs at the task, and their standard deviations: sqrt(diag(J C Jᵀ) + σ²).

        Args:
            inputs, parameters: those of the model.

        Returns:
            Two tensors of the outputs' shape, (rows, outputs). σ is that of the first tensor of residuals.
        """
        mean, J = self._with_jacobian(inputs, parameters)
        variance = torch.einsum("...k,kl,...l->...", J, self.covariance, J)
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
        J = J.reshape(rows, -1, len(self.code))
        chosen: list[int] = []
        noise, C = torch.diag(self.noise[0].square().expand(J.shape[1])), self.covariance
        for _ in range(n):
            gain = J @ C  # shape: (rows, outputs, k)
            inner = gain @ J.mT + noise
            lowered = C - gain.mT @ torch.linalg.solve(inner, gain)  # shape: (rows, k, k)
            variance = torch.einsum("jok,ikl,jol->i", J, lowered, J)
            if chosen:
                variance[chosen] = torch.inf
            best = int(variance.argmin())
            chosen.append(best)
            C = lowered[best]
        return chosen

    @torch.no_grad()
    def _with_jacobian(self, inputs: Any, parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
        def outputs(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self._net(code, *inputs, **parameters)
            return y, y

        J, y = torch.func.jacfwd(outputs, has_aux=True)(self.code)
        return y, J


def fit_task(
    model: nn.Module,
    name: str | None,
    residual: Residual,
    data: Any,
    *,
    noise: float | torch.Tensor | Sequence[float | torch.Tensor] | None = None,
    starts: int = 4,
    iterations: int = 20,
    family: str = "default",
) -> TaskFit:
    """min over z of ½ Σ (r(z) / σ)² + ½ (z − μ)ᵀ Σ⁻¹ (z − μ): a task from a few samples, by Gauss–Newton.

    For a family with codes, z is the code of a new task, of k numbers, and N(μ, Σ) the distribution of the codes of
    the family's tasks (covariance by Ledoit and Wolf). Other families have parameters: z are those, scaled to [-1, 1],
    with N(0, 1). Nothing else is trained. Of several starts, the one with the lowest result counts.

    >>> fit = fit_task(model, "R1234yf", lambda net, data: net(data[0]) - data[1], (x, y))
    >>> mean, std = fit.predict(x_new)
    >>> fit_task(model, None, residual, sensors).task                # {"lam": 1.31}

    Args:
        model: a PeftModel with a family adapter, which is active.
        name: the new task's name, under which it is added to the family; None adds nothing.
        residual: a function of a net and of `data` that returns residuals, shape (rows,) or (rows, outputs), or a
            tuple of such tensors. `net` is the model at the task: call it as the model. If the family also has
            parameters, give them by name: `net(x, T=T)`.
        data: what `residual` takes.
        noise: σ, the standard deviation of the samples and of the family's misfit together: a number, or one for each
            output; a sequence of these for a tuple. None estimates it from the residuals at the result, which are
            small if the samples are few: give what held-out tasks have.
        starts: how many of the mean and of the tasks' codes, those with the lowest losses, to start from.
        iterations: the most steps of each start.
        family: the name of the family adapter.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The model is then as it was before.
        ImportError: if the family has codes and scikit-learn is missing.

    Source: ours; codes after CoDA (arXiv 2202.01889).
    """
    tuner = lotra_model(model, family)
    kind = tuner.peft_config[family].kind
    if kind is None or (kind.tasks and not kind.code):
        raise ValueError(
            f"`family` {family!r} has neither parameters nor codes: make one with `LoTRAConfig(family=..., "
            "family_code=...)`"
        )
    if name is not None and not kind.code:
        raise ValueError(f"`name` {name!r}: tasks of {family!r} have parameters and no names; pass None")
    if name is not None and (not isinstance(name, str) or name in kind.tasks):
        raise ValueError(f"`name` should be a new name of a task, or None, but the value passed is {name!r}")
    for argument, value in (("starts", starts), ("iterations", iterations)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{argument}` should be a positive integer but the value passed is {value!r}")
    layers = list(adapted_tensors(tuner.model, family).values())
    problem = _Problem(model, kind, residual, data)
    if kind.code:
        prior, centres = _prior(full_tensor(container_of_codes(layers, family)[family]).detach())
    else:
        prior, centres = _uninformed(len(kind.ranges), layers[0].lotra_core[family])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".*is outside of the family's range", UserWarning)
        found = problem.minimised(prior, centres, noise, starts, iterations)
    _check_found(found, prior, kind)
    task: Any = name
    if not kind.code:
        task = problem.parameters(found.code)
        kind.weights(task)  # warns outside of the range
    if name is not None:
        add_task(model, name, family=family, code=found.code)
    widths = {key: (b - a) / 2 for key, (a, b) in kind.ranges.items()}
    return TaskFit(task, found.code, found.covariance, found.noise, found.loss, problem.net_at, widths)


class _Found(NamedTuple):
    code: torch.Tensor
    covariance: torch.Tensor
    noise: tuple[torch.Tensor, ...]
    loss: float


class _Problem:
    """The residuals of one task as a function of what is unknown of it."""

    def __init__(self, model: nn.Module, kind: Family, residual: Residual, data: Any) -> None:
        self.model, self.kind, self.residual, self.data = model, kind, residual, data

    def parameters(self, unknown: torch.Tensor) -> dict[str, Any]:
        """The family's parameters, from their values scaled to [-1, 1]."""
        ends = self.kind.ranges.items()
        scaled = unknown.unbind()
        values = {name: a + (b - a) * (x + 1) / 2 for (name, (a, b)), x in zip(ends, scaled, strict=True)}
        is_transformed = torch._C._functorch.is_functorch_wrapped_tensor(unknown)
        return values if is_transformed else {name: float(value) for name, value in values.items()}

    def net_at(self, unknown: torch.Tensor, *inputs: Any, **others: Any) -> torch.Tensor:
        """The model's outputs at the task. `others` may have the parameters of a family with codes."""
        if not self.kind.code:
            return self.model(*inputs, **others, **{TASK: self.parameters(unknown)})
        given = {name: others.pop(name) for name in self.kind.ranges if name in others}
        return self.model(*inputs, **others, **{TASK: {**given, "code": unknown}})

    def residuals(self, unknown: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shape (rows, outputs) each."""

        def net(*inputs: Any, **others: Any) -> torch.Tensor:
            return self.net_at(unknown, *inputs, **others)

        found = self.residual(net, self.data)
        parts = found if isinstance(found, tuple) else (found,)
        if not all(isinstance(part, torch.Tensor) and 0 < part.dim() < 3 and part.numel() for part in parts):
            shapes = [tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
            raise ValueError(
                "`residual` should return tensors of the shape (rows,) or (rows, outputs), with at least one row, but "
                f"returns {shapes}"
            )
        return tuple([part[:, None] if part.dim() == 1 else part for part in parts])

    def minimised(self, prior: Prior, centres: torch.Tensor, noise: Any, starts: int, iterations: int) -> _Found:
        first = self.residuals(prior.mean)
        if not all(part.isfinite().all() for part in first):
            raise ValueError("`residual` returns NaN or infinity at the mean of the family's tasks: look at `data`")
        sigma = _deviations(noise, first)
        losses = torch.func.vmap(lambda z: self.loss(z, prior, sigma))(centres)
        chosen = centres[losses.nan_to_num(torch.inf).argsort()[:starts]]
        ends, losses = self.descended(chosen, prior, sigma, iterations)
        code, loss = ends[losses.argmin()], losses.min()
        parts, J, H = self.linearised(code, prior, sigma)
        for _ in range(3 if noise is None else 0):
            sigma = tuple([_estimated(part, own, torch.linalg.inv(H)) for part, own in zip(parts, J, strict=True)])
            ends, losses = self.descended(code[None], prior, sigma, iterations)
            code, loss = ends[0], losses[0]
            parts, J, H = self.linearised(code, prior, sigma)
        return _Found(code, torch.linalg.inv(H), sigma, float(loss))

    def loss(self, unknown: torch.Tensor, prior: Prior, sigma: tuple[torch.Tensor, ...]) -> torch.Tensor:
        parts = self.residuals(unknown)
        squares = sum([(part / s).square().sum() for part, s in zip(parts, sigma, strict=True)])
        return (squares + prior.squared_distance(unknown)) / 2

    def linearised(
        self, unknown: torch.Tensor, prior: Prior, sigma: tuple[torch.Tensor, ...]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor]:
        """Residuals, their derivatives, shape (rows, outputs, k), and JᵀJ / σ² + Σ⁻¹, shape (k, k)."""

        def twice(z: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            parts = self.residuals(z)
            return parts, parts

        J, parts = torch.func.jacfwd(twice, has_aux=True)(unknown)
        H = prior.precision
        for own, s in zip(J, sigma, strict=True):
            scaled = (own / s[:, None]).flatten(0, 1)
            H = H + scaled.mT @ scaled
        return parts, J, H

    def descended(
        self, ends: torch.Tensor, prior: Prior, sigma: tuple[torch.Tensor, ...], iterations: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of damped Gauss–Newton steps from several starts, shape (starts, k), and their losses."""

        def step(z: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
            parts, J, H = self.linearised(z, prior, sigma)
            slope = prior.precision @ (z - prior.mean)
            for part, own, s in zip(parts, J, sigma, strict=True):
                slope = slope + torch.einsum("nok,no->k", own / s[:, None].square(), part)
            return z - torch.linalg.solve(H + damping * torch.diag(H.diagonal()), slope)

        loss_of = torch.func.vmap(lambda z: self.loss(z, prior, sigma))
        losses, damping = loss_of(ends), ends.new_zeros(len(ends))
        for _ in range(iterations):
            moved = torch.func.vmap(step)(ends, damping)
            lower = loss_of(moved)
            better = lower <= losses  # False for NaN
            gain = torch.where(better, losses - lower, 0)
            ends, losses = torch.where(better[:, None], moved, ends), torch.where(better, lower, losses)
            damping = torch.where(better, damping / 10, (10 * damping).clamp(min=1e-3))
            if ((better & (gain <= 1e-6 * losses)) | (damping > 1e6)).all():
                break
        return ends, losses


def _estimated(part: torch.Tensor, J: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """σ of each column, from residuals at the result and from what the posterior leaves open of them."""
    left_open = torch.einsum("nok,kl,nol->o", J, C, J)
    sigma = ((part.square().sum(0) + left_open) / len(part)).sqrt()
    return sigma.clamp(min=1e-12 + 1e-9 * float(sigma.max()))


def _deviations(noise: Any, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """σ of each column of residuals, from the argument; without one, the size of the residuals at the start."""
    if noise is None:
        return tuple([part.square().mean(0).sqrt().clamp(min=1e-12) for part in parts])
    several = isinstance(noise, Sequence) and len(parts) > 1
    given = list(noise) if several else [noise] * len(parts)
    if len(given) != len(parts):
        raise ValueError(f"`noise` has {len(given)} entries for {len(parts)} tensors of residuals")
    found = []
    for part, own in zip(parts, given, strict=True):
        sigma = torch.as_tensor(own, dtype=part.dtype, device=part.device)
        if sigma.dim() > 1 or sigma.numel() not in (1, part.shape[1]) or not ((sigma > 0) & sigma.isfinite()).all():
            raise ValueError(
                f"`noise` should be a positive number, or one for each of {part.shape[1]} outputs, but the value "
                f"passed is {own!r}"
            )
        found.append(sigma.expand(part.shape[1]).clone())
    return tuple(found)


def _prior(codes: torch.Tensor) -> tuple[Prior, torch.Tensor]:
    """The distribution of the tasks' codes, and where to start: their mean and the codes."""
    try:
        from sklearn.covariance import ledoit_wolf
    except ImportError as error:
        raise ImportError("`fit_task` of a family with codes needs scikit-learn: pip install scikit-learn") from error
    mean = codes.mean(0)
    covariance, _ = ledoit_wolf(codes.double().cpu().numpy())
    precision = torch.linalg.inv(torch.as_tensor(covariance)).to(codes)
    return Prior(mean, precision), torch.cat([mean[None], codes[:: max(1, len(codes) // 64)]])


def _uninformed(k: int, like: torch.Tensor) -> tuple[Prior, torch.Tensor]:
    """N(0, 1) of parameters that are scaled to [-1, 1], and where to start: the middle and places around it."""
    places = torch.quasirandom.SobolEngine(k).draw(15).to(like.device, like.dtype) * 2 - 1
    middle = torch.zeros(k).to(places)
    return Prior(middle, torch.eye(k).to(places)), torch.cat([middle[None], places])


def _check_found(found: _Found, prior: Prior, kind: Family) -> None:
    k = len(found.code)
    if torch.logdet(found.covariance @ prior.precision) > -1e-3 * k:
        warnings.warn(
            "the samples say nothing of the task: the residuals hardly depend on it, and the result is the mean of "
            "the family's tasks",
            stacklevel=3,
        )
    distance = float(prior.squared_distance(found.code))
    if kind.code and float(torch.special.gammaincc(torch.tensor(k / 2.0), torch.tensor(distance / 2))) < 1e-4:
        warnings.warn(
            f"the task is unlike those of the family: its code is {distance**0.5:.1f} standard deviations "
            "(Mahalanobis) from their mean. Look at the samples, or train an adapter of its own",
            stacklevel=3,
        )
