"""The least-squares problem of one task of a family: residuals, their derivatives, the minimum and its covariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from ..families.family import Family
from ..layers.codes import container_of_codes
from ..layers.lotra import LoTRALayer, adapted_tensors
from ..model import LoTRAModel, lotra_model
from ..placement.sharded import full_tensor
from ..registration import TASK

# residual(net, data) -> (rows,) or (rows, outputs), or a tuple of such tensors; net is the model at the task.
Residual = Callable[[Callable[..., torch.Tensor], Any], torch.Tensor | tuple[torch.Tensor, ...]]
Parts = tuple[torch.Tensor, ...]  # one for each tensor of residuals


class Prior(NamedTuple):
    """N(mean, covariance) of what is unknown of a task, with the inverse of the covariance."""

    mean: torch.Tensor  # shape: (P,)
    precision: torch.Tensor  # shape: (P, P)

    def squared_distance(self, unknown: torch.Tensor) -> torch.Tensor:
        """The squares of the Mahalanobis distances from the mean; `unknown`: (..., P)."""
        away = unknown - self.mean
        return torch.einsum("...k,kl,...l->...", away, self.precision, away)


class Found(NamedTuple):
    """A minimum, and the Laplace posterior around it."""

    unknown: torch.Tensor  # shape: (P,)
    covariance: torch.Tensor  # shape: (P, P)
    noise: Parts  # σ of each column of the residuals
    loss: float


class Linear(NamedTuple):
    """Residuals at S places, shape (S, rows, outputs), and their derivatives, shape (S, rows, outputs, P)."""

    parts: Parts
    J: Parts


class Problem:
    """The residuals of one task as a function of what is unknown of it.

    That is z: k numbers, the code or the scaled parameters; and, if the core moves as well, a number e for each of its
    entries: the core is G ×₅ c(z) + `spread` · s · e, where s is the size by which the cores of the layer's tasks
    differ: the root mean square, over the core's entries, of what G has besides its constant term.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Family,
        layers: Mapping[str, LoTRALayer],
        family: str,
        residual: Residual,
        data: Any,
        spread: float = 0.0,
    ) -> None:
        self.model, self.kind, self.residual, self.data, self.spread = model, kind, residual, data, spread
        self.rows: int | None = None  # the first rows of all residuals; None: all
        self.k = kind.code or len(kind.ranges)
        ours = {id(layer.lotra_core[family]): path for path, layer in layers.items()}
        named = {name: core for name, core in model.named_parameters() if id(core) in ours}
        self.cores = {name: core.detach() for name, core in named.items()}
        self.paths = {name: ours[id(core)] for name, core in named.items()}  # of the coefficient tensors

    @property
    def core_size(self) -> int:
        """How many numbers the cores at one task have."""
        return sum([core[..., 0].numel() for core in self.cores.values()])

    def parameters(self, z: torch.Tensor) -> dict[str, Any]:
        """The family's parameters, from their values scaled to [-1, 1]."""
        ends = self.kind.ranges.items()
        values = {name: a + (b - a) * (x + 1) / 2 for (name, (a, b)), x in zip(ends, z.unbind(), strict=True)}
        is_transformed = torch._C._functorch.is_functorch_wrapped_tensor(z)
        return values if is_transformed else {name: float(value) for name, value in values.items()}

    def core_moves(self, e: torch.Tensor) -> dict[str, torch.Tensor]:
        """`spread` · s · e in the shape of each core at one task."""
        moves, start = {}, 0
        for name, core in self.cores.items():
            shape = core.shape[:-1]
            s = core[..., 1:].square().sum(-1).mean().sqrt()
            moves[name] = (self.spread * s * e[start : start + shape.numel()]).reshape(shape)
            start += shape.numel()
        return moves

    def net_at(self, unknown: torch.Tensor, *inputs: Any, **others: Any) -> torch.Tensor:
        """The model's outputs at the task. `others` may have the parameters of a family with codes."""
        z, e = unknown[: self.k], unknown[self.k :]
        if self.kind.code:
            given = {name: others.pop(name) for name in self.kind.ranges if name in others}
            task = {**given, "code": z}
        else:
            task = self.parameters(z)
        if not len(e):
            return self.model(*inputs, **others, **{TASK: task})
        moves = self.core_moves(e)  # the first entry of c is the constant 1
        cores = {
            name: torch.cat([core[..., :1] + moves[name].unsqueeze(-1), core[..., 1:]], -1)
            for name, core in self.cores.items()
        }
        return functional_call(self.model, cores, inputs, {**others, TASK: task})

    def residuals(self, unknown: torch.Tensor) -> Parts:
        """Shape (rows, outputs) each."""

        def net(*inputs: Any, **others: Any) -> torch.Tensor:
            return self.net_at(unknown, *inputs, **others)

        z = unknown[: self.k]
        net.task = {"code": z} if self.kind.code else self.parameters(z)  # type: ignore[attr-defined]
        found = self.residual(net, self.data)
        parts = found if isinstance(found, tuple) else (found,)
        if not all(isinstance(part, torch.Tensor) and 0 < part.dim() < 3 and part.numel() for part in parts):
            shapes = [tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
            raise ValueError(
                "`residual` should return tensors of the shape (rows,) or (rows, outputs), with at least one row, but "
                f"returns {shapes}"
            )
        return tuple([(part[:, None] if part.dim() == 1 else part)[: self.rows] for part in parts])

    def linearised(self, places: torch.Tensor, function: Callable[[torch.Tensor], Parts] | None = None) -> Linear:
        """Residuals, or what another function returns, and their derivatives at places of the shape (S, P).

        A few unknown numbers take central differences, in one batched pass, which is cheaper than jacrev. Their error,
        eps^(2/3), is far below what a step or an interval needs.
        """
        function = self.residuals if function is None else function
        P = places.shape[1]
        if P > self.k:
            (place,) = places
            parts = function(place)
            derivatives = jacrev(function)(place)
            return Linear(tuple([part[None] for part in parts]), tuple([own[None] for own in derivatives]))
        h = torch.finfo(places.dtype).eps ** (1 / 3)
        steps = torch.cat([places.new_zeros(1, P), h * torch.eye(P).to(places), -h * torch.eye(P).to(places)])
        found = vmap(function)((places[:, None] + steps).flatten(0, 1))
        split = [part.unflatten(0, (len(places), 1 + 2 * P)).split([1, P, P], dim=1) for part in found]
        J = tuple([((up - down) / (2 * h)).movedim(1, -1) for _, up, down in split])
        return Linear(tuple([middle[:, 0] for middle, *_ in split]), J)

    def minimised(self, prior: Prior, centres: torch.Tensor, noise: Any, starts: int, iterations: int) -> Found:
        """The lowest minimum from some of the centres; where `noise` is None, with σ from the residuals there."""
        first = vmap(self.residuals)(centres)
        if not all(part[0].isfinite().all() for part in first):
            raise ValueError("`residual` returns NaN or infinity at the mean of the family's tasks: look at `data`")
        sigma = deviations(noise, tuple([part[0] for part in first]))
        losses = _losses(first, centres, prior, sigma).nan_to_num(torch.inf)
        unknown, at, loss = self.descended(centres[losses.argsort()[:starts]], prior, sigma, iterations)
        for _ in range(3 if noise is None else 0):
            C = torch.linalg.inv(_curvature(at, prior, sigma)[0])
            sigma = tuple([_estimated(part[0], own[0], C) for part, own in zip(*at, strict=True)])
            unknown, at, loss = self.descended(unknown[None], prior, sigma, iterations)
        return Found(unknown, torch.linalg.inv(_curvature(at, prior, sigma)[0]), sigma, float(loss))

    def descended(
        self, places: torch.Tensor, prior: Prior, sigma: Parts, iterations: int
    ) -> tuple[torch.Tensor, Linear, torch.Tensor]:
        """Damped Gauss–Newton steps from several places, shape (S, P): the best end, all there, and its loss.

        A place has arrived when its next step is below 1e-4 standard deviations of the posterior, or would gain less
        than the rounding of its loss.
        """
        rounding = 4 * torch.finfo(places.dtype).eps
        at = self.linearised(places)
        losses, damping = _losses(at.parts, places, prior, sigma), places.new_zeros(len(places))
        for _ in range(iterations):
            H = _curvature(at, prior, sigma)
            slope = (places - prior.mean) @ prior.precision
            for part, own, s in zip(*at, sigma, strict=True):
                slope = slope + torch.einsum("snok,sno->sk", own / s[:, None].square(), part)
            damped = H + damping[:, None, None] * torch.diag_embed(H.diagonal(dim1=1, dim2=2))
            step = torch.linalg.solve(damped, slope.unsqueeze(-1)).squeeze(-1)
            if ((slope * step).sum(1) <= (rounding * losses).nan_to_num(torch.inf).clamp(min=1e-8)).all():
                break
            moved = places - step
            there = self.linearised(moved)
            lower = _losses(there.parts, moved, prior, sigma)
            better = ~(lower > losses) & lower.isfinite()
            places, losses = torch.where(better[:, None], moved, places), torch.where(better, lower, losses)
            at = Linear(*[tuple(map(_where(better), new, old)) for new, old in zip(there, at, strict=True)])
            damping = torch.where(better, damping / 10, (10 * damping).clamp(min=1e-3))
        best = losses.nan_to_num(torch.inf).argmin()
        return places[best], Linear(*[tuple([x[best, None] for x in xs]) for xs in at]), losses[best]


def _where(better: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda new, old: torch.where(better.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _losses(parts: Parts, places: torch.Tensor, prior: Prior, sigma: Parts) -> torch.Tensor:
    """½ Σ (r / σ)² + ½ (u − μ)ᵀ Σ⁻¹ (u − μ), shape (S,)."""
    squares = sum([(part / s).square().sum((1, 2)) for part, s in zip(parts, sigma, strict=True)])
    return (squares + prior.squared_distance(places)) / 2


def _curvature(at: Linear, prior: Prior, sigma: Parts) -> torch.Tensor:
    """JᵀJ / σ² + Σ⁻¹, shape (S, P, P)."""
    H = prior.precision
    for own, s in zip(at.J, sigma, strict=True):
        scaled = (own / s[:, None]).flatten(1, 2)
        H = H + scaled.mT @ scaled
    return H


def _estimated(part: torch.Tensor, J: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """σ of each column, from residuals at the result and from what the posterior leaves open of them."""
    left_open = torch.einsum("nok,kl,nol->o", J, C, J)
    sigma = ((part.square().sum(0) + left_open) / len(part)).sqrt()
    return sigma.clamp(min=1e-12 + 1e-9 * float(sigma.max()))


def deviations(noise: Any, parts: Parts) -> Parts:
    """σ of each column of residuals, from the argument; without one, the size of the residuals at the start."""
    if noise is None:
        return tuple([part.square().mean(0).sqrt().clamp(min=1e-12) for part in parts])
    several = isinstance(noise, Sequence) and (len(parts) > 1 or isinstance(noise[0], torch.Tensor))
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


def prior_of(
    kind: Family, layers: Mapping[str, LoTRALayer], family: str, without: str | None = None
) -> tuple[Prior, torch.Tensor]:
    """The distribution of z among the family's tasks, but for one, and where to start: the mean and other places.

    Raises:
        ImportError: if the family has codes and scikit-learn is missing.
    """
    held = list(layers.values())
    if not kind.code:  # parameters that are scaled to [-1, 1]
        like, k = held[0].lotra_core[family], len(kind.ranges)
        places = torch.quasirandom.SobolEngine(k).draw(15).to(like.device, like.dtype) * 2 - 1
        middle = torch.zeros(k).to(places)
        return Prior(middle, torch.eye(k).to(places)), torch.cat([middle[None], places])
    try:
        from sklearn.covariance import ledoit_wolf
    except ImportError as error:
        raise ImportError("`fit_task` of a family with codes needs scikit-learn: pip install scikit-learn") from error
    codes = full_tensor(container_of_codes(held, family)[family]).detach()
    codes = codes[[row for row, task in enumerate(kind.tasks) if task != without]]
    mean = codes.mean(0)
    covariance, _ = ledoit_wolf(codes.double().cpu().numpy())
    precision = torch.linalg.inv(torch.as_tensor(covariance)).to(codes)
    return Prior(mean, precision), torch.cat([mean[None], codes[:: -(-len(codes) // 32)]])


def with_numbers(model: nn.Module, family: str) -> tuple[LoTRAModel, Family, dict[str, LoTRALayer]]:
    """The tuner, the family and its layers.

    Raises:
        ValueError: if the family has neither codes nor parameters.
    """
    tuner = lotra_model(model, family)
    kind = tuner.peft_config[family].kind
    if kind is None or (kind.tasks and not kind.code):
        raise ValueError(
            f"`family` {family!r} has neither parameters nor codes: make one with `LoTRAConfig(family=..., "
            "family_code=...)`"
        )
    return tuner, kind, adapted_tensors(tuner.model, family)
