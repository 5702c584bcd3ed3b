"""The least-squares problem of one task of a family: residuals, their derivatives, the minimum and its covariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from ..combination import container_of_codes
from ..families.family import Family
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
    expected: torch.Tensor  # E r² of each residual under the posterior, shape (N,)


class Problem:
    """The N residuals of one task as a function of what is unknown of it.

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
        self.shapes: list[torch.Size] = []  # (rows, outputs) of the tensors of residuals, once they are known
        self.k = kind.code or len(kind.ranges)
        ours = {id(layer.lotra_core[family]) for layer in layers.values()}
        self.cores = {name: core.detach() for name, core in model.named_parameters() if id(core) in ours}

    @property
    def core_sizes(self) -> list[int]:
        """How many numbers each core has at one task."""
        return [core[..., 0].numel() for core in self.cores.values()]

    def task(self, z: torch.Tensor) -> dict[str, Any]:
        """The code, or the family's parameters, from their values scaled to [-1, 1]."""
        if self.kind.code:
            return {"code": z}
        ends = self.kind.ranges.items()
        values = {name: a + (b - a) * (x + 1) / 2 for (name, (a, b)), x in zip(ends, z.unbind(), strict=True)}
        is_transformed = torch._C._functorch.is_functorch_wrapped_tensor(z)
        return values if is_transformed else {name: float(value) for name, value in values.items()}

    def core_moves(self, e: torch.Tensor) -> dict[str, torch.Tensor]:
        """`spread` · s · e in the shape of each core at one task."""
        parts = zip(self.cores.items(), e.split(self.core_sizes), strict=True)
        sizes = {name: core[..., 1:].square().sum(-1).mean().sqrt() for name, core in self.cores.items()}
        return {name: self.spread * sizes[name] * part.reshape(core.shape[:-1]) for (name, core), part in parts}

    def net_at(self, unknown: torch.Tensor, *inputs: Any, **others: Any) -> torch.Tensor:
        """The model's outputs at the task. `others` may have the parameters of a family with codes."""
        z, e = unknown[: self.k], unknown[self.k :]
        task = self.task(z) | {
            name: others.pop(name) for name in self.kind.ranges if self.kind.code and name in others
        }
        if not len(e):
            return self.model(*inputs, **others, **{TASK: task})
        moves = self.core_moves(e)  # the first entry of c is the constant 1
        cores = {
            name: torch.cat([core[..., :1] + moves[name].unsqueeze(-1), core[..., 1:]], -1)
            for name, core in self.cores.items()
        }
        return functional_call(self.model, cores, inputs, {**others, TASK: task})

    def residuals(self, unknown: torch.Tensor) -> torch.Tensor:
        """All residuals side by side, shape (N,)."""

        def net(*inputs: Any, **others: Any) -> torch.Tensor:
            return self.net_at(unknown, *inputs, **others)

        net.task = self.task(unknown[: self.k])  # type: ignore[attr-defined]
        found = self.residual(net, self.data)
        parts = found if isinstance(found, tuple) else (found,)
        if not all(isinstance(part, torch.Tensor) and 0 < part.dim() < 3 and part.numel() for part in parts):
            shapes = [getattr(part, "shape", part) for part in parts]
            raise ValueError(
                f"`residual` should return tensors (rows,) or (rows, outputs), with at least one row, not {shapes}"
            )
        parts = tuple([(part[:, None] if part.dim() == 1 else part)[: self.rows] for part in parts])
        self.shapes = [part.shape for part in parts]
        return torch.cat([part.flatten() for part in parts])

    def parts(self, flat: torch.Tensor) -> Parts:
        """What there is for each residual, (N,), in tensors of the shapes (rows, outputs)."""
        split = flat.split([shape.numel() for shape in self.shapes])
        return tuple([part.reshape(shape) for part, shape in zip(split, self.shapes, strict=True)])

    def flat(self, noise: Parts) -> torch.Tensor:
        """σ of each residual, shape (N,), from that of each column."""
        return torch.cat([s.expand(shape).flatten() for s, shape in zip(noise, self.shapes, strict=True)])

    def linearised(
        self, places: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals, or what another function returns, and derivatives, at S places, (S, P): (S, ...), (S, ..., P).

        A few unknown numbers take central differences, in one batched pass, which is cheaper than jacrev. Their error,
        eps^(2/3), is far below what a step or an interval needs.
        """
        function = self.residuals if function is None else function
        P = places.shape[1]
        if P > self.k:
            (place,) = places
            return function(place)[None], jacrev(function)(place)[None]
        h = torch.finfo(places.dtype).eps ** (1 / 3)
        steps = torch.cat([places.new_zeros(1, P), h * torch.eye(P).to(places), -h * torch.eye(P).to(places)])
        found = vmap(function)((places[:, None] + steps).flatten(0, 1))
        middle, up, down = found.unflatten(0, (len(places), 1 + 2 * P)).split([1, P, P], dim=1)
        return middle[:, 0], ((up - down) / (2 * h)).movedim(1, -1)

    def minimised(self, prior: Prior, centres: torch.Tensor, noise: Any, starts: int, iterations: int) -> Found:
        """The lowest minimum from some of the centres; where `noise` is None, with σ from the residuals there."""
        first = vmap(self.residuals)(centres)
        if not first[0].isfinite().all():
            raise ValueError("`residual` returns NaN or infinity at the mean of the family's tasks: look at `data`")
        sigma = self._estimated(first[0].square()) if noise is None else self._given(noise, first)
        losses = _losses(first / self.flat(sigma), centres, prior).nan_to_num(torch.inf)
        found = self._descended(centres[losses.argsort()[:starts]], prior, sigma, iterations)
        for _ in range(3 if noise is None else 0):
            sigma = self._estimated(found.expected)
            found = self._descended(found.unknown[None], prior, sigma, iterations)
        return found

    def _descended(self, places: torch.Tensor, prior: Prior, noise: Parts, iterations: int) -> Found:
        """The best end of damped Gauss–Newton steps from several places, shape (S, P).

        A place has arrived when its next step is below 1e-4 standard deviations of the posterior, or would gain less
        than the rounding of its loss.
        """
        sigma, rounding = self.flat(noise), 4 * torch.finfo(places.dtype).eps

        def at(places: torch.Tensor) -> Parts:
            r, J = self.linearised(places)
            return places, _losses(r / sigma, places, prior), r / sigma, J / sigma[:, None]

        here, damping = at(places), places.new_zeros(len(places))
        for _ in range(iterations):
            places, losses, r, J = here
            H = prior.precision + J.mT @ J
            slope = (places - prior.mean) @ prior.precision + torch.einsum("snk,sn->sk", J, r)
            damped = H + damping[:, None, None] * torch.diag_embed(H.diagonal(dim1=1, dim2=2))
            step = torch.linalg.solve(damped, slope.unsqueeze(-1)).squeeze(-1)
            if ((slope * step).sum(1) <= (rounding * losses).nan_to_num(torch.inf).clamp(min=1e-8)).all():
                break
            there = at(places - step)
            better = ~(there[1] > losses) & there[1].isfinite()
            wide = [better.reshape(-1, *[1] * (new.dim() - 1)) for new in there]
            here = tuple(map(torch.where, wide, there, here))
            damping = torch.where(better, damping / 10, (10 * damping).clamp(min=1e-3))
        unknown, loss, r, J = (part[here[1].nan_to_num(torch.inf).argmin()] for part in here)
        C = torch.linalg.inv(prior.precision + J.mT @ J)
        expected = (r.square() + torch.einsum("nk,kl,nl->n", J, C, J)) * sigma.square()
        return Found(unknown, C, noise, float(loss), expected)

    def _estimated(self, expected: torch.Tensor) -> Parts:
        """σ of each column from E r²."""
        found = [part.mean(0).sqrt() for part in self.parts(expected)]
        return tuple([sigma.clamp(min=1e-12 + 1e-9 * float(sigma.max())) for sigma in found])

    def _given(self, noise: Any, like: torch.Tensor) -> Parts:
        """σ of each column from the argument `noise`."""
        several = isinstance(noise, Sequence) and (len(self.shapes) > 1 or isinstance(noise[0], torch.Tensor))
        given = list(noise) if several else [noise] * len(self.shapes)
        if len(given) != len(self.shapes):
            raise ValueError(f"`noise` has {len(given)} entries for {len(self.shapes)} tensors of residuals")
        found = []
        for (_, width), own in zip(self.shapes, given, strict=True):
            sigma = torch.as_tensor(own, dtype=like.dtype, device=like.device)
            if sigma.dim() > 1 or sigma.numel() not in (1, width) or not ((sigma > 0) & sigma.isfinite()).all():
                raise ValueError(
                    f"`noise` should be a positive number, or one for each of {width} outputs, not {own!r}"
                )
            found.append(sigma.expand(width).clone())
        return tuple(found)


def _losses(weighted: torch.Tensor, places: torch.Tensor, prior: Prior) -> torch.Tensor:
    """½ Σ (r / σ)² + ½ (u − μ)ᵀ Σ⁻¹ (u − μ), shape (S,)."""
    return (weighted.square().sum(1) + prior.squared_distance(places)) / 2


def prior_of(
    kind: Family, layers: Mapping[str, LoTRALayer], family: str, without: str | None = None, given: Any = None
) -> tuple[Prior, torch.Tensor]:
    """The distribution of z among the family's tasks, but for one, and where to start: the mean and other places.

    `given`, a mean and a covariance, takes the place of the distribution.
    """
    held = list(layers.values())
    if kind.code:
        codes = full_tensor(container_of_codes(held, family)[family]).detach()
        codes = codes[[row for row, task in enumerate(kind.tasks) if task != without]]
        places = codes[:: -(-len(codes) // 32)]
    else:  # parameters that are scaled to [-1, 1]
        like = held[0].lotra_core[family]
        places = torch.quasirandom.SobolEngine(len(kind.ranges)).draw(15).to(like.device, like.dtype) * 2 - 1
    k = places.shape[1]
    if given is not None:
        shapes = [tuple(part.shape) for part in given if isinstance(part, torch.Tensor)]
        if shapes != [(k,), (k, k)] or torch.linalg.cholesky_ex(given[1]).info:
            raise ValueError(f"`prior` should be a mean of the shape {(k,)} and its covariance but is {given!r}")
        mean, covariance = given
    elif kind.code:
        try:
            from sklearn.covariance import ledoit_wolf
        except ImportError as error:
            raise ImportError(
                "`fit_task` of a family with codes needs scikit-learn: pip install scikit-learn"
            ) from error
        mean, covariance = codes.mean(0), torch.as_tensor(ledoit_wolf(codes.double().cpu().numpy())[0])
    else:
        mean, covariance = torch.zeros(k), torch.eye(k)
    mean, precision = mean.to(places), torch.linalg.inv(covariance.double()).to(places)
    return Prior(mean, precision), torch.cat([mean[None], places])


def with_numbers(model: nn.Module, family: str) -> tuple[LoTRAModel, Family, dict[str, LoTRALayer]]:
    """The tuner, the family and its layers; ValueError if the family has neither codes nor parameters."""
    tuner = lotra_model(model, family)
    kind = tuner.peft_config[family].kind
    if kind is None or (kind.tasks and not kind.code):
        raise ValueError(f"`family` {family!r} has neither parameters nor codes (`LoTRAConfig(family_code=...)`)")
    return tuner, kind, adapted_tensors(tuner.model, family)
