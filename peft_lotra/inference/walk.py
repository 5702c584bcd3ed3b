"""Runs a model once on a sample, and visits each module as soon as it has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from ..preserved import preserved
from .recording import Call, tensors_in


def walk(
    model: nn.Module,
    sample: tuple,
    kwargs: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    visit: Callable[[str, nn.Module, Call], None],
) -> None:
    """Run the model once. After the first run of each of `modules`, call `visit` with its name, it, and its arguments.

    Inner modules are visited before the modules around them. Memory holds only the arguments of modules that are
    running. The model is in eval mode during the pass and the visits. Afterwards it is as it was.

    Raises:
        ValueError: if the model does not run on the sample.
    """
    seen: set[str] = set()
    visiting = False
    progress = tqdm(total=len(modules), desc="layers", unit="layer", delay=5, leave=False, dynamic_ncols=True)

    def recording(name: str, module: nn.Module, forward: Callable) -> Callable:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal visiting
            if visiting or name in seen:
                return forward(*args, **kwargs)
            seen.add(name)
            with torch.inference_mode(False):
                call = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
            result = forward(*args, **kwargs)
            visiting = True  # remains after an error, which is then no fault of the sample
            with torch.inference_mode(False), ExitStack() as stack:
                for device in {t.device.type for t in (*tensors_in(call), *module.parameters())} - {"meta"}:
                    stack.enter_context(torch.autocast(device, enabled=False))
                visit(name, module, call)
            visiting = False
            progress.update()
            return result

        return run

    with progress, preserved(model, training=False), torch.no_grad():
        for name, module in modules.items():
            if not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = recording(name, module, module.forward)  # some models call `forward`
        try:
            model(*sample, **kwargs)
        except Exception as error:
            if visiting:
                raise
            raise ValueError(
                "the model fails on this sample, which should be what its forward takes, of the right shape, dtype "
                f"and device: {type(error).__name__}: {error}"
            ) from error
