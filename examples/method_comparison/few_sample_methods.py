"""The methods of `few_samples.py`: what each learns from the tasks seen, and how it takes in a new task's samples."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import few_sample_models as models
import torch
from few_sample_fits import GaussianProcesses, curve, deviations, least_squares, pod, prior_of
from few_sample_models import Learned, of_adapter, of_codes, of_family, of_weights
from few_sample_tasks import Samples, Split
from torch import Tensor

from peft_lotra import fit_task, task_noise


@dataclass(frozen=True)
class Sizes:
    """How much of everything is done.

    Attributes:
        samples: numbers of samples of a new task.
        repeats: draws of them, for tasks of validation and for those reported.
        widths: standard deviations of the prior of a network's numbers, for Levenberg–Marquardt.
        vectors: of the basis of gappy POD.
        iterations: of Levenberg–Marquardt.
    """

    samples: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50)
    repeats: tuple[int, int] = (1, 3)
    widths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    vectors: tuple[int, ...] = (2, 3, 5, 8, 12, 20, 30)
    iterations: int = 10


SMOKE = Sizes((1, 3), (1, 1), (0.01, 0.1), (2, 3), 2)


class Lab:
    """A split, and what was learned from its tasks."""

    def __init__(self, split: Split, sizes: Sizes, seconds: models.Seconds) -> None:
        self.split, self.sizes, self.seconds = split, sizes, seconds
        self.models: dict[str, tuple[Any, float]] = {}

    def once(self, name: str) -> Any:
        """What is learned from the tasks seen."""
        if name not in self.models:
            start, what = time.process_time(), ONCE[name]
            found = what.learn(self.split, rate=self.split.domain.rates.get(what.rate, 1e-2), seconds=self.seconds)
            self.models[name] = found, time.process_time() - start
        return self.models[name][0]

    def learned(self, method: Method) -> Learned:
        return method.start(self.once(method.once)) if method.once else method.start(self.split)

    def predicted(self, learned: Learned, u: Tensor, samples: Samples) -> Tensor:
        x = self.split.x.double().expand(len(samples.tasks), -1, -1)
        return curve(learned.predict, u, learned.extended(samples.tasks, x))


class Fit:
    """How a new task's samples are taken in, with a setting that is chosen on tasks of validation for each n.

    Attributes:
        further: how many numbers of a new task are fitted besides `Learned.centre`.
        inside: after `run`, which part of the points lies in the interval of 95 %, if there are intervals. shape: (B,)
    """

    further = 0
    inside: Tensor | None = None

    def grid(self, sizes: Sizes) -> Sequence[float]:
        """The settings to choose from."""
        return (1.0,)

    def prepare(self, lab: Lab, learned: Learned) -> None:
        """Before all samples."""

    def run(self, lab: Lab, learned: Learned, samples: Samples, setting: float) -> Tensor:
        """What is predicted at all points. shape: (B, points, outputs)"""
        raise NotImplementedError


class CodeFit(Fit):
    """Gauss–Newton with the prior of the codes, from several starts: what `fit_task` does, for all tasks at once.

    The noise of each output is the median over the tasks of validation of what remains of them after 50 samples.
    """

    def prepare(self, lab: Lab, learned: Learned) -> None:
        samples = lab.split.samples(lab.split.validation, max(lab.sizes.samples), 1)
        self.sigma = torch.full((lab.split.y.shape[-1],), 0.02).double()
        for _ in range(2):
            away = self.run(lab, learned, samples, 1.0) - lab.split.y[samples.tasks]
            self.sigma = away.square().mean(1).sqrt().median(0).values.clamp(min=1e-3)

    def run(self, lab: Lab, learned: Learned, samples: Samples, setting: float) -> Tensor:
        mean, factor = prior_of(learned.codes)
        near = torch.linalg.solve_triangular(factor, (learned.codes - mean).mT, upper=False).mT
        starts = torch.cat([torch.zeros_like(near[:1]), near])
        u = least_squares(learned.predict, mean, factor, self.sigma, samples, lab.sizes.iterations, starts)
        predicted = lab.predicted(learned, u, samples)
        std = deviations(learned.predict, u, factor, self.sigma, samples, lab.split.x.double())
        self.inside = ((predicted - lab.split.y[samples.tasks]).abs() < 1.96 * std).double().mean((1, 2))
        return predicted


class CoreFit(Fit):
    """`fit_task(..., train="core")`, with the `task_noise` of 50 samples of the tasks of validation."""

    def residual(self, net: Callable[..., Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return net(data[0]) - data[1]

    def prepare(self, lab: Lab, learned: Learned) -> None:
        held = lab.split.samples(lab.split.validation, max(lab.sizes.samples), 1)
        data = {str(int(task)): (x, y) for task, _, x, y in zip(*held, strict=True)}
        self.noise = task_noise(learned.other, self.residual, data, progressbar=False)
        self.further = sum(p[..., 0].numel() for name, p in learned.other.named_parameters() if "lotra_core" in name)

    def run(self, lab: Lab, learned: Learned, samples: Samples, setting: float) -> Tensor:
        means, inside = [], []
        for task, _, x, y in zip(*samples, strict=True):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the task is unlike|the samples say nothing")
                fit = fit_task(learned.other, None, self.residual, (x, y), noise=self.noise, train="core")
            mean, std = fit.predict(lab.split.x.double())
            means.append(mean)
            inside.append(((mean - lab.split.y[task]).abs() < 1.96 * std).double().mean())
        self.inside = torch.stack(inside)
        return torch.stack(means)


class PODFit(Fit):
    """The number of vectors is chosen."""

    def grid(self, sizes: Sizes) -> Sequence[float]:
        return sizes.vectors

    def run(self, lab: Lab, learned: Learned, samples: Samples, setting: float) -> Tensor:
        return pod(lab.split, int(setting), samples)


class GPFit(Fit):
    """The kernels were fitted to the tasks seen."""

    def run(self, lab: Lab, learned: Learned, samples: Samples, setting: float) -> Tensor:
        return learned.other.predicted(samples)


class WeightFit(Fit):
    """Levenberg–Marquardt with the prior N(start, width²); the width is chosen."""

    def grid(self, sizes: Sizes) -> Sequence[float]:
        return sizes.widths

    def run(self, lab: Lab, learned: Learned, samples: Samples, setting: float) -> Tensor:
        of = samples._replace(x=learned.extended(samples.tasks, samples.x))
        u = least_squares(learned.predict, learned.centre, setting, 0.01, of, lab.sizes.iterations)
        return lab.predicted(learned, u, samples)


class Once(NamedTuple):
    """What is learned from the tasks seen, and under which name the domain has its rate."""

    rate: str
    learn: Callable[..., Any]


class Method(NamedTuple):
    """A start for new tasks, from what was learned once or from nothing, and how their samples are taken in."""

    once: str
    start: Callable[[Any], Learned]
    fit: Callable[[], Fit]


def from_scratch(split: Split) -> Learned:
    torch.manual_seed(split.number)
    return of_weights(models.kan(split.x.shape[1], split.y.shape[2]), 0)


def of_known(model: models.Known) -> Learned:
    return of_weights(model.kan, known=model.known)


def of_processes(split: Split) -> Learned:
    processes = GaussianProcesses(split)
    once = sum(len(kernel.theta) for kernel in processes.kernels) + processes.inputs.size + processes.outputs.size
    return Learned(models.contracted, torch.empty(0), once, other=processes)


def of_split(split: Split) -> Learned:
    return Learned(models.contracted, torch.empty(0), split.y[split.seen].numel())


ONCE = {
    **{f"family {k}": Once("family", partial(models.family, k=k)) for k in (3, 5)},
    "pooled": Once("base", models.base),
    "one": Once("base", partial(models.base, pooled=False)),
    "inputs 5": Once("inputs", partial(models.coded, models.CodeAsInputs, k=5)),
    "basis 16": Once("basis", partial(models.coded, models.LearnedBasis, k=16)),
    "GEPS 8": Once("GEPS", partial(models.coded, models.GEPS, k=8)),
    "known": Once("known", partial(models.coded, models.Known)),
}
METHODS: dict[str, Method] = {
    "family, code of 3": Method("family 3", of_family, CodeFit),
    "family, code of 5": Method("family 5", of_family, CodeFit),
    "family, code of 5, then its core": Method("family 5", of_family, CoreFit),
    "GEPS, code of 8": Method("GEPS 8", of_codes, CodeFit),
    "code as inputs, 5": Method("inputs 5", of_codes, CodeFit),
    "learned basis, 16": Method("basis 16", of_codes, CodeFit),
    "known input, everything, LM": Method("known", of_known, WeightFit),
    "Gaussian process": Method("", of_processes, GPFit),
    "gappy POD": Method("", of_split, PODFit),
    "pooled, own adapter, LM": Method("pooled", of_adapter, WeightFit),
    "pooled, everything, LM": Method("pooled", of_weights, WeightFit),
    "one task, everything, LM": Method("one", of_weights, WeightFit),
    "from scratch, LM": Method("", from_scratch, WeightFit),
}


def badness(lab: Lab, learned: Learned, fit: Fit, n: int, setting: float) -> float:
    """The geometric mean of the errors of the tasks of validation."""
    samples = lab.split.samples(lab.split.validation, n, lab.sizes.repeats[0])
    errors = lab.split.errors(samples.tasks, fit.run(lab, learned, samples, setting))
    return geometric_mean(errors.clamp(1e-6, 100).tolist())


def solve(lab: Lab, method: Method) -> dict[str, Any]:
    """Errors of the unseen tasks for each number of samples, and what was chosen for it."""
    fit, learned = method.fit(), lab.learned(method)
    fit.prepare(lab, learned)
    found, repeats = {}, lab.sizes.repeats[1]
    for n in lab.sizes.samples:
        grid = fit.grid(lab.sizes)
        setting = min(grid, key=partial(badness, lab, learned, fit, n)) if len(grid) > 1 else grid[0]
        samples = lab.split.samples(lab.split.unseen, n, repeats)
        start = time.process_time()
        errors = lab.split.errors(samples.tasks, fit.run(lab, learned, samples, setting))
        spent = (time.process_time() - start) / len(samples.tasks)
        found[n] = {
            "errors": [median(part) for part in errors.reshape(-1, repeats).tolist()],
            "setting": setting,
            "seconds": spent,
        }
        if fit.inside is not None:
            found[n]["inside"] = [sum(part) / repeats for part in fit.inside.reshape(-1, repeats).tolist()]
    return {"numbers": [learned.once, len(learned.centre) + fit.further], "samples": found}
