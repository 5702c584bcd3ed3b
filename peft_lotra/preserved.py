"""Runs of a model: contexts that leave no trace in it, and what it takes and returns."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def check_model(**models: Any) -> None:
    """Raise TypeError, naming the argument, if a value that should be a model is not a torch.nn.Module."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"`{name}` should be a torch.nn.Module but the value passed is {model!r}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def preserved(model: nn.Module, training: bool | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Afterwards the model's attributes, parameters, gradients, flags, buffers and random state are what they were.

    Inside, no parameter has a `.grad`, buffers are copies, and nothing is compiled.

    Args:
        model: any module.
        training: the mode of all modules inside. None leaves the modes as they are.
        dtype: the dtype inside of floating-point buffers, of tensors that are plain attributes, and of new tensors.
    """
    restore, gradients = _restore(model), [(p, p.grad) for p in model.parameters()]
    default = torch.get_default_dtype()
    with preserved_random_state(model), torch.compiler.set_stance("force_eager"):
        try:
            torch.set_default_dtype(dtype or default)
            for p, _ in gradients:
                p.grad = None
            for m in model.modules():
                if isinstance(m, torch.jit.ScriptModule):
                    continue
                m.__dict__["training"] = m.training if training is None else training
                for held in (m._buffers, m.__dict__) if dtype else (m._buffers,):
                    for name, t in [*held.items()]:
                        if isinstance(t, torch.Tensor) and (held is m._buffers or not t.requires_grad):
                            held[name] = t.detach().to(dtype if t.is_floating_point() else None, copy=True)
            yield
        finally:
            torch.set_default_dtype(default)
            restore()
            for p, gradient in gradients:
                p.grad = gradient


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """After an exception, modules, attributes, parameters and flags are as before; values of tensors are not."""
    restore = _restore(model)
    try:
        yield
    except BaseException:
        restore()
        raise


def _restore(model: nn.Module) -> Callable[[], None]:
    """A function that puts back the attributes of now, what the containers among them hold, and parameters' flags."""
    # Attributes of TorchScript's modules cannot be put back.
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
    values = [value for _, own in attributes for value in own.values()]
    held = [value for value in values if type(value) in (dict, OrderedDict, list, set)]
    containers = [(value, value.copy() if value else ()) for value in held]  # most are empty
    flags = [(p, p.requires_grad) for m in model.modules() for p in m._parameters.values() if p is not None]

    def restore() -> None:
        for held, before in attributes + containers:
            held.clear()
            held.extend(before) if isinstance(held, list) else held.update(before)
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)

    return restore


@contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Afterwards the random state of the CPU and of the model's devices is what it was."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted({device.index or 0 for device in devices}), device_type=kind):
        yield


def first_tensor(returned: Any) -> torch.Tensor:
    """The first tensor of what a layer or a model returns."""
    return next(leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor))


def parents(node: Any) -> list[Any]:
    """The nodes of autograd's graph that follow a node in the backward pass."""
    return [parent for parent, _ in node.next_functions]


def reached(start: Iterable[T | None], onward: Callable[[T], Iterable[T | None]] = parents) -> set[T]:
    """All nodes of a graph that are reached from `start`; `onward` gives the next nodes of each. None is no node."""
    seen: set[T] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += onward(node)
    return seen
