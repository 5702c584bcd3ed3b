"""Puts stand-ins, or tensors, where a layer looks for its coefficient parameter and its scale."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..coefficients.spec import CoefficientSpec, is_quantized_at, owner_of, shape_at
from ..placement.quantized import PLAIN, refuse_dense
from ..placement.sharded import any_sharded, full_shape, full_tensor
from ..tucker.decomposition import Tucker, tucker_shapes
from .axes import indexed, parameter_axes
from .operations import Weight
from .places import enter, held, leave, running
from .plan import dense_sum
from .tensor import Call, Ones, check_recorded, handle_of, stand_in
from .update import Update


def adapted_coefficients(layer: nn.Module, spec: CoefficientSpec, updates: Iterable[Update]) -> torch.Tensor:
    """parameter · scale + Σ updates, in the layout of the parameter. Sharded tensors are gathered first."""
    if spec.parts:
        return torch.stack([adapted_coefficients(layer, piece, own) for piece, own in _pieces(spec, updates)])
    check_dense(layer, spec)
    coefficients = full_tensor(_located(layer, spec.parameter)[2])
    if spec.scale is not None:
        coefficients = coefficients * spec.spread(full_tensor(_located(layer, spec.scale)[2]))
    return _sum(spec, coefficients, tuple(map(_gathered, updates)))


def check_dense(layer: nn.Module, spec: CoefficientSpec) -> None:
    """Raise RuntimeError if the layer's coefficients are quantized, so that A + Δ cannot be formed."""
    if is_quantized_at(layer, spec.parameter):
        raise refuse_dense(spec.parameter, owner_of(layer, spec.parameter)[0])


def dense_update(spec: CoefficientSpec, update: Update, shape: torch.Size) -> torch.Tensor:
    """The update of a parameter of this shape, in its layout. Sharded factors are gathered first.

    Raises:
        SampleAxisUnknown: if it differs from sample to sample.
    """
    update = _gathered(update)
    return _sum(spec, update.tucker.core.new_zeros(shape), (update,))


def _pieces(spec: CoefficientSpec, updates: Iterable[Update]) -> Iterator[tuple[CoefficientSpec, tuple[Update, ...]]]:
    """Each parameter of a stack with the updates of its basis function."""
    updates, step = tuple(updates), spec.layout.canonical_shape[2] // len(spec.pieces)
    for k, piece in enumerate(spec.pieces):
        rows = (None, None, range(k * step, (k + 1) * step))
        yield piece, tuple([update.shown(rows) for update in updates]) if spec.parts else updates


def _gathered(update: Update) -> Update:
    return update._replace(tucker=update.tucker.map(full_tensor))


def _sum(spec: CoefficientSpec, coefficients: torch.Tensor, updates: tuple[Update, ...]) -> torch.Tensor:
    if not updates:
        return coefficients
    flat = spec.layout.flat(coefficients)
    return dense_sum(Weight(flat, parameter_axes(spec, tuple(flat.shape)), updates)).reshape(coefficients.shape)


