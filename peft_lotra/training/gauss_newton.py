"""Second-order fitting: Gauss–Newton with Levenberg–Marquardt damping, on an adapter's few numbers above all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .answers import Function, Loss
from .checks import check_numbers
from .iteration import DampingRule, iterate, total_loss
from .problem import Problem
from .validation import Validation


@dataclass(frozen=True)
class GaussNewtonResult:
    """What a fit did, in plain values: it survives JSON, and `resume_from=` goes on from it.

    Attributes:
        losses: the loss at the start, and after every iteration on the points of that iteration; none if the fit was
            interrupted before the first was known.
        damping: λ for the next iteration.
        iterations: the number of iterations done, resumed ones included.
        reason: why the fit ended: "iterations", "gradient", "loss", "damping" (no step reduces the loss any more),
            "seconds", "callback", "validation" or "interrupted"; "running" in a callback.
        validation_losses: what is validated, at the start and after every iteration.
        parameters: values of θ that going on needs and the model does not hold: "start" with `weight_decay`, "last"
            and "best" with validation.
    """

    losses: tuple[float, ...]
    damping: float
    iterations: int
    reason: str
    validation_losses: tuple[float, ...] = ()
    parameters: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def fit_gauss_newton(
    model: nn.Module,
    residual_fn: Function | Mapping[str, Function],
    data: Any,
    *,
    loss: Loss | Mapping[str, Loss] = "least_squares",
    weight_decay: float = 0.0,
    iterations: int = 100,
    damping: float = 0.1,
    damping_increase: float = 5.0,
    damping_decrease: float = 4.0,
    gradient_tolerance: float = 1e-8,
    loss_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    validation: Any = None,
    validation_metric: Callable[[nn.Module], Any] | None = None,
    patience: int | None = None,
    max_memory: int = 2**32,
    across_processes: bool | None = None,
    progressbar: bool = True,
    callback: Callable[[GaussNewtonResult], Any] | None = None,
    resume_from: GaussNewtonResult | None = None,
) -> GaussNewtonResult:
    """θ ← θ + δ with (JᵀJ + λD) δ = −Jᵀr, for the loss Σ_kinds mean over samples of ‖residual‖².

    This is Gauss–Newton with Levenberg–Marquardt damping. θ are the P parameters of the model that require gradients:
    those of the trainable adapter, or of a plain KAN. r holds the R residuals, J = ∂r/∂θ, and D = diag(JᵀJ) + 10⁻³ ·
    (its mean) · I. If R < P the same δ is computed as −D⁻¹Jᵀ(JD⁻¹Jᵀ + λI)⁻¹r. Sums of squares and the solution are in
    fp64 whatever the dtype of the model. λ falls after a step that gains at least a quarter of what was predicted, and
    grows until the loss falls. In directions in which the Tucker form is redundant J is zero, and λ keeps θ where it
    is.

    Under another `loss`, a mean of ℓ(o_n, y_n) with outputs o_n, the step is the generalised Gauss–Newton step

        (Σ J_nᵀ H_n J_n + λD) δ = −Σ J_nᵀ g_n,   J_n = ∂o_n/∂θ,   H_n = ∂²ℓ/∂o_n²,   g_n = ∂ℓ/∂o_n.

    With `weight_decay` c, c‖θ − θ₀‖² is added to the loss, where θ₀ is θ at the start.

    ```python
    def residual(net, x):  # u'' + f at points x, shape (N, 1)
        slope = torch.func.grad(lambda x: net(x).sum())
        return torch.func.grad(lambda x: slope(x).sum())(x) + f(x)


    fit_gauss_newton(model, residual, points)
    fit_gauss_newton(model, lambda net, batch: net(batch[0]) - batch[1], (x, y))  # regression
    fit_gauss_newton(model, lambda net, batch: (net(batch[0]), batch[1]), (x, labels), loss="cross_entropy")
    ```

    Args:
        model: everything that does not require gradients stays as it is, `.grad` too. Dropout must be off.
        residual_fn: `residual_fn(net, batch)` gives the residuals of a batch, shape (N,) or (N, k), each sample's from
            this sample alone. `net` is called like the model; derivatives of it are taken with `torch.func`, not with
            `torch.autograd.grad`. Several kinds of residuals, of the equation and of the boundary say: a mapping from
            names to such functions. A weight w, of a kind or of a sample, is multiplied by √w.
            With a `loss` other than "least_squares" it gives (outputs, targets), or (outputs, targets, weights) with
            a weight of at least 0 for each sample, shape (N,): the loss is Σ_n w_n ℓ_n / M, for M samples.
        data: what `residual_fn` takes as batch: a tensor, or tensors in tuples and dicts, all of N rows. A mapping
            from the same names if `residual_fn` is one. Or a function from the number of the iteration to such data:
            fresh points in every iteration keep a fit from learning its points by heart. A step fits the points of its
            iteration by heart all the same if they give fewer residuals than twice the trained numbers. That is cheap
            and enough at first. Give the last fifth of the iterations four times as many points.
        loss: of all kinds, or a mapping from the same names:

            | loss | ℓ(o, y) | outputs | targets |
            |---|---|---|---|
            | "least_squares" | ‖r‖² | (residuals) | |
            | "cross_entropy" | −Σ_c y_c log softmax(o)_c | (N, C) or (N, T, C) | labels (N,) or (N, T), or y like o |
            | "poisson" | Σ exp(o) − y·o | (N, ...) | like o |
            | "bernoulli" | Σ log(1 + exp(o)) − y·o | (N, ...) | like o |

            Sums are over the outputs of a sample, means over samples; the mean of cross_entropy is over all labels
            but those of −100, as torch's is. Or an object of the form of `OutputLoss`, solved in normal equations.
        weight_decay: c of the prior, in units of the loss.
        iterations: at most so many, resumed ones included.
        damping: λ of the first iteration.
        damping_increase: factor on λ after a step that did not reduce the loss.
        damping_decrease: divisor of λ after a good step.
        gradient_tolerance: stop when no column of J makes a cosine above this with r; in general, when no parameter
            alone promises to gain more than the square of this, relative to the loss.
        loss_tolerance: stop when an iteration reduces the loss by less than this part of it.
        max_seconds: stop after the iteration in which these are over.
        validation: data of the same form, not a function. The loss on them, without the prior, is measured at the
            start and after every iteration, and the model ends with the parameters of its least value.
        validation_metric: a function of the model to be measured in place of that loss; less is better.
        patience: stop after so many iterations without a new least value; None keeps the best and goes on.
        max_memory: bytes of tensors that the fit may hold besides the model and the data, 4 GiB by default. A block of
            rows of J takes at most a quarter of it. Where neither 8P² bytes have room nor, with R < P, J and 8R², the
            equation is solved by conjugate gradients: to about 10⁻³ of the step in the norm of its matrix, in many
            more passes of the data.
        across_processes: for torch.distributed and accelerate, where it must be given. True makes one fit of all
            processes: `data` is the part of each (parts may differ in size), means are over all samples, and all end
            with the same parameters; one process may be all. With False this process fits by itself.
        callback: called with the result so far after every iteration, when the model holds the new parameters; a true
            answer ends the fit.
        resume_from: the result of an earlier call that this one continues, on the model as that call left it and with
            the same arguments: bit for bit as if it had not ended. It holds θ₀ and the parameters of the last
            iteration where they are needed.

    Returns:
        Losses, damping, number of iterations, and why it ended. Ctrl-C ends it too (`reason="interrupted"`). The
        model holds the parameters of the last step that reduced the loss, or of the best validation, also after an
        exception.

    Raises:
        ValueError, TypeError: naming the argument, the value and the way out; the first iteration checks before it
            changes anything.

    Warns:
        UserWarning: if fixed data have less than 2 residuals (or labels) for each trained number, and neither
            validation nor `weight_decay` is there.

    Source: ours; generalised Gauss–Newton is Schraudolph's (2002), the damping is Levenberg's and Marquardt's.
    """
    check_numbers(
        iterations=(iterations, 1), damping=(damping, 0), damping_increase=(damping_increase, 1),
        damping_decrease=(damping_decrease, 1), gradient_tolerance=(gradient_tolerance, 0),
        loss_tolerance=(loss_tolerance, 0), weight_decay=(weight_decay, 0), max_seconds=(max_seconds, 0),
        patience=(patience, 1), max_memory=(max_memory, 1),
    )  # fmt: skip
    if callback is not None:
        _check_callable("callback", callback, "one GaussNewtonResult")
    if validation_metric is not None:
        _check_callable("validation_metric", validation_metric, "one model")
    checking = Validation(validation, validation_metric, patience)
    problem = Problem(model, residual_fn, loss, max_memory, across_processes)
    processes = problem.processes
    theta = problem.parameters()
    result = _started(resume_from, damping, theta, weight_decay=bool(weight_decay), validates=checking.given)
    start, theta, best = (_restored(result, name, theta) for name in ("start", "last", "best"))
    first, evaluation, reason = result.iterations, None, "iterations"
    rule = DampingRule(damping_increase, damping_decrease, gradient_tolerance, weight_decay)

    began = time.perf_counter()
    shown = progressbar and processes.is_first
    progress = tqdm(total=iterations, initial=first, disable=not shown, unit="iteration", dynamic_ncols=True)
    processes.keep_interrupts()
    try:
        for iteration in range(first, iterations):
            batch = processes.agreed(data, iteration) if callable(data) else data
            if evaluation is None or callable(data):
                evaluation = problem.checked(theta, batch, first=iteration == first)
            before = total_loss(evaluation, theta, start, weight_decay)
            result = replace(result, losses=result.losses or (before,))
            if not result.validation_losses:
                result = replace(result, validation_losses=checking.at_start(problem, theta))
            done = iterate(problem, theta, batch, evaluation, result.damping, rule, start, first=iteration == first)
            if iteration == first and not (callable(data) or checking.given or weight_decay):
                _warn_of_few(evaluation.fitted, len(theta))
            if done.reason is not None:
                reason = done.reason
                break
            losses = (*result.losses, done.loss)
            measured = (*result.validation_losses, *checking.measured(problem, done.theta))
            is_best = checking.given and measured[-1] < min(measured[:-1])
            now = {"start": start, "last": done.theta, "best": done.theta if is_best else best}
            after = GaussNewtonResult(
                losses, done.damping, iteration + 1, "running", measured, _kept(now, result.parameters)
            )
            # In one statement: an interrupt finds all old or all new.
            theta, best, evaluation, result = done.theta, now["best"], done.evaluation, after
            problem.write(theta)
            progress.update()
            progress.set_postfix_str(f"loss {losses[-1]:.2e}, damping {done.damping:.0e}", refresh=False)
            called = processes.called(callback, result)
            late = max_seconds is not None and time.perf_counter() - began >= max_seconds
            interrupted, called, late = processes.any(processes.interrupted, called, late)
            if interrupted:
                reason = "interrupted"
                break
            if called:
                reason = "callback"
                break
            if checking.is_over(measured):
                reason = "validation"
                break
            if done.before - done.loss <= loss_tolerance * abs(done.before):
                reason = "loss"
                break
            if late:
                reason = "seconds"
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        problem.write(best if checking.given else theta)  # whatever came while the tensors were being written
        progress.close()
        processes.release_interrupts()
    return replace(result, reason=reason)


def _started(
    resume_from: Any, damping: float, theta: torch.Tensor, weight_decay: bool, validates: bool
) -> GaussNewtonResult:
    """The result to go on from."""
    names = (["start"] if weight_decay else []) + (["last", "best"] if validates else [])
    if resume_from is None:
        return GaussNewtonResult((), damping, 0, "running", (), _kept(dict.fromkeys(names, theta), names))
    if not isinstance(resume_from, GaussNewtonResult):
        raise TypeError(f"`resume_from` should be a GaussNewtonResult but the value passed is {resume_from!r}")
    held = {name: len(values) for name, values in resume_from.parameters.items()}
    if held != dict.fromkeys(names, len(theta)):
        raise ValueError(
            "`resume_from` should come from a call with the same `model`, `weight_decay` and `validation`: it holds "
            f"{dict.fromkeys(names, len(theta))} parameters then, but this one holds {held}"
        )
    return resume_from


def _kept(values: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(values[name].tolist()) for name in names}


def _restored(result: GaussNewtonResult, name: str, theta: torch.Tensor) -> torch.Tensor:
    """θ of this name, or of the model if the result has none."""
    return theta.new_tensor(result.parameters[name]) if name in result.parameters else theta


def _warn_of_few(fitted: int, numbers: int) -> None:
    if fitted < 2 * numbers:
        warnings.warn(
            f"`data` give {fitted} residuals or labels for {numbers} trained numbers: with less than 2 for each, "
            "points are fitted by heart. Take more, or fresh ones in every iteration (a function of its number), "
            "fewer trained numbers, `validation` or `weight_decay`",
            stacklevel=3,
        )


def _check_callable(argument: str, function: Any, of: str) -> None:
    try:
        signature(function).bind("what it takes")
    except TypeError:
        raise TypeError(f"`{argument}` should be a function of {of} but the value passed is {function!r}") from None
    except ValueError:
        pass  # it does not tell what it takes, as some builtins
