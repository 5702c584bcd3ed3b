"""Second-order fitting by Gauss–Newton with Levenberg–Marquardt damping, made for the few numbers of an adapter."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn

from .answers import Function, Loss
from .checks import check_callable, check_numbers
from .iteration import iterate
from .problem import Problem
from .progress import Progress
from .result import GaussNewtonResult
from .resuming import Checkpoint, check_same_fit, fingerprint, of_parameters


def fit_gauss_newton(
    model: nn.Module,
    residual_fn: Function | Mapping[str, Function],
    data: Any,
    *,
    loss: Loss | Mapping[str, Loss] = "least_squares",
    weight_decay: float = 0.0,
    iterations: int = 100,
    damping: float = 0.1,
    gradient_tolerance: float = 1e-8,
    loss_tolerance: float = 1e-8,
    max_seconds: float | None = None,
    validation: Any = None,
    patience: int | None = None,
    max_memory: int = 2**32,
    across_processes: bool | None = None,
    raise_on_nan: bool = False,
    progressbar: bool = True,
    callback: Callable[[GaussNewtonResult], Any] | None = None,
    resume_from: GaussNewtonResult | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    every: int = 10,
) -> GaussNewtonResult:
    """θ ← θ + δ with (JᵀJ + λD) δ = −Jᵀr, for the loss Σ_kinds mean over samples of ‖residual‖².

    This is Gauss–Newton with Levenberg–Marquardt damping. θ are the P parameters of the model that require gradients:
    those of the trainable adapter, or of a plain KAN. r holds the R residuals, J = ∂r/∂θ, and D = diag(JᵀJ) + 10⁻² ·
    (its mean) · I. If R < P, the same δ is computed as −D⁻¹Jᵀ(JD⁻¹Jᵀ + λI)⁻¹r. Sums of squares and the solution are in
    fp64, whatever the dtype of the model. λ grows until a step reduces the loss. It falls after a step that gains at
    least a quarter of what was predicted. The Tucker form is redundant: J is zero along some directions, and λ keeps θ
    where it is along them.

    With another `loss`, a mean of ℓ(o_n, y_n) with outputs o_n, the step is the generalised Gauss–Newton step

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
        model: the model to fit. Tensors that do not require gradients stay as they are, and so does `.grad`. Dropout
            and BatchNorm must be in eval mode.
        residual_fn: `residual_fn(net, batch)` returns the residuals of a batch, shape (N, ...). The residuals of
            a sample must depend on this sample alone. Call `net` like the model, and take its derivatives with
            `torch.func`, not with `torch.autograd.grad`. For several kinds of residuals, such as those of an equation
            and of its boundary, give a mapping from names to such functions. To weight a kind or a sample by w,
            multiply its residuals by √w. With a `loss` other than "least_squares", the function returns
            (outputs, targets), or (outputs, targets, weights) with a weight of at least 0 for each sample, shape (N,).
            The loss is then Σ_n w_n ℓ_n / M, for M samples.
        data: the batch that `residual_fn` takes: a tensor, or tensors in tuples and dicts, all with N rows. If
            `residual_fn` is a mapping, `data` is a mapping from the same names. It may also be a function from the
            number of the iteration to such data: fresh points in every iteration keep a fit from learning its points
            by heart. A step still fits the points of its iteration by heart if they give fewer than 2 residuals for
            each trained number. That is cheap, and good enough at first. Use four times as many points in the last
            fifth of the iterations. Or an iterable of batches, such as a DataLoader with `shuffle=False`, for data
            that do not fit into memory: they are read once for J and once for each λ that is tried, and count as one
            batch.
        loss: the loss of all kinds, or a mapping from the same names:

            | loss | ℓ(o, y) | outputs | targets |
            |---|---|---|---|
            | "least_squares" | ‖r‖² | (residuals) | |
            | "cross_entropy" | −Σ_c y_c log softmax(o)_c | (N, C) or (N, T, C) | labels (N,) or (N, T), or y like o |
            | "poisson" | Σ exp(o) − y·o | (N, ...) | like o |
            | "bernoulli" | Σ log(1 + exp(o)) − y·o | (N, ...) | like o |

            Sums are over the outputs of a sample, means over samples. The mean of cross_entropy is over the labels
            other than −100, as in torch. The loss may also be an object with the methods of `OutputLoss`.
        weight_decay: c of the prior, in units of the loss.
        iterations: the most iterations, with those of the fit that is resumed.
        damping: λ of the first iteration. A step that did not reduce the loss makes it 5 times larger, a good step 4
            times smaller.
        gradient_tolerance: stop when no column of J makes a cosine above this with r. For any loss: stop when no
            parameter alone promises to reduce the loss by more than this squared, as a fraction of the loss.
        loss_tolerance: stop when an iteration reduces the loss by at most this fraction.
        max_seconds: stop at the end of the iteration in which this time is over.
        validation: data of the same form. The loss on these data, without the prior, is measured at the start and
            after every iteration. The model ends with the parameters of its least value. A function of the model is
            measured in place of that loss; it returns a number, and lower is better.
        patience: stop after this many iterations without a new least value. With None, the fit goes on, and still ends
            with the best parameters.
        max_memory: the bytes of tensors that the fit may hold besides the model and the data, 4 GiB by default. A
            block of rows of J takes at most a quarter of it. If there is no room for 8P² bytes nor (with R < P) for J
            and 8R² bytes, conjugate gradients solve the equation. They need many more passes over the data, and leave
            an error of about 10⁻³ of the step, in the norm of the matrix.
        across_processes: this must be given if torch.distributed (or accelerate) runs several processes. True: all
            processes make one fit. `data` is then this process's part, which may differ in size from others, means are
            over all samples, and all processes end with the same parameters. False: this process makes its own fit.
        raise_on_nan: whether residuals or derivatives that are not finite, after the first iteration, are an error. If
            not, the fit ends with a warning. In the first iteration they are always an error.
        callback: a function that is called after every iteration with the result so far. The model then holds the new
            parameters. If it returns a true value, the fit ends. For accelerate's trackers: `lambda now:
            accelerator.log({"loss": now.losses[-1]}, step=now.iterations)`.
        resume_from: the result of an earlier call, which this call continues, bit for bit as if that call had not
            ended. The model must be as that call left it, and the other arguments must be the same: model, data,
            names of functions and losses are compared. The result holds θ₀ and the parameters of the last iteration if
            they are needed.
        checkpoint_dir: a folder for `gauss_newton.pt`, which holds the state of the fit: the trained numbers, λ,
            losses and the states of random generators. If it is there, the fit goes on from it, to the same bits. It
            is complete or absent, whenever the process is killed.
        every: the iterations between two checkpoints. There is one at the end, too.

    Returns:
        Losses, damping, the number of iterations, and why the fit ended. Ctrl-C ends it, too
        (`reason="interrupted"`). The model holds the parameters of the last step that reduced the loss, or those of
        the best validation, also after an exception.

    Raises:
        ValueError, TypeError: naming the argument, the value and the way out. The first iteration checks before it
            changes anything.
        RuntimeError: if another process of the fit raised an error, which is quoted.

    Warns:
        UserWarning: if the fit ends because something is not finite; if fixed data give less than 2 residuals (or
            labels) for each trained number, and neither validation nor `weight_decay` is given.

    Source: ours; generalised Gauss–Newton is Schraudolph's (2002), the damping is Levenberg's and Marquardt's.
    """
    check_numbers(
        iterations=(iterations, 1), damping=(damping, 0), gradient_tolerance=(gradient_tolerance, 0),
        loss_tolerance=(loss_tolerance, 0), weight_decay=(weight_decay, 0), max_seconds=(max_seconds, 0),
        patience=(patience, 1), max_memory=(max_memory, 1), every=(every, 1),
    )  # fmt: skip
    _check_together(callback, validation, patience, resume_from, checkpoint_dir)
    problem = Problem(model, residual_fn, loss, weight_decay, max_memory, across_processes)
    processes = problem.processes
    names = ("start",) * bool(weight_decay) + ("last", "best") * (validation is not None)
    identity = fingerprint(problem, data, validation)
    checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, every, problem)
    loaded = None if checkpoint is None else checkpoint.load(identity)
    if loaded is None:
        result, theta = _started(resume_from, damping, names, problem.start, identity), problem.start
    else:
        result, theta = GaussNewtonResult(**loaded[0]), loaded[1]
    held = {name: problem.start.new_tensor(values) for name, values in result.parameters.items()}
    theta = held.get("last", theta)
    best, problem.start = held.get("best", theta), held.get("start", problem.start)
    first, evaluation, reason = result.iterations, None, "iterations"

    began = time.perf_counter()
    progress = Progress(progressbar and processes.is_first, first, iterations)
    with processes.interrupts_kept():
        try:
            for iteration in range(first, iterations):
                batch = processes.agreed(data, iteration) if callable(data) else data
                if evaluation is None or callable(data):
                    is_first = iteration == first
                    evaluation = problem.checked(theta, batch, True) if is_first else problem.evaluate(theta, batch)
                result = replace(result, losses=result.losses or (evaluation.total,))
                if not result.validation_losses:
                    measured = _measured(validation, problem, theta, first=True)
                    result = replace(result, validation_losses=measured)
                found, damping, why = iterate(
                    problem, evaluation, result.damping, iteration == first, tolerance=gradient_tolerance
                )
                if iteration == first and not callable(data) and validation is None and not weight_decay:
                    _warn_of_few(problem.fitted(evaluation), len(theta))
                if why is not None:
                    reason = why
                    if why == "not finite":
                        _report_not_finite(problem.not_finite(found), iteration, raise_on_nan)
                    break
                before, after, now = evaluation.total, found.total, found.theta
                measured = (*result.validation_losses, *_measured(validation, problem, now))
                since = len(measured) - 1 - measured.index(min(measured)) if measured else 0
                now_best = now if since == 0 else best
                parameters = {name: tuple(values) for name, values in result.parameters.items()}
                parameters |= _kept(names[bool(weight_decay) :], last=now, best=now_best)
                new = GaussNewtonResult(
                    (*result.losses, after), damping, iteration + 1, "running", measured, parameters, identity
                )
                # One statement, so that an interrupt finds all values old or all new.
                theta, best, evaluation, result = now, now_best, found, new
                problem.write(theta)
                progress.update(iteration + 1, after, damping)
                if checkpoint is not None:
                    checkpoint.after(result, theta)
                called = callback is not None and bool(processes.agreed(callback, result))
                late = max_seconds is not None and time.perf_counter() - began >= max_seconds
                interrupted, called, late = processes.any(processes.interrupted, called, late)
                ends = {
                    "interrupted": interrupted,
                    "callback": called,
                    "validation": patience is not None and since >= patience,
                    "loss": before - after <= loss_tolerance * abs(before),
                    "seconds": late,
                }
                if any(ends.values()):
                    reason = next(name for name, holds in ends.items() if holds)
                    break
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            problem.write(best)  # an exception may have come during a write
            progress.close()
    if checkpoint is not None and result.iterations > first:
        checkpoint.save(result, theta)
    # Without "last", a fit that goes on finds θ in the model.
    own = {} if "last" in names else {"parameters": of_parameters(theta)}
    return replace(result, reason=reason, fingerprint={**identity, **own})


def _check_together(callback: Any, validation: Any, patience: Any, resume_from: Any, checkpoint_dir: Any) -> None:
    if callback is not None:
        check_callable("callback", callback, "a function of one GaussNewtonResult", "a result")
    if callable(validation):
        check_callable("validation", validation, "data, or a function of one model", "a model")
    if patience is not None and validation is None:
        raise ValueError(f"`patience` is {patience!r}, but there is no `validation` to wait for: give it, too")
    if checkpoint_dir is not None and resume_from is not None:
        raise ValueError("`resume_from` and `checkpoint_dir` both say where to go on: give one of them")


def _started(
    resume_from: Any, damping: float, names: tuple[str, ...], theta: torch.Tensor, identity: dict[str, str]
) -> GaussNewtonResult:
    """The result from which the fit starts, with these `parameters`."""
    if resume_from is None:
        kept = _kept(names, start=theta, last=theta, best=theta)
        return GaussNewtonResult((), damping, 0, "running", (), kept, identity)
    if not isinstance(resume_from, GaussNewtonResult):
        raise TypeError(f"`resume_from` should be a GaussNewtonResult but the value passed is {resume_from!r}")
    held = {name: len(values) for name, values in resume_from.parameters.items()}
    if held != dict.fromkeys(names, len(theta)):
        raise ValueError(
            "`resume_from` should come from a call with the same `model`, `weight_decay` and `validation`: these need "
            f"the numbers of parameters {dict.fromkeys(names, len(theta))}, but this result holds {held}"
        )
    check_same_fit("resume_from", resume_from.fingerprint, {**identity, "parameters": of_parameters(theta)})
    return resume_from


def _kept(names: tuple[str, ...], **values: torch.Tensor) -> dict[str, tuple[float, ...]]:
    return {name: tuple(values[name].tolist()) for name in names}


def _measured(validation: Any, problem: Problem, theta: torch.Tensor, first: bool = False) -> tuple[float, ...]:
    """The loss or number at θ as a tuple of one; () without validation. A function finds θ in the model."""
    if validation is None:
        return ()
    if not callable(validation):
        evaluate = partial(problem.checked, first=False) if first else problem.evaluate
        return (evaluate(theta, validation, argument="validation").loss,)
    problem.write(theta)
    (total,) = problem.processes.totals([problem.processes.agreed(_number, validation, problem.model)])
    if first and not math.isfinite(total):
        raise ValueError(f"`validation` should be finite at the start but it gave {total}")
    return (total / problem.processes.count,)


def _number(function: Callable[[nn.Module], Any], model: nn.Module) -> float:
    value = function(model)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"`validation` should return one number (lower is better), but it gave {value!r}")
    return float(value)


def _report_not_finite(what: str, iteration: int, is_error: bool) -> None:
    text = (
        f"{what} are not finite in iteration {iteration + 1}, so the fit ends there. The model holds its last good "
        "parameters. Look at the data of that iteration, and at roots and quotients in `residual_fn`"
    )
    if is_error:
        raise ValueError(text)
    warnings.warn(text, stacklevel=3)


def _warn_of_few(fitted: int, numbers: int) -> None:
    if fitted < 2 * numbers:
        warnings.warn(
            f"`data` give {fitted} residuals or labels for {numbers} trained numbers: with less than 2 for each, "
            "points are fitted by heart. Use more points, fresh points in every iteration (a function of its number), "
            "fewer trained numbers, `validation` or `weight_decay`",
            stacklevel=3,
        )