def adapted_rows(
    layer: nn.Module, spec: CoefficientSpec, updates: tuple[Update, ...]
) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """A + Σ updates, as paths of parameters and blocks of rows of their first axis, without a second copy of one."""
    if spec.parts:
        for piece, own in _pieces(spec, updates):
            yield from adapted_rows(layer, piece, own)
        return
    check_dense(layer, spec)
    if is_sharded(layer, spec, updates) or spec.layout.flattened:
        yield spec.parameter, slice(None), adapted_coefficients(layer, spec, updates)
        return
    parameter = _located(layer, spec.parameter)[2]
    scale = None if spec.scale is None else spec.spread(_located(layer, spec.scale)[2])
    axes = parameter_axes(spec, parameter.shape)
    first = axes.axes[0]
    block = math.prod([atom.size for atom in first.atoms[1:]])  # a row of the first mode on this axis
    step = max(len(parameter) // 16 // block, 1) * block
    for start in range(first.before, first.before + first.inner, step):
        stop = min(start + step, first.before + first.inner)
        part = parameter[start:stop] if scale is None else parameter[start:stop] * scale[start:stop]
        shown = indexed(axes, ((start, stop, None),))
        assert shown is not None  # whole rows of the first mode
        yield spec.parameter, slice(start, stop), dense_sum(Weight(part, shown, updates))


class Adapted(Call):
    """While this is entered, `layer` finds A + Σ updates where its coefficient parameter is, and ones as its scale.

    Without updates, the layer finds its own tensors in this thread, whatever it finds in other threads.

    Args:
        layer, spec: the layer, and where its coefficients are.
        updates: the updates to add.
        quiet: whether the dense sum may be formed without a warning, also where gradients are off.
    """

    def __init__(
        self, layer: nn.Module, spec: CoefficientSpec, updates: tuple[Update, ...], quiet: bool = False
    ) -> None:
        super().__init__(layer, quiet)
        self._meanings: Any = _meanings(layer, spec, updates)

    def __enter__(self) -> Adapted:
        if torch.compiler.is_dynamo_compiling():  # no other thread runs the layer meanwhile
            for owner, name, _, meant in self._meanings:
                if not isinstance(meant, torch.Tensor):
                    owner.__dict__[name] = stand_in(meant, self)
            return self
        places = []
        for owner, name, tensor, meant in self._meanings:
            is_tensor = isinstance(meant, torch.Tensor) or name == _OUTPUT
            handle = None if is_tensor else handle_of(owner, name, tensor)
            places.append((owner, name, (meant, self), handle))
        self._contexts: Any = enter(places)
        return self

    def __exit__(self, *_: Any) -> None:
        meanings, self._meanings = self._meanings, ()  # tensors in reference cycles are freed now
        if torch.compiler.is_dynamo_compiling():
            for owner, name, _, meant in meanings:
                if not isinstance(meant, torch.Tensor):
                    owner.__dict__.pop(name, None)
        else:
            contexts, self._contexts = self._contexts, ()
            leave(*contexts)


_OUTPUT = "output of its forward"  # a place that is no tensor
_hooking = threading.Lock()


def _beside(
    owner: nn.Module, spec: CoefficientSpec, updates: tuple[Update, ...]
) -> Iterable[tuple[nn.Module, str, torch.Tensor, Any]]:
    """The place of the update of a linear layer with a quantized weight, whose output `_add_update` changes."""
    with _hooking:  # two threads would add the update twice
        if _add_update not in owner._forward_hooks.values():
            owner.register_forward_hook(_add_update, with_kwargs=True)
    shape = shape_at(owner, "weight")
    nothing = updates[0].tucker.core.new_zeros(()).expand(shape)
    return ((owner, _OUTPUT, nothing, Weight(nothing, parameter_axes(spec, shape), updates, is_zero=True)),)


def _add_update(owner: nn.Module, args: Any, kwargs: Any, y: torch.Tensor) -> torch.Tensor:
    """y + x Δᵀ, where the running pass has a Δ for the layer. Without adapters, the hook changes nothing."""
    found = running(owner, _OUTPUT, optional=True)
    if found is None:
        return y
    meant, call = found
    x = next(iter((*args, *kwargs.values())))
    return y + F.linear(x.to(meant.tensor), stand_in(meant, call)).to(y)


def forget(layer: nn.Module, spec: CoefficientSpec) -> None:
    """Take back what passes have left on the layer."""
    hooks = owner_of(layer, spec.parameters[0])[0]._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _add_update]:
        del hooks[key]


def is_used(layer: nn.Module, spec: CoefficientSpec, args: Any, kwargs: Any) -> bool:
    """Whether a forward pass of the layer computes something from its coefficients; True for a layout with a star."""
    if spec.layout.flattened:
        return True
    parameter = _located(layer, spec.parameter)[2]
    shapes = tucker_shapes(spec.layout.canonical_shape, (1, 1, 1))
    nothing = Tucker.of({name: parameter.new_zeros(shape) for name, shape in shapes.items()})
    with Adapted(layer, spec, (Update(nothing, 1.0),), quiet=True) as adapted:
        layer(*args, **kwargs)
    return adapted.acted


