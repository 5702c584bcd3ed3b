"""What a fit returns, and what a later call needs to go on with it: which fit it was, and a file of its state."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils._pytree import tree_leaves

from ..files.adapter_file import digest
from ..files.base_marks import some_entries
from .answers import first_of
from .problem import Problem
from .processes import Processes

NAME = "gauss_newton.pt"


@dataclass(frozen=True)
class GaussNewtonResult:
    """The result of a fit, in plain values that JSON can hold. `resume_from=` continues from it.

    Attributes:
        losses: the loss at the start, and after every iteration on the points of that iteration. It is empty if the
            fit was interrupted before the first loss was known.
        damping: λ for the next iteration.
        iterations: the number of iterations done, with those of the fit that was resumed.
        reason: why the fit ended: "iterations", "gradient", "loss", "damping" (no step reduces the loss any more),
            "not finite" (residuals or derivatives after the first iteration), "seconds", "callback", "validation" or
            "interrupted". In a callback it is "running".
        validation_losses: what `validation` gives at the start and after every iteration.
        parameters: values of θ that a resumed fit needs and the model does not hold: "start" with `weight_decay`,
            "last" and "best" with validation.
        fingerprint: of the model, the data and the other arguments, by name: what has to be the same to go on.
    """

    losses: tuple[float, ...]
    damping: float
    iterations: int
    reason: str
    validation_losses: tuple[float, ...] = ()
    parameters: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)


def fingerprint(problem: Problem, data: Any, validation: Any) -> dict[str, str]:
    """What has to be the same for a fit to go on, by the name of the argument. Plain text, the same in all processes.

    Of frozen parameters and buffers and of the data it takes some entries at equal distances, so that it costs little.
    """
    model = problem.model
    others = {name: p for name, p in (*model.named_parameters(), *model.named_buffers()) if not p.requires_grad}
    shapes = {name: list(p.shape) for name, p in problem.trained.items()}
    losses = [(name, getattr(loss, "loss", loss)) for name, loss in problem.losses.items()]
    functions = {name: getattr(f, "__qualname__", type(f).__qualname__) for name, f in problem.functions.items()}
    return {
        "model": digest({name: some_entries(value) for name, value in others.items() if not value.is_meta}, shapes),
        "residual_fn": str(functions),
        "loss": str({name: type(loss).__qualname__ for name, loss in losses}),
        "weight_decay": str(problem.weight_decay),
        "data": _of_data(data, problem.processes),
        "validation": _of_data(validation, problem.processes),
    }


def _of_data(data: Any, processes: Processes) -> str:
    """Of the parts of all processes."""
    if data is None or callable(data):
        return "none" if data is None else "a function"
    leaves = processes.agreed(lambda: tree_leaves(first_of(data)))
    own = digest({str(k): some_entries(leaf) for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}, {})
    return digest({}, {"parts": processes.gathered(own)})


def of_parameters(theta: torch.Tensor) -> str:
    return digest({"": theta}, {})


def check_same_fit(argument: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ValueError, with what differs, unless both are of the same fit."""
    other = [name for name in now if name in before and before[name] != now[name]]
    if other:
        differences = "; ".join(f"`{name}` was {before[name][:40]} and is {now[name][:40]}" for name in other)
        raise ValueError(
            f"`{argument}` is of another fit, and going on would mix the two: {differences}. Give what that fit had, "
            f"or start a new one without its `{argument}`"
        )


class Checkpoint:
    """The state of a fit in a folder, in one file that is complete or absent. The first process writes it."""

    def __init__(self, folder: str | os.PathLike[str], problem: Problem) -> None:
        self.path, self.problem, self.processes = Path(folder) / NAME, problem, problem.processes
        self.processes.agreed(self.path.parent.mkdir, 0o777, True, True)

    def save(self, result: GaussNewtonResult, theta: torch.Tensor) -> None:
        """Write it. Every process has to call this."""
        state = {"result": asdict(result), "theta": theta.cpu(), "random": self.processes.gathered(_random_states())}

        def write() -> None:
            partial = self.path.with_name(f".{os.getpid()}-{NAME}")
            try:
                torch.save(state, partial)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)

        self.processes.agreed(write if self.processes.is_first else lambda: None)

    def load(self, fingerprint: Mapping[str, str]) -> tuple[GaussNewtonResult, torch.Tensor] | None:
        """The result and θ; None without a file. Random generators are set to where they were.

        Raises:
            ValueError: if the file is broken or of another fit. Nothing is set then.
        """
        return self.processes.agreed(self._load, fingerprint)

    def _load(self, fingerprint: Mapping[str, str]) -> tuple[GaussNewtonResult, torch.Tensor] | None:
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=True)
            result, theta, states = GaussNewtonResult(**found["result"]), found["theta"], found["random"]
        except Exception as error:  # pickle and zip raise types of their own
            raise ValueError(
                f"`checkpoint_dir`: {self.path} cannot be read ({error}): delete it to start anew"
            ) from error
        if len(states) != self.processes.count:
            raise ValueError(
                f"`checkpoint_dir`: {self.path} is of {len(states)} processes, but {self.processes.count} run now: "
                "start as many, or delete it to start anew"
            )
        check_same_fit("checkpoint_dir", result.fingerprint, fingerprint)
        start = self.problem.parameters()
        if theta.shape != start.shape or theta.dtype != start.dtype:
            raise ValueError(
                f"`checkpoint_dir`: {self.path} has {len(theta)} numbers of {theta.dtype}, but `model` has "
                f"{len(start)} of {start.dtype} to train: give the model of that fit, or another folder"
            )
        _set_random_states(states[distributed.get_rank() if self.processes.several else 0])
        return result, theta.to(start.device)


def _of_accelerator() -> Any:
    """torch's module of the present accelerator; None without one."""
    # torch names one that it was built for, whether or not it is there.
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device and getattr(torch, device.type)


def _random_states() -> tuple[Any, ...]:
    """Of torch on the CPU and the present accelerator, of Python, and of NumPy."""
    name, keys, *rest = np.random.get_state(legacy=True)
    device = _of_accelerator()
    own = device and device.get_rng_state()
    return torch.get_rng_state(), own, random.getstate(), (name, np.asarray(keys).tolist(), *rest)


def _set_random_states(states: tuple[Any, ...]) -> None:
    of_torch, own, of_python, of_numpy = states
    torch.set_rng_state(of_torch)
    device = _of_accelerator()
    if own is not None and device is not None:
        device.set_rng_state(own)
    random.setstate(of_python)
    np.random.set_state(of_numpy)
