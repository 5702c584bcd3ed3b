"""The tensor that a layer finds in the place of its coefficient parameter. It answers torch's functions itself.

It is a subclass of torch.Tensor with A's shape, dtype and device. A view acts on the real A and on the names of its
axes. A contraction is computed in factorised form. Every other operation gets the exact dense A + Δ. Code that asks
for values past torch's functions (TorchScript, `torch.autograd.Function`, `torch.vmap` over the parameter) is refused,
and the layer is run again with A + Δ as a plain tensor.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from .axes import planned
from .cost import DENSE
from .operations import CONTRACTIONS, Contraction, Weight
from .places import running
from .plan import apply, dense_sum, plan_for
from .products import PRODUCTS, QUOTIENTS, SUMS, Product, by_number, is_number, summed
from .views import VIEWS


class PerformanceWarning(UserWarning):
    """The adapted coefficients are formed densely. The result is exact, but this costs more than the layer itself."""


class TensorNeeded(RuntimeError):
    """A stand-in was given to code that takes plain tensors only."""


class Call:
    """One forward pass of an adapted layer.

    Attributes:
        owner: the name of the layer's class, for warnings. With None there are no warnings.
        recorded: whether autograd records the pass.
        needs_tensor: whether the layer has code that takes plain tensors only.
        acted: whether the pass has computed something from the values of the coefficients. Reading their shape or
            taking a view does not count.
    """

    def __init__(self, layer: nn.Module, quiet: bool = False) -> None:
        self.owner = None if quiet else type(layer).__qualname__
        self.recorded = not quiet and torch.is_grad_enabled()
        self.needs_tensor = self.acted = False

    def refuse(self, what: str) -> TensorNeeded:
        self.needs_tensor = True
        return TensorNeeded(f"{what} takes plain tensors only, and was given the stand-in of adapted coefficients")


class Ones(NamedTuple):
    """Ones, in the place of a scale that A already contains. A product with them is the other factor."""

    tensor: torch.Tensor  # the scale, or a view of it


Meant = Weight | Product | Ones | torch.Tensor
_STANDING = (Weight, Product, Ones)


class StandIn(torch.Tensor):
    """A + Σ updates, or a view of it, in the place of a coefficient parameter; or ones in the place of its scale.

    It has no memory, so code that bypasses torch's functions finds no values. While a graph is compiled, it is a
    tensor on the meta device, which operations do not accept together with tensors of another device.
    """

    meant: tuple[Meant, Call] | None  # None: look up what the thread's running pass has at `place`
    place: tuple[nn.Module, str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return answer(func, args, kwargs or {})

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn(shape={tuple(self.shape)})"

    __hash__ = object.__hash__  # type: ignore[assignment]


class EagerStandIn(StandIn):
    """The stand-in while no graph is compiled."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        standin = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn))
        raise _meaning(standin)[1].refuse(f"`{func}`")


_NOT_YET = (*_STANDING, StandIn, tuple)  # results that hold no values of the coefficients