def _meanings(
    layer: nn.Module, spec: CoefficientSpec, updates: tuple[Update, ...]
) -> Iterable[tuple[nn.Module, str, torch.Tensor, Any]]:
    """(owner, name, tensor, meaning) for coefficients and scale: their place, the tensor there, and what to find."""
    if spec.parts:
        return tuple([place for piece, own in _pieces(spec, updates) for place in _meanings(layer, piece, own)])
    owner, name, parameter = _located(layer, spec.parameter)
    if type(parameter).dequantize is not PLAIN or parameter.dtype.itemsize == 1:  # no calls: they take time
        return _beside(owner, spec, updates) if updates else ()
    coefficients: torch.Tensor = parameter
    others: tuple[Any, ...] = ()
    if spec.scale is not None:
        holder, path, scale = _located(layer, spec.scale)
        others = ((holder, path, scale, Ones(scale) if updates else scale),)
        if updates:
            coefficients = parameter * spec.spread(scale)
    meant = Weight(coefficients, parameter_axes(spec, parameter.shape), updates) if updates else parameter
    return (owner, name, parameter, meant), *others


@contextmanager
def replaced(layer: nn.Module, spec: CoefficientSpec, coefficients: torch.Tensor) -> Iterator[None]:
    """While this is entered, `layer` finds the tensor `coefficients` in place of its parameter, and ones as its scale.

    All threads see the tensor, so no other thread runs the layer meanwhile.
    """
    with ExitStack() as stack:
        for path, tensor in zip(spec.parameters, coefficients if spec.parts else [coefficients], strict=True):
            stack.enter_context(held(*_located(layer, path)[:2], tensor))
        if spec.scale is not None:
            owner, name, scale = _located(layer, spec.scale)
            ones = torch.ones(full_shape(scale), dtype=scale.dtype, device=scale.device)
            stack.enter_context(held(owner, name, ones))
        yield


def run_densely(
    layer: nn.Module, spec: CoefficientSpec, updates: tuple[Update, ...], run: Callable[[], Any], in_function: bool
) -> Any:
    """The result of `run`, a pass of the layer, in which it finds A + Σ updates as a plain tensor.

    Raises:
        RuntimeError: if the layer reads them `in_function`, and autograd does not know of it.
    """
    coefficients = adapted_coefficients(layer, spec, updates).contiguous()
    with replaced(layer, spec, coefficients):
        results = run()
    if in_function:
        check_recorded(results, coefficients, type(layer).__qualname__)
    return results


def is_sharded(layer: nn.Module, spec: CoefficientSpec, updates: Iterable[Update]) -> bool:
    """Whether coefficients or factors are in parts now: a method was called outside of forward, which gathers them."""
    tensors = [_located(layer, path)[2] for path in spec.paths]
    return any_sharded([*tensors, *[tensor for update in updates for tensor in update.tucker.tensors()]])


def _located(layer: nn.Module, path: str) -> tuple[nn.Module, str, torch.Tensor]:
    """The module that holds a tensor, the tensor's name there, and the tensor itself, even if a stand-in hides it.

    Raises:
        RuntimeError: if a wrapper (FSDP1, activation checkpointing) lies between, and only forwards the attribute. It
            would hide a stand-in from the layer, or run the layer again when the stand-in is gone.
    """
    owner = layer
    *modules, name = path.split(".")
    for module in modules:
        if module not in owner._modules and not hasattr(type(owner), module):
            raise _hidden(owner, path)
        owner = getattr(owner, module)
    # By indexing, because `get` does not tell ZeRO-3 that the parameter is needed.
    if name in owner._parameters and owner._parameters[name] is not None:
        return owner, name, owner._parameters[name]  # type: ignore[return-value]
    if name not in owner._buffers and name not in vars(owner) and not hasattr(type(owner), name):
        raise _hidden(owner, path)
    return owner, name, getattr(owner, name)


def _hidden(module: nn.Module, path: str) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__qualname__} stands between an adapter and the layer whose `{path}` it adapts: "
        "wrap the LoTRALayer instead, or a larger part of the model"
    )
