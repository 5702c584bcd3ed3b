"""Runs a layer with tensors in place of its parameters, and records the tensors that depend on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..preserved import preserved


def map_tensors(thing: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """A copy of `thing`, in which `function` replaces each tensor, also inside tuples, lists and mappings."""
    if isinstance(thing, torch.Tensor):
        return function(thing)
    if isinstance(thing, Mapping):
        return {key: map_tensors(value, function) for key, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(map_tensors(value, function) for value in thing)
    return [map_tensors(value, function) for value in thing] if isinstance(thing, list) else thing


def tensors_in(thing: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(thing, found.append)
    return found


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Recorder(TorchFunctionMode):
    """Records each tensor that requires a gradient, in order of creation, and the recorded tensors that it used."""

    _IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul")} | {"__setitem__"}

    def __init__(self):
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self.sources: list[list[int]] = []
        self.overwritten: set[int] = set()  # `tensors` has copies of these
        self._index: dict[int, int] = {}  # by the id of the tensor
        self._nodes: dict[Any, int] = {}  # by the tensor's node in the autograd graph
        self._alive: list[torch.Tensor] = []  # keeps tensors alive, so that Python does not reuse their ids

    def index(self, tensor: torch.Tensor, sources: list[int] | None = None) -> int:
        """The number of `tensor`. If `sources` is given, it gets a new number."""
        if sources is not None or id(tensor) not in self._index:
            self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            # Scripted functions and autograd.Function create tensors that are not recorded.
            self.sources.append(self._nearest(tensor) if sources is None else sources)
            self._alive.append(tensor)
            self._nodes.setdefault(tensor.grad_fn, self._index[id(tensor)])
        return self._index[id(tensor)]

    def _nearest(self, tensor: torch.Tensor) -> list[int]:
        """The numbers of the recorded tensors that the backward pass from `tensor` meets first."""
        found, seen, stack = set(), set(), [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            number = self._nodes.get(node, self._index.get(id(getattr(node, "variable", None))))
            if number is None:
                stack += [parent for parent, _ in node.next_functions]
            else:
                found.add(number)
        return sorted(found)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sources = [self.index(t) for t in tensors_in((args, kwargs)) if t.requires_grad]
        name = getattr(func, "__name__", "")
        changed = []
        if name in self._IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            changed = [t for t in args[:1] if isinstance(t, torch.Tensor)]
        for target in changed:  # copy the recorded tensors that share its memory, so that they keep their values
            memory = target.untyped_storage().data_ptr()
            for k, tensor in enumerate(self.tensors):
                if tensor.untyped_storage().data_ptr() == memory and not tensor.is_leaf:
                    self.tensors[k] = tensor.clone()
                    self.overwritten.add(k)
        result = func(*args, **kwargs)
        for tensor in [*tensors_in(result), *changed] if sources else []:
            if tensor.requires_grad:
                self.index(tensor, sources)
        return result


class Run:
    """One run of a layer with `values` in place of parameters, in the owners' `__dict__`, as an adapter replaces them.

    Attributes:
        returned: the real or complex tensors that the layer returned.
        outputs: the numbers of the returned tensors that require a gradient.
        tensors: the recorded tensors; `x` has the number 0.
        sources: the numbers of the tensors from which each was computed.
        overwritten: the numbers of the tensors that the layer changed in place later.
        reassigned: the paths of the parameters that the layer assigned to.
        x: the leaf from which the input was made.
    """

    x: torch.Tensor

    def __init__(
        self,
        layer: nn.Module,
        args: Any,
        kwargs: Any,
        x: torch.Tensor,
        values: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ):
        places = {path: (layer.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in values}
        before = {path: owner._parameters[name] for path, (owner, name) in places.items()}
        recorder = Recorder()
        recorder.index(x)
        with preserved(layer, training=False, dtype=dtype), torch.enable_grad():
            for p in filter(_differentiable, layer.parameters()):
                p.requires_grad_(True)  # records whether the layer uses the parameter itself
            for path, (owner, name) in places.items():
                owner.__dict__[name] = values[path]
            with recorder:
                result = layer(*args, **kwargs)
            self.reassigned = {
                path for path, (owner, name) in places.items() if owner._parameters.get(name) is not before[path]
            }
        self.returned = [t for t in tensors_in(result) if _differentiable(t)]
        self.outputs = [recorder.index(t) for t in self.returned if t.requires_grad]
        self.tensors, self.sources, self.overwritten = recorder.tensors, recorder.sources, recorder.overwritten
        self._leaves: dict[int, set[int]] = {}

    def depends(self, number: int, leaf: torch.Tensor) -> bool:
        """Whether the backward pass from a recorded tensor reaches `leaf`."""
        if number not in self._leaves:
            tensor = self.tensors[number]
            found, seen, stack = {id(tensor)}, set(), [tensor.grad_fn]
            while stack:
                node = stack.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    found.add(id(getattr(node, "variable", None)))
                    stack += [parent for parent, _ in node.next_functions]
            self._leaves[number] = found
        return id(leaf) in self._leaves[number]