def stand_in(meant: Weight | Product | Ones, call: Call) -> StandIn:
    """The tensor that stands for coefficients, or for a scale, in one pass."""
    like = meant.tensor
    if torch.compiler.is_dynamo_compiling():
        standin = torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(StandIn)
    else:
        standin = _without_memory(
            EagerStandIn, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
    standin.meant = meant, call
    return standin


def handle_of(owner: nn.Module, name: str, like: torch.Tensor) -> StandIn:
    """The tensor that stands, in each thread, for what the thread's running pass has at a place."""
    handle = _without_memory(EagerStandIn, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device)
    handle.meant, handle.place = None, (owner, name)
    return handle


# torch's function for a tensor without memory. It has no public name.
_without_memory: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def _meaning(standin: StandIn) -> tuple[Meant, Call]:
    return standin.meant or running(*standin.place)


def answer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a torch function that is called with stand-ins among its arguments."""
    found = []
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, StandIn):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [leaf for leaf in tree_leaves(arg) if isinstance(leaf, StandIn)]
    first, handler = found[0], _HANDLERS.get(function)
    meant, call = _meaning(first)
    if handler is _told or not isinstance(meant, _STANDING):
        return _called(function, args, kwargs, _stored)
    if handler is _requires_grad:
        return _requires_grad(meant)
    if handler is _shown and (not args or args[0] is not first):
        return _called(function, args, kwargs, _stored)  # `x.view_as(weight)` reads only its shape
    if handler is None and writes(function, kwargs):
        raise TypeError(
            f"`{_name(function)}` would write to adapted coefficients, which are the sum of a parameter and its "
            "update and have no memory of their own: use the operation that returns a new tensor"
        )
    if call.recorded and not torch.is_grad_enabled() and _requires_grad(meant):
        if _runs_in(CheckpointFunction.forward):
            raise RuntimeError(
                f"a {call.owner} calls `checkpoint(use_reentrant=True)` in its own forward, so its adapter would get "
                "no gradients: checkpoint the adapted layer, or a larger part of the model, instead"
            )
        # The backward of a torch.autograd.Function would not know the factors.
        if _runs_in(torch.autograd.Function.apply.__func__):  # type: ignore[attr-defined]
            raise call.refuse(f"`{_name(function)}` without gradients")
    call.needs_tensor = False  # after a refusal, the layer has found another way
    result = NotImplemented
    if handler is not None and (len(found) == 1 or handler is _shown):
        result = handler(function, first, meant, args, kwargs)
    elif handler is _multiplied and len(found) == len(args) == 2:
        result = _by_ones(first, found[1])
    if not isinstance(result, _NOT_YET) and (len(found) > 1 or not isinstance(meant, Ones)):
        call.acted = True
        for other in found[1:]:  # they may stand for another tensor of the layer
            _meaning(other)[1].acted = True
    if result is NotImplemented:
        if isinstance(meant, Weight) or (isinstance(meant, Product) and not meant.has_batch):
            warn(_name(function), call.owner)
        return _called(function, args, kwargs, _dense)
    if isinstance(result, _STANDING):
        return stand_in(result, call)
    if type(result) is tuple:
        return tuple([stand_in(part, call) if isinstance(part, Weight) else part for part in result])
    return result


def _runs_in(function: Any) -> bool:
    """Whether a Python function is running in this thread."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


# Handlers, one for each kind of function. They return tensors, the meaning of new stand-ins, or NotImplemented.


def _told(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shape, dtype and device, which are those of A. `answer` does this without a call."""
    raise AssertionError("`answer` has answered already")


def _shown(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views and copies."""
    if isinstance(meant, Ones):
        return Ones(function(meant.tensor, *args[1:], **kwargs))
    if isinstance(meant, Product):
        return NotImplemented
    others = []
    for arg in args[1:]:  # only the shape of other stand-ins is read, as in `weight.expand_as(weight)`
        others.append(_stored(_meaning(arg)[0]) if isinstance(arg, StandIn) else arg)
    return VIEWS[function](function, meant, *others, **kwargs)


def _contracted(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Weight):
        return NotImplemented
    contraction = _with(standin, meant, CONTRACTIONS[function], args, kwargs)
    return _factorised(contraction, function, standin, meant, meant, args, kwargs)


def _multiplied(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Weight) or len(args) != 2 or kwargs:
        return NotImplemented
    other = args[1] if args[0] is standin else args[0]
    if is_number(other):
        return by_number(function, meant, other)
    for update in meant.updates:
        update.check_common()  # before the product is formed
    return Product.of(meant, other) if isinstance(other, torch.Tensor) else NotImplemented


def _divided(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Weight) or len(args) != 2 or kwargs or args[0] is not standin or not is_number(args[1]):
        return NotImplemented
    return by_number(function, meant, args[1])


def _summed(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Product):
        return NotImplemented
    contraction = _with(standin, meant, summed, args, kwargs)
    return _factorised(contraction, function, standin, meant, meant.weight, args, kwargs)


def _factorised(
    contraction: Contraction | None,
    function: Any,
    standin: StandIn,
    meant: Weight | Product,
    weight: Weight,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    plan = None if contraction is None else plan_for(contraction, weight)
    if contraction is None or plan is None:
        return NotImplemented
    if plan.order == DENSE:
        dense = dense_sum(meant, plan.dense) if isinstance(meant, Weight) else _dense(meant)
        return _with(standin, dense, function, args, kwargs)
    y = None if weight.is_zero else _with(standin, meant.tensor, function, args, kwargs)
    return apply(plan, contraction, weight, y)


def _by_ones(one: StandIn, other: StandIn) -> Any:
    """The product of adapted coefficients with a scale that they already contain: the coefficients themselves."""
    for weight, ones in ((one, other), (other, one)):
        (a, _), (b, _) = _meaning(weight), _meaning(ones)
        if isinstance(a, Weight) and isinstance(b, Ones):
            return weight if _is_broadcast(tuple(b.tensor.shape), tuple(a.tensor.shape)) else NotImplemented
    return NotImplemented


@planned
def _is_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape broadcasts to the other shape."""
    return len(shape) <= len(to) and all([a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)])


def _with(
    standin: StandIn, value: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of the function with `value` in place of the stand-in."""
    if args and not kwargs:
        if args[-1] is standin:
            return function(*args[:-1], value)
        if len(args) > 1 and args[1] is standin:
            return function(args[0], value, *args[2:])
    args, kwargs = tree_map_only(StandIn, lambda _: value, (args, kwargs))
    return function(*args, **kwargs)


def _called(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], put: Callable[[Meant], torch.Tensor]
) -> Any:
    """The result of the function with every stand-in replaced by `put` of its meaning, a plain tensor."""
    args, kwargs = tree_map_only(StandIn, lambda standin: put(_meaning(standin)[0]), (args, kwargs))
    return function(*args, **kwargs)


def _stored(meant: Meant) -> torch.Tensor:
    return meant if isinstance(meant, torch.Tensor) else meant.tensor


def _dense(meant: Meant) -> torch.Tensor:
    if isinstance(meant, Weight):
        return dense_sum(meant)
    if isinstance(meant, Ones):
        return torch.ones_like(meant.tensor)
    return meant.x * dense_sum(meant.weight) if isinstance(meant, Product) else meant


def _requires_grad(meant: Meant) -> bool:
    weight = meant.weight if isinstance(meant, Product) else meant
    tensors = [_stored(meant)]
    if isinstance(weight, Weight):
        tensors += [tensor for update in weight.updates for tensor in update.tucker.tensors()]
    return any([tensor.requires_grad for tensor in tensors])


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def writes(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes to one of its arguments."""
    name = _name(function)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or kwargs.get("out") is not None


_warned: set[tuple[str, str]] = set()


def warn(operation: str, owner: str | None, use: str | None = None) -> None:
    """Warn that A + Δ is formed, once for each class of layers and each operation or other `use`."""
    if owner is None or (operation, owner) in _warned or torch.compiler.is_compiling():
        return
    _warned.add((operation, owner))
    warnings.warn(
        f"{owner} {use or f'calls `{operation}` on its coefficients'}, for which there is no factorised form: "
        "A + Δ is formed. "
        "The result is exact, but a training step costs as much as full fine-tuning or more",
        PerformanceWarning,
        stacklevel=4,
    )


def _functions(names: str) -> list[Any]:
    """The functions of these names in torch and in torch.Tensor; for attributes, their getters."""
    found = [getattr(space, name) for name in names.split() for space in (torch, torch.Tensor) if hasattr(space, name)]
    return [function if callable(function) else function.__get__ for function in found]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        _functions(
            "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_leaf itemsize nbytes is_quantized "
            "is_nested is_mps is_xpu names grad grad_fn output_nr _version retains_grad "
            "size dim numel nelement ndimension element_size stride is_contiguous is_floating_point is_complex "
            "get_device is_signed is_same_size storage_offset __len__ "
            "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full"
        ),
        _told,
    ),
    **dict.fromkeys(_functions("requires_grad"), _requires_grad),
    **dict.fromkeys(VIEWS, _shown),
    **dict.fromkeys(CONTRACTIONS, _contracted),
    **dict.fromkeys(PRODUCTS, _multiplied),
    **dict.fromkeys(QUOTIENTS, _divided),
    **dict.fromkeys(SUMS, _summed),
}
