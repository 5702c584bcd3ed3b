"""What the methods are compared on. A module of this folder is a task: it defines `TASK`, a subclass of `Task`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from objectives import Objective
from torch import nn

FIRST_TUNING_SEED = 100  # a search for rates has such seeds; a task may judge them on validation data


@dataclass(frozen=True, kw_only=True)
class Task:
    """A KAN with a base objective, which it is pre-trained on, and a target objective, which it is adapted to.

    The fields are the settings that an experiment may give. `base_steps` 0: there is no base, the target is learned
    from scratch.
    """

    base_steps: int = 0
    base_lr: float = 3e-3

    metric: ClassVar[str]  # what the objectives' metric is, for tables and axes
    higher_is_better: ClassVar[bool] = False
    one_base: ClassVar[bool] = False  # for all seeds, because it takes long
    only_target: ClassVar[tuple[str, ...]] = ()  # settings that the base does not depend on
    smoke: ClassVar[dict[str, Any]] = {}  # settings of a shortened experiment
    requires: ClassVar[dict[str, str]] = {}  # packages with the data, and the command that installs each

    def build(self, seed: int) -> nn.Module:
        """An untrained model on the CPU; the same weights for the same seed."""
        raise NotImplementedError

    def coefficients(self, model: nn.Module) -> dict[str, Any]:
        """What `LoTRAConfig(coefficients=...)` has to be told about the model."""
        return {}

    def objective(self, part: str, seed: int, device: torch.device) -> Objective:
        """Of the "base" or the "target". The seed decides on points, splits and batches."""
        raise NotImplementedError

    def base_settings(self) -> dict[str, Any]:
        """Tasks that agree in these share a base."""
        return {key: value for key, value in asdict(self).items() if key not in self.only_target}


def task_names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def make_task(name: str, settings: Mapping[str, Any]) -> Task:
    """
    Raises:
        ValueError: naming what is allowed, if there is no such task or setting.
    """
    if name not in task_names():
        raise ValueError(f"`task` should be one of {task_names()} but the value passed is {name!r}")
    task = importlib.import_module(f"tasks.{name}").TASK
    allowed = [field.name for field in fields(task)]
    if unknown := sorted(set(settings) - set(allowed)):
        raise ValueError(f"`settings` of the task {name!r} should be some of {allowed} but has {unknown}")
    try:
        return task(**settings)
    except TypeError as error:  # one that has no default is missing
        raise ValueError(f"`settings` of the task {name!r}: {error}") from None
