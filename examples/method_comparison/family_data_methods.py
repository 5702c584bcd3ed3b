"""The methods that `family_data.py` compares: what each learns once, and what from a few samples of a new task."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import cos, inf, pi
from typing import Any, NamedTuple

import torch
from compared_methods import apply_method, trainable
from family_data_tasks import DataFamily, NewTask, Task
from family_tasks import OfParameters
from objectives import Data
from peft import get_peft_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, adapter_at, add_task, fit_gauss_newton

Outputs = Callable[[Any, Tensor, Task], Tensor]  # of a network, inputs and their tasks


@dataclass(frozen=True)
class Sizes:
    """How much of everything is done.

    Attributes:
        base, family: steps of Adam; for a regression, iterations of Levenberg–Marquardt.
        rates, weight_decays: that are tried.
        tuning: the part of the steps with which rates are tried.
        few: iterations of Levenberg–Marquardt on the samples of a new task.
        tasks: new tasks.
    """

    base: tuple[int, int] = (500, 25)
    family: tuple[int, int] = (1500, 100)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    weight_decays: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1.0, 100.0, 1e4)
    tuning: float = 0.5
    few: int = 6
    tasks: int = 10


SMOKE = Sizes((4, 2), (4, 2), (1e-3, 1e-2), (1e-2, 1.0), tuning=0.5, few=1, tasks=1)


class Learned(NamedTuple):
    """A network for all tasks; the CPU seconds and numbers of what was trained; the metric on tasks trained on."""

    model: nn.Module
    outputs: Outputs
    seconds: float
    numbers: int
    metric: float


class AtTask(nn.Module):
    """A network for all tasks at one. (N, n) → (N, m)"""

    def __init__(self, learned: Learned, task: Task) -> None:
        super().__init__()
        self.model, self.outputs = copy.deepcopy(learned.model).requires_grad_(False), learned.outputs
        self.found = nn.ParameterDict({k: v for k, v in task.items() if isinstance(v, nn.Parameter)})
        self.fixed = {k: v for k, v in task.items() if k not in self.found}

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(self.model, x, {**self.fixed, **self.found})


class Lab:
    """A family of tasks with a seed, and the rates and weight decays of the methods."""

    def __init__(self, tasks: DataFamily, sizes: Sizes, chosen: dict[tuple[str, str], float]) -> None:
        self.tasks, self.sizes, self.chosen = tasks, sizes, chosen
        self.lm, self.named = tasks.regression, "names" in tasks.kinds
        self.learned: dict[str, Learned] = {}
        self._samples: dict[str, tuple[Data, Data]] = {}

    def samples(self, new: NewTask) -> tuple[Data, Data]:
        if (key := str(new.task)) not in self._samples:
            self._samples[key] = self.tasks.samples(new.task)
        return self._samples[key]

    def once(self, name: str) -> Learned:
        """What a method learns once for all tasks, at the rate that was chosen."""
        if name not in self.learned:
            self.learned[name] = ONCE[name](self, self.chosen.get(("rate", name), 0.0), 1.0)
        return self.learned[name]

    def seconds(self, name: str) -> float:
        """CPU seconds until that was learned, with those of the base that it begins from."""
        return self.once(name).seconds + (self.once("base").seconds if name not in ("base", "rival") else 0)

    def adapted(self, **config: Any) -> nn.Module:
        kan = copy.deepcopy(self.once("base").model)
        torch.manual_seed(self.tasks.seed + 1)
        return get_peft_model(kan, LoTRAConfig(coefficients=self.tasks.coefficients(kan), **config))

    def train(
        self,
        model: nn.Module,
        outputs: Outputs,
        steps: float,
        rate: float,
        batch: Callable[..., tuple[Data, Task]] | None = None,
        seconds: float = inf,
    ) -> Learned:
        """Levenberg–Marquardt, or Adam at a rate that falls to zero: all steps, or as many as there is time for."""
        batch, numbers = batch or self.tasks.batch, trainable(model)
        names = list(batch(0)[1])  # data are there from now on
        start = time.process_time()

        def done(step: int) -> float:
            return max(step / steps, (time.process_time() - start) / seconds)

        if self.lm:

            def residual(net: Any, part: tuple[Tensor, ...]) -> Tensor:
                x, y, *values = part
                return outputs(net, x, dict(zip(names, values, strict=True))) - y

            fit(model, residual, lambda k: (*batch(k)[0], *batch(k)[1].values()), 10**6, over=lambda k: done(k) >= 1)
        else:
            optimizer, step = torch.optim.Adam([p for p in model.parameters() if p.requires_grad]), 0
            while (part := done(step)) < 1:
                optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * part)) / 2
                (x, y), task = batch(step)
                optimizer.zero_grad()
                nn.functional.cross_entropy(outputs(model, x, task), y).backward()
                optimizer.step()
                step += 1
        spent, ((x, y), task) = time.process_time() - start, batch(0, test=True)
        with torch.no_grad():
            return Learned(model, outputs, spent, numbers, self.tasks.metric(outputs(model, x, task), y))

    def few(self, model: nn.Module, data: Data, weight_decay: float) -> None:
        """Levenberg–Marquardt from a few samples on what is trainable, kept near to the start by `weight_decay`."""

        def residual(net: Any, part: tuple[Tensor, Tensor]) -> Any:
            return net(part[0]) - part[1] if self.lm else (net(part[0]), part[1])

        fit(
            model, residual, tuple(data), self.sizes.few, weight_decay, "least_squares" if self.lm else "cross_entropy"
        )

    def loss(self, model: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return (nn.functional.mse_loss if self.lm else nn.functional.cross_entropy)(model(data.x), data.y).item()


def fit(
    model: nn.Module,
    residual: Any,
    data: Any,
    iterations: int,
    weight_decay: float = 0.0,
    loss: str = "least_squares",
    over: Callable[[int], bool] | None = None,
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`data` give")  # few samples are what this is about
        result = fit_gauss_newton(
            model,
            residual,
            data,
            loss=loss,
            weight_decay=weight_decay,
            iterations=iterations,
            loss_tolerance=0 if over else 1e-3,
            progressbar=False,
            callback=over and (lambda now: over(now.iterations)),
        )
    if result.reason == "interrupted":
        raise KeyboardInterrupt


def plain(net: Any, x: Tensor, task: Task) -> Tensor:
    return net(x)


def at_task_of_family(net: Any, x: Tensor, task: Task) -> Tensor:
    return net(x, lotra_task=task)


def learn_base(lab: Lab, rate: float, part: float) -> Learned:
    steps = lab.sizes.base[lab.lm] * part

    def batch(step: int, test: bool = False) -> tuple[Data, Task]:
        return lab.tasks.base_batch(step, test), {}

    return lab.train(lab.tasks.build(), plain, steps, rate, batch)


def learn_family(lab: Lab, rate: float, part: float) -> Learned:
    model = lab.adapted(**lab.tasks.ranks, family=lab.tasks.family)
    return lab.train(model, at_task_of_family, lab.sizes.family[lab.lm] * part, rate)


def learn_one(lab: Lab, rate: float, part: float) -> Learned:
    return lab.train(lab.adapted(r=lab.tasks.ranks_of_one), plain, lab.sizes.family[lab.lm] * part, rate)


def learn_rival(lab: Lab, rate: float, part: float) -> Learned:
    """A KAN of inputs and parameters, or with outputs for each task: from scratch, as long as base and family took."""
    tasks, seconds = lab.tasks, (lab.once("base").seconds + lab.once("family").seconds) * part
    if lab.named:
        model, place = tasks.build(heads=len(tasks.family)), {name: k for k, name in enumerate(tasks.family)}

        def outputs(net: Any, x: Tensor, task: Task) -> Tensor:
            heads = net(x).unflatten(1, (len(place), -1))
            return heads[torch.arange(len(x)), [place[name] for name in task["task"]]]
    else:
        model = OfParameters(tasks.build(len(tasks.family)), list(tasks.family.values()))

        def outputs(net: Any, x: Tensor, task: Task) -> Tensor:
            columns = [torch.as_tensor(value).reshape(-1, 1).expand(len(x), 1) for value in task.values()]
            return net(x, *columns)

    return lab.train(model, outputs, inf, rate, seconds=seconds)


ONCE: dict[str, Callable[[Lab, float, float], Learned]] = {
    "base": learn_base,
    "family": learn_family,
    "rival": learn_rival,
    "one adapter": learn_one,
}


def core(lab: Lab, new: NewTask, once: str = "family") -> nn.Module:
    model = copy.deepcopy(lab.once(once).model)
    if lab.named:
        add_task(model, new.task["task"])
    adapter_at(model, "new", **new.task)
    return model


def unknown(lab: Lab, new: NewTask, once: str, what: str = "parameter") -> nn.Module:
    """At the parameter with the least loss of 21 in the range, which is trained; or of the family the core there."""
    few, _ = lab.samples(new)
    ((name, (low, high)),) = lab.tasks.family.items()
    values = torch.linspace(low, high, 21)
    losses = [lab.loss(AtTask(lab.once(once), {name: value}), few) for value in values]
    best = values[losses.index(min(losses))]
    if what == "core":
        return core(lab, NewTask(new.place, {name: best.item()}))
    return AtTask(lab.once(once), {name: nn.Parameter(best)})


def rival(lab: Lab, new: NewTask, last_layer: bool = False) -> nn.Module:
    """Everything from the rival at the new parameters; of one with heads, the new one is their mean."""
    learned = lab.once("rival")
    if not lab.named:
        return AtTask(learned, new.task).requires_grad_(True)
    kan, state = lab.tasks.build(), dict(learned.model.state_dict())
    for key, own in kan.state_dict().items():
        if state[key].shape != own.shape:
            state[key] = state[key].unflatten(0, (len(lab.tasks.family), -1)).mean(0)
    kan.load_state_dict(state)
    return kan if not last_layer else nn.Sequential(*kan[:-1].requires_grad_(False), kan[-1])


def from_base(lab: Lab, new: NewTask, **method: Any) -> nn.Module:
    kan = copy.deepcopy(lab.once("base").model)
    return apply_method(kan, method, lab.tasks, None, lab.tasks.seed + 1)


class Method(NamedTuple):
    """What a new task trains: `start` gives the model with that trainable, and nothing else.

    Attributes:
        once: what was learned before.
        kind: of families that it is for, see `DataFamily`.
        decays: whether it is kept near to its start.
    """

    start: Callable[[Lab, NewTask], nn.Module]
    once: str
    kind: str = "any"
    decays: bool = True


METHODS = {
    "family, core": Method(core, "family"),
    "family, unknown parameter": Method(partial(unknown, once="family"), "family", "ranges", False),
    "family, unknown, core": Method(partial(unknown, once="family", what="core"), "family", "ranges"),
    "LoTRA alone": Method(partial(from_base, method="lotra", ratio=0.1), "base"),
    "LoRA alone": Method(partial(from_base, method="lora", ratio=0.1), "base"),
    "full": Method(partial(from_base, method="full"), "base"),
    "one adapter": Method(lambda lab, new: copy.deepcopy(lab.once("one adapter").model), "one adapter", "visible"),
    "rival": Method(rival, "rival"),
    "rival, last layer": Method(partial(rival, last_layer=True), "rival", "names"),
    "rival, unknown parameter": Method(partial(unknown, once="rival"), "rival", "ranges", False),
}


def learned_numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def solve(lab: Lab, method: Method, weight_decay: float, every: int = 1) -> tuple[int, list[dict[str, Any]]]:
    """The numbers for a new task; and of `every` so many: the metric before and after its samples, CPU seconds."""
    found, numbers = [], 0
    lab.once(method.once)

    def metric(model: nn.Module, test: Data) -> float:
        with torch.no_grad():
            return lab.tasks.metric(model(test.x), test.y)

    for new in lab.tasks.new_tasks()[: lab.sizes.tasks : every]:
        few, test = lab.samples(new)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*outside of the family's range")
            start = time.process_time()
            model = method.start(lab, new)
            seconds, numbers, before = time.process_time() - start, learned_numbers(model), metric(model, test)
            start = time.process_time()
            lab.few(model, few, weight_decay)
            seconds += time.process_time() - start
            metrics = [before, metric(model, test)]
        found.append({**new.task, "place": new.place, "metrics": metrics, "seconds": seconds})
    return numbers, found
