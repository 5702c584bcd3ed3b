"""Runs a layer with tensors in place of its parameters, and records the tensors that depend on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..coefficients.spec import owner_of
from ..preserved import parents, preserved, reached

Call = tuple[tuple, dict[str, Any]]  # the arguments that a module received


@dataclass
class Passes:
    """The numbers of forward and backward passes of layers."""

    forward: int = 0
    backward: int = 0


def tensors_in(thing: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, torch.Tensor)]


def is_numeric(tensor: torch.Tensor) -> bool:
    """Whether derivatives with respect to the tensor exist: it has entries, and they are real or complex floats."""
    return tensor.numel() > 0 and (tensor.is_floating_point() or tensor.is_complex())


def _leaf(node: Any) -> torch.Tensor | None:
    """The leaf to which a node of the backward pass accumulates the gradient."""
    return getattr(node, "variable", None)


class Run(TorchFunctionMode):
    """One run of a layer with `values` in place of parameters, in the owners' `__dict__`, as an adapter replaces them.

    It records each tensor that requires a gradient, in order of creation, and the recorded tensors that it used.

    Attributes:
        x: the leaf from which the varied input was made.
        returned: the numeric tensors that the layer returned.
        outputs: the numbers of the returned tensors that require a gradient.
        tensors: the recorded tensors; the varied input has the number 0.
        sources: the numbers of the tensors from which each was computed.
        overwritten: the numbers of the tensors that the layer changed in place later; `tensors` has copies of these.
        reassigned: the paths of the parameters that the layer assigned to.
    """

    _IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul")} | {"__setitem__"}

    def __init__(
        self,
        layer: nn.Module,
        call: Call,
        varied: torch.Tensor,
        x: torch.Tensor,
        values: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
    ):
        """`varied` is one of the tensors in `call`, and was made from the leaf `x`."""
        super().__init__()
        self.x = x
        self.tensors: list[torch.Tensor] = []
        self.sources: list[list[int]] = []
        self.overwritten: set[int] = set()
        self._index: dict[torch.Tensor, int] = {}  # by identity
        self._nodes: dict[Any, int] = {}  # by the tensor's node in the autograd graph
        self._leaves: dict[int, set[torch.Tensor | None]] = {}
        places = [(path, *owner_of(layer, path)) for path in values]
        before = {path: owner._parameters[name] for path, owner, name in places}
        self._number(varied)
        args, kwargs = call
        with preserved(layer, training=False, dtype=dtype), torch.enable_grad():
            for p in filter(is_numeric, layer.parameters()):
                p.requires_grad_(True)  # records whether the layer uses the parameter itself
            for path, owner, name in places:
                owner.__dict__[name] = values[path]
            with self:
                result = layer(*args, **kwargs)
            self.reassigned = {path for path, owner, name in places if owner._parameters.get(name) is not before[path]}
        self.returned = list(filter(is_numeric, tensors_in(result)))
        self.outputs = [self._number(t) for t in self.returned if t.requires_grad]

    def _number(self, tensor: torch.Tensor, sources: list[int] | None = None) -> int:
        """The number of `tensor`. If `sources` is given, it gets a new number."""
        if sources is not None or tensor not in self._index:
            self._index[tensor] = len(self.tensors)
            self.tensors.append(tensor)
            # Scripted functions and autograd.Function create tensors that are not recorded.
            self.sources.append(self._nearest(tensor) if sources is None else sources)
            self._nodes.setdefault(tensor.grad_fn, self._index[tensor])
        return self._index[tensor]

    def _nearest(self, tensor: torch.Tensor) -> list[int]:
        """The numbers of the recorded tensors that the backward pass from `tensor` meets first."""

        def number(node: Any) -> int | None:
            leaf = _leaf(node)
            return self._nodes.get(node) if leaf is None else self._index.get(leaf)

        nodes = reached([tensor.grad_fn], lambda node: parents(node) if number(node) is None else [])
        return sorted({k for k in map(number, nodes) if k is not None})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sources = [self._number(t) for t in tensors_in((args, kwargs)) if t.requires_grad]
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
                self._number(tensor, sources)
        return result

    @property
    def trace(self) -> tuple:
        """The shapes and sources of all recorded tensors. Layers that take the same steps have the same trace."""
        return tuple(t.shape for t in self.tensors), tuple(map(tuple, self.sources))

    def depends(self, number: int, leaf: torch.Tensor) -> bool:
        """Whether the backward pass from a recorded tensor reaches `leaf`."""
        if number not in self._leaves:
            tensor = self.tensors[number]
            self._leaves[number] = {tensor, *map(_leaf, reached([tensor.grad_fn]))}
        return leaf in self._leaves[number]

    def moves(self, number: int) -> bool:
        """Whether a recorded tensor depends on x."""
        return self.depends(number, self.x)

    def ancestors(self, numbers: Iterable[int], without: Collection[int] = ()) -> set[int]:
        """These numbers, and the numbers of all tensors from which these tensors are computed."""
        return reached(
            (k for k in numbers if k not in without), lambda k: (s for s in self.sources[k] if s not in without)
        )
