"""Second-order fitting: Levenberg–Marquardt on the trainable parameters of a model, an adapter's few above all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_map
from tqdm import tqdm

from ..placement.sharded import check_not_sharded
from ..preserved import check_model
from .damped_system import linear_system

_Residual = Callable[[Callable[..., Any], Any], torch.Tensor]

# Numbers that a chunk of per-sample gradients may hold, where `chunk_size` is not given: 64 MiB in fp32.
_CHUNK_NUMBERS = 2**24
# Bounds of the damping: with more the step is nothing, with less the fp64 factorisation fails.
_LEAST_DAMPING, _MOST_DAMPING = 1e-14, 1e10


@dataclass(frozen=True)
class GaussNewtonResult:
    """What a fit did, in plain values: it survives JSON, and `resume_from=` goes on from it.

    Attributes:
        losses: the loss at the start, and after every iteration on the points of that iteration; none if the fit was
            interrupted before the first was known.
        damping: λ for the next iteration.
        iterations: the number of iterations done, resumed ones included.
        reason: why the fit ended: "iterations", "gradient", "loss", "damping" (no step reduces the loss any more),
            "seconds", "callback" or "interrupted"; "running" in a callback.
    """

    losses: tuple[float, ...]
    damping: float
    iterations: int
    reason: str


def fit_gauss_newton(
    model: nn.Module,
    residual_fn: _Residual | Mapping[str, _Residual],
    data: Any,
    *,
    iterations: int = 100,
    damping: float = 0.1,
    damping_increase: float = 5.0,
    damping_decrease: float = 4.0,
    gradient_tolerance: float = 1e-8,
    loss_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    chunk_size: int | None = None,
    progressbar: bool = True,
    callback: Callable[[GaussNewtonResult], Any] | None = None,
    resume_from: GaussNewtonResult | None = None,
) -> GaussNewtonResult:
    """θ ← θ + δ with (JᵀJ + λD) δ = −Jᵀr, for the loss Σ_kinds mean over samples of ‖residual‖².

    θ are the P parameters of the model that require gradients: those of the trainable adapter, or of a plain KAN. r
    holds the R residuals, J = ∂r/∂θ, and D = diag(JᵀJ) + 10⁻³ · (its mean) · I. If R < P the same δ is computed as
    −D⁻¹Jᵀ(JD⁻¹Jᵀ + λI)⁻¹r. Sums of squares and the solution are in fp64 whatever the dtype of the model. λ falls after
    a step that gains at least a quarter of what was predicted, and grows until the loss falls. In directions in which
    the Tucker form is redundant J is zero, and λ keeps θ where it is.

    ```python
    def residual(net, x):  # u'' + f at points x, shape (N, 1)
        slope = torch.func.grad(lambda x: net(x).sum())
        return torch.func.grad(lambda x: slope(x).sum())(x) + f(x)


    fit_gauss_newton(model, residual, points)
    fit_gauss_newton(model, lambda net, batch: net(batch[0]) - batch[1], (x, y))  # regression
    ```

    Args:
        model: everything that does not require gradients stays as it is, `.grad` too. Dropout must be off.
        residual_fn: `residual_fn(net, batch)` gives the residuals of a batch, shape (N,) or (N, k), each sample's from
            this sample alone. `net` is called like the model; derivatives of it are taken with `torch.func`, not with
            `torch.autograd.grad`. Several kinds of residuals, of the equation and of the boundary say: a mapping from
            names to such functions. A kind of weight w is multiplied by √w.
        data: what `residual_fn` takes as batch: a tensor, or tensors in tuples and dicts, all of N rows. A mapping
            from the same names if `residual_fn` is one. Or a function from the number of the iteration to such data:
            fresh points in every iteration keep a fit from learning its points by heart.
        iterations: at most so many, resumed ones included.
        damping: λ of the first iteration.
        damping_increase: factor on λ after a step that did not reduce the loss.
        damping_decrease: divisor of λ after a good step.
        gradient_tolerance: stop when no column of J makes a cosine above this with r.
        loss_tolerance: stop when an iteration reduces the loss by less than this part of it.
        max_seconds: stop after the iteration in which these are over.
        chunk_size: samples whose gradients are in memory at a time; by default as many as fit into 2²⁴ numbers.
        callback: called with the result so far after every iteration, when the model holds the new parameters; a true
            answer ends the fit.
        resume_from: the result of an earlier call that this one continues, on the model as that call left it and with
            the same arguments: bit for bit as if it had not ended.

    Returns:
        Losses, damping, number of iterations, and why it ended. Ctrl-C ends it too (`reason="interrupted"`). The
        model holds the parameters of the last step that reduced the loss, also after an exception.

    Raises:
        ValueError, TypeError: naming the argument, the value and the way out; the first iteration checks before it
            changes anything.
    """
    _check_numbers(
        iterations=(iterations, 1), damping=(damping, 0), damping_increase=(damping_increase, 1),
        damping_decrease=(damping_decrease, 1), gradient_tolerance=(gradient_tolerance, 0),
        loss_tolerance=(loss_tolerance, 0), max_seconds=(max_seconds, 0), chunk_size=(chunk_size, 1),
    )  # fmt: skip
    if callback is not None:
        _check_callback(callback)
    problem = _Problem(model, residual_fn, chunk_size)
    if not isinstance(resume_from, GaussNewtonResult | None):
        raise TypeError(f"`resume_from` should be a GaussNewtonResult but the value passed is {resume_from!r}")
    result = resume_from or GaussNewtonResult((), damping, 0, "running")
    first, theta, residuals, reason = result.iterations, problem.parameters(), None, "iterations"
    began = time.perf_counter()
    progress = tqdm(total=iterations, initial=first, disable=not progressbar, unit="iteration", dynamic_ncols=True)
    try:
        for iteration in range(first, iterations):
            batch, damping = data(iteration) if callable(data) else data, result.damping
            if residuals is None or callable(data):
                residuals = problem.checked_residuals(theta, batch, first=iteration == first)
            before = residuals.square().sum().item()
            result = replace(result, losses=result.losses or (before,))
            system = linear_system(problem.jacobian(theta, batch), residuals, len(theta))
            if not math.isfinite(system.scale):
                raise ValueError(f"`residual_fn` has derivatives that are not finite, in iteration {iteration}")
            if iteration == first and not system.scale:
                raise ValueError(
                    "`residual_fn` does not depend on the trainable parameters of `model`: every derivative is zero; "
                    "does it call `net`, and is the trainable adapter active, enabled and not merged?"
                )
            if system.cosine <= gradient_tolerance:
                reason = "gradient"
                break
            while damping <= _MOST_DAMPING:
                step = system.step(damping)
                candidate = theta + step.to(theta)
                residuals = problem.residuals(candidate, batch)
                gain = before - residuals.square().sum().item()
                if gain > 0:  # false for NaN
                    break
                damping = max(damping, _LEAST_DAMPING) * damping_increase
            else:
                reason = "damping"
                break
            if gain > system.predicted_gain(step, damping) / 4:
                damping = max(damping / damping_decrease, _LEAST_DAMPING)
            losses = (*result.losses, before - gain)
            # In one statement: an interrupt finds both old or both new.
            theta, result = candidate, GaussNewtonResult(losses, damping, iteration + 1, "running")
            problem.write(theta)
            progress.update()
            progress.set_postfix_str(f"loss {losses[-1]:.2e}, damping {damping:.0e}", refresh=False)
            if callback is not None and callback(result):
                reason = "callback"
                break
            if gain <= loss_tolerance * before:
                reason = "loss"
                break
            if max_seconds is not None and time.perf_counter() - began >= max_seconds:
                reason = "seconds"
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        problem.write(theta)  # whatever came while the tensors were being written
        progress.close()
    return replace(result, reason=reason)


class _Problem:
    """r(θ) and J(θ) of a model, residual functions and data; rows are divided by √N so that ‖r‖² is the loss."""

    def __init__(self, model: nn.Module, residual_fn: Any, chunk_size: int | None) -> None:
        check_model(model=model)
        check_not_sharded(
            model, "`model`", "fit it before it is sharded, or save the adapter and fit it in one process"
        )
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                "`model` has no trainable parameters: call `set_adapter` on a PEFT model, load with "
                "`is_trainable=True`, or set `requires_grad` of what is to be fitted"
            )
        self.residual_fns = residual_fn if isinstance(residual_fn, Mapping) else {"": residual_fn}
        if not self.residual_fns or not all(map(callable, self.residual_fns.values())):
            raise TypeError(
                f"`residual_fn` should be a function of (net, batch), or a mapping from names to such functions, but "
                f"the value passed is {residual_fn!r}"
            )
        self.several = isinstance(residual_fn, Mapping)
        # A sample has its own gradient of whatever the trained parameters are made into: a dense update, say.
        numbers = sum(p.numel() for p in model.parameters())
        self.chunk_size = lambda count: chunk_size or max(1, _CHUNK_NUMBERS // numbers // count)

    def parameters(self) -> torch.Tensor:
        """θ, in the widest dtype of its parts."""
        return torch.cat([p.detach().flatten() for p in self.trained.values()])

    def write(self, theta: torch.Tensor) -> None:
        with torch.no_grad():
            for name, value in self._named(theta).items():
                self.trained[name].copy_(value)

    def _named(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = theta.split([p.numel() for p in self.trained.values()])
        return {name: part.view_as(p).to(p) for (name, p), part in zip(self.trained.items(), parts, strict=True)}

    def _net(self, parameters: dict[str, torch.Tensor]) -> Callable[..., Any]:
        return lambda *args, **kwargs: functional_call(self.model, parameters, args, kwargs)

    def _kinds(self, batch: Any) -> Iterator[tuple[str, _Residual, Any, int]]:
        """(name, residual function, its batch, N) of every kind."""
        if self.several and not (isinstance(batch, Mapping) and set(batch) == set(self.residual_fns)):
            raise ValueError(
                f"`data` should be a mapping with the keys of `residual_fn`, {sorted(self.residual_fns)}, but it is "
                f"{sorted(batch) if isinstance(batch, Mapping) else type(batch)}"
            )
        for name, function in self.residual_fns.items():
            part = batch[name] if self.several else batch
            leaves = tree_flatten(part)[0]
            shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            if not all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
                raise TypeError(f"`data{_at(name)}` should be made of tensors with a batch axis, but it has {shapes}")
            rows = {len(leaf) for leaf in leaves}
            if len(rows) != 1 or rows == {0}:
                raise ValueError(
                    f"`data{_at(name)}` should have one number of rows, above zero, but its shapes are {shapes}"
                )
            yield name, function, part, rows.pop()

    @torch.no_grad()
    def residuals(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        """r, in fp64. shape: (R,)"""
        net, rows = self._net(self._named(theta)), []
        for name, function, part, size in self._kinds(batch):
            leaves, spec = tree_flatten(part)
            chunks = zip(*(leaf.split(self.chunk_size(1)) for leaf in leaves), strict=True)
            values = torch.cat([_checked_shape(function(net, spec.unflatten(chunk)), chunk, name) for chunk in chunks])
            rows.append(values.double().flatten() / math.sqrt(size))
        return torch.cat(rows)

    def checked_residuals(self, theta: torch.Tensor, batch: Any, first: bool) -> torch.Tensor:
        """`residuals`, which must be finite; at `first`, also those of single samples, which must be the same."""
        try:
            values = self.residuals(theta, batch)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError("`residual_fn` should take derivatives of `net` by `torch.func`") from error
        if not values.isfinite().all():
            raise ValueError(
                f"`residual_fn` should give finite residuals, but {(~values.isfinite()).sum().item()} of "
                f"{len(values)} are not, with the parameters that `model` has now"
            )
        if first:
            # Elsewhere: the residuals of a fitted model may be rounding errors, which differ.
            net = self._net(self._named(1.1 * theta))
            for name, function, part, _ in self._kinds(batch):
                leaves, spec = tree_flatten(tree_map(lambda leaf: leaf[:4], part))
                with torch.no_grad():
                    together = function(net, spec.unflatten(leaves))
                    rows = zip(*(leaf.split(1) for leaf in leaves), strict=True)
                    alone = torch.cat([function(net, spec.unflatten(row)) for row in rows])
                if not torch.allclose(together, alone, rtol=1e-2, atol=1e-2 * together.abs().max().item()):
                    raise ValueError(
                        f"`residual_fn{_at(name)}` should compute the residuals of a sample from this sample alone, "
                        f"but those of the first ones are {alone.flatten().tolist()}, and "
                        f"{together.flatten().tolist()} together: a batch mean? dropout?"
                    )
        return values

    def _of_sample(self, function: _Residual, parameters: dict[str, torch.Tensor], sample: Any) -> torch.Tensor:
        return function(self._net(parameters), tree_map(lambda leaf: leaf.unsqueeze(0), sample)).flatten()

    def jacobian(self, theta: torch.Tensor, batch: Any) -> Iterator[torch.Tensor]:
        """Blocks of rows of J, in the order of `residuals`, in the dtype of θ. shape: (rows, P)"""
        parameters = self._named(theta)
        for _, function, part, size in self._kinds(batch):
            leaves, spec = tree_flatten(part)
            of_sample = partial(self._of_sample, function)
            with torch.no_grad():
                count = of_sample(parameters, spec.unflatten([leaf[0] for leaf in leaves])).numel()
            # One residual is the common case, and a gradient is cheaper than a Jacobian of one row.
            rows_of = grad(lambda *args, f=of_sample: f(*args).sum()) if count == 1 else jacrev(of_sample)
            for chunk in zip(*(leaf.split(self.chunk_size(count)) for leaf in leaves), strict=True):
                rows = vmap(rows_of, in_dims=(None, 0))(parameters, spec.unflatten(chunk))
                columns = [rows[key].reshape(len(chunk[0]) * count, -1) for key in parameters]
                yield torch.cat(columns, dim=1) / math.sqrt(size)


def _checked_shape(values: Any, chunk: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        got = f"one of {values.dtype}" if isinstance(values, torch.Tensor) else f"a {type(values).__qualname__}"
        raise TypeError(
            f"`residual_fn{_at(name)}` should give a tensor of real floating-point numbers, made by torch from what "
            f"`net` returns, but it gave {got}"
        )
    rows = len(chunk[0])
    if values.ndim not in (1, 2) or len(values) != rows or not values.numel():
        raise ValueError(
            f"`residual_fn{_at(name)}` should give the residuals of every sample, shape ({rows},) or ({rows}, k) for "
            f"a batch of {rows}, not their mean or sum, but it gave {tuple(values.shape)}"
        )
    return values


def _at(name: str) -> str:
    return f"[{name!r}]" if name else ""


def _check_callback(callback: Any) -> None:
    try:
        signature(callback).bind("result")
    except TypeError:
        raise TypeError(
            f"`callback` should be a function of one GaussNewtonResult but the value passed is {callback!r}"
        ) from None
    except ValueError:
        pass  # it does not tell what it takes, as some builtins


def _check_numbers(**arguments: tuple[Any, float]) -> None:
    for name, (value, bound) in arguments.items():
        whole = name in ("iterations", "chunk_size")
        above = not whole and not name.endswith("tolerance")
        if value is None and name in ("max_seconds", "chunk_size"):
            continue
        good = isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < bound or (above and value == bound):
            kind, relation = "whole" if whole else "finite", "above" if above else "of at least"
            raise ValueError(
                f"`{name}` should be a {kind} number {relation} {bound} but the value passed is {value!r}"
            )
