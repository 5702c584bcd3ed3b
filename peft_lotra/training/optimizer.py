"""Gauss–Newton as an optimizer for your own loop: each step is one iteration of `fit_gauss_newton`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .answers import Function, Loss
from .checks import check_numbers
from .iteration import iterate
from .problem import Problem


class GaussNewton(torch.optim.Optimizer):
    """θ ← θ + αδ with (JᵀJ + λD) δ = −Jᵀr on a batch: one iteration of `fit_gauss_newton`, with the same arguments.

    ```python
    optimizer = GaussNewton(model, lambda net, batch: (net(batch["x"]), batch["y"]), loss="cross_entropy")
    for batch in loader:
        loss = optimizer.step(batch)
    ```

    There is no closure and no `backward()`. J has a row for every sample, so the optimizer calls the model itself, on
    each sample of the batch. θ are the parameters that require gradients when the optimizer is made. A batch should
    give at least twice as many residuals as there are trained numbers. With fewer, δ fits each batch by heart, and the
    rate has to fall, by one of torch's schedulers, to average over batches.

    `param_groups[0]` has "lr", which is α, and "damping", which is λ of the next step. Both are in `state_dict()`, and
    so is θ₀ of the prior. With it and the model's state dict, a fit goes on bit for bit. accelerate and transformers'
    Trainer take this optimizer like any other; `examples/gauss_newton_trainer.py` shows the Trainer.

    Args:
        model, residual_fn, loss, weight_decay, damping, max_memory, across_processes: as for `fit_gauss_newton`,
            which calls a batch `data`.
        lr: α in (0, 1]; 1 is the full Gauss–Newton step. A scheduler may set it to 0: then no parameter changes.

    Raises:
        ValueError, TypeError: as for `fit_gauss_newton`.

    Source: ours; see `fit_gauss_newton`.
    """

    def __init__(
        self,
        model: nn.Module,
        residual_fn: Function | Mapping[str, Function],
        *,
        lr: float = 1.0,
        loss: Loss | Mapping[str, Loss] = "least_squares",
        weight_decay: float = 0.0,
        damping: float = 0.1,
        max_memory: int = 2**32,
        across_processes: bool | None = None,
    ) -> None:
        check_numbers(lr=(lr, 0), damping=(damping, 0), weight_decay=(weight_decay, 0), max_memory=(max_memory, 1))
        if lr > 1:
            raise ValueError(f"`lr` should be at most 1, the Gauss–Newton step, but the value passed is {lr!r}")
        self._problem = Problem(model, residual_fn, loss, weight_decay, max_memory, across_processes)
        self._checked = False
        super().__init__(list(self._problem.trained.values()), {"lr": lr, "damping": damping})
        if weight_decay:
            for parameter in self._problem.trained.values():
                self.state[parameter]["start"] = parameter.detach().clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group of the constructor. A second group raises ValueError."""
        if self.param_groups:
            raise ValueError(
                "GaussNewton has one group of parameters, all of `model` that require gradients: set "
                "`requires_grad` of the parameters to fit, and make a new optimizer"
            )
        super().add_param_group(param_group)

    def step(self, batch: Any) -> float:  # type: ignore[override]  # torch's takes a closure
        """Make one iteration on a batch.

        Args:
            batch: the batch that `residual_fn` takes, with a row for every sample.

        Returns:
            The loss before the step, with the prior. If no λ gives a step that reduces it, the parameters stay.

        Raises:
            ValueError, TypeError: naming `residual_fn`, `loss` or `data` (the batch). Nothing is changed then.
        """
        problem, group, first = self._problem, self.param_groups[0], not self._checked
        if problem.weight_decay:
            problem.start = torch.cat([self.state[p]["start"].flatten() for p in problem.trained.values()])
        evaluation = problem.checked(problem.parameters(), batch, first)
        if not group["lr"]:  # schedules may begin or end with 0, where no λ would give a gain
            return evaluation.total.item()
        found = iterate(problem, evaluation, group["damping"], first, rate=group["lr"])
        self._checked, group["damping"] = True, found.damping
        if found.reason == "not finite":
            warnings.warn(f"{problem.not_finite(found.point)} are not finite: the parameters stay", stacklevel=2)
        else:
            problem.write(found.point.theta)
        return found.before
