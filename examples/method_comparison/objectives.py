"""What a model is trained to do, and how well it does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Objective:
    """A loss for every step and one number for the result. A subclass gives `loss` and `metric`, or more."""

    loss: Callable[[nn.Module, int], Tensor]  # of a step, numbered from 0: the same whatever came before
    metric: Callable[[nn.Module], float]  # what the tables show, on data or points that are not trained on

    def second_order(self) -> dict[str, Any]:
        """residual_fn, data and, if they are no least squares, loss of `peft_lotra.fit_gauss_newton`.

        Raises:
            ValueError: if there is no such form of it.
        """
        raise ValueError(f"{type(self).__name__} has no second-order form: optimizer 'lm' cannot be used")


class Data(NamedTuple):
    """Inputs and what they should give; first axis: samples."""

    x: Tensor
    y: Tensor


class Supervised(Objective):
    """mean over a batch of loss_fn(model(x), y), batches drawn with replacement, by the number of the step."""

    def __init__(
        self,
        training: Data,
        test: Data,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        metric_fn: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        seed: int,
    ) -> None:
        self.training, self.test, self.loss_fn, self.metric_fn = training, test, loss_fn, metric_fn
        self.batch, self.seed = min(batch, len(training.x)), seed

    def drawn(self, step: int) -> Data:
        """The batch of a step."""
        rows = torch.randint(len(self.training.x), (self.batch,), generator=generator(self.seed, step))
        rows = rows.to(self.training.x.device)
        return Data(self.training.x[rows], self.training.y[rows])

    def loss(self, model: nn.Module, step: int) -> Tensor:
        x, y = self.drawn(step)
        return self.loss_fn(model(x), y)

    @torch.no_grad()
    def metric(self, model: nn.Module) -> float:
        return self._on(model, self.test)

    def _on(self, model: nn.Module, data: Data, rows: int = 4096) -> float:
        outputs = torch.cat([model(x) for x in data.x.split(rows)])
        return self.metric_fn(outputs, data.y).item()


class Classification(Supervised):
    """Cross-entropy of model(x), shape (samples, classes), and y, the numbers of the classes; the metric is the
    accuracy in %."""

    def __init__(self, training: Data, test: Data, batch: int, seed: int) -> None:
        super().__init__(training, test, nn.functional.cross_entropy, accuracy, batch, seed)

    def second_order(self) -> dict[str, Any]:
        return {
            "residual_fn": lambda net, batch: (net(batch[0]), batch[1]),
            "data": tuple(self.training),
            "loss": "cross_entropy",
        }


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    return 100 * (outputs.argmax(-1) == y).float().mean()


def generator(seed: int, step: int) -> torch.Generator:
    """On the CPU, so that a seed gives the same numbers on every device."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
