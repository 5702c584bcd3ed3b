"""The tensor that a layer finds in its coefficient parameter's place, and that answers torch's functions itself.

It is a subclass of torch.Tensor over the memory of A, so that it has A's shape, dtype and device for any code. Views
act on the real A and on the names of its axes; contractions are computed in factorised form; everything else gets the
exact dense A + Δ. What would reach A's plain values past torch's functions (TorchScript, `torch.autograd.Function`,
`torch.vmap` over the parameter) is refused, and the layer is run again with A + Δ as a plain tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .calls import running
from .operations import CONTRACTIONS, Contraction, Weight
from .plan import contract, dense_sum
from .products import PRODUCTS, QUOTIENTS, SUMS, Product, by_number, is_number, summed
from .update import SampleAxisUnknown
from .views import VIEWS


class PerformanceWarning(UserWarning):
    """The adapted coefficients are formed densely, which costs more than the layer itself; the result is exact."""


class TensorNeeded(RuntimeError):
    """Code that takes plain tensors only was given a stand-in."""


@dataclass
class Call:
    """One forward pass of an adapted layer.

    Attributes:
        owner: the layer's class, for warnings; None to give none.
        recorded: whether autograd records the pass.
        needs_tensor: whether code of the layer was found to take plain tensors only.
    """

    owner: str | None
    recorded: bool
    needs_tensor: bool = False

    def refuse(self, what: str) -> TensorNeeded:
        self.needs_tensor = True
        return TensorNeeded(f"{what} takes plain tensors only, and was given the stand-in of adapted coefficients")


@dataclass(frozen=True)
class Ones:
    """In the place of a scale that A holds already: a product with it is the other factor."""

    tensor: torch.Tensor


Meant = Weight | Product | Ones | torch.Tensor


class StandIn(torch.Tensor):
    """A + Σ updates, or a view of it, in the place of a coefficient parameter or of its scale."""

    meant: tuple[Meant, Call] | None  # None: what the thread's running pass has at `place`
    place: tuple[nn.Module, str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return answer(func, args, kwargs or {})

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    def __repr__(self, **_: Any) -> str:
        return f"StandIn(shape={tuple(self.shape)})"

    __hash__ = object.__hash__  # type: ignore[assignment]


class GuardedStandIn(StandIn):
    """The stand-in outside of graphs that are compiled, where what asks no torch function must not get A."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        standin = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn))
        raise _meaning(standin)[1].refuse(f"`{func}`")


def stand_in(meant: Weight | Product | Ones, call: Call) -> StandIn:
    """The tensor that stands for coefficients, or for a scale, in one pass."""
    kind = StandIn if torch.compiler.is_compiling() else GuardedStandIn
    standin = meant.tensor.detach().as_subclass(kind)
    standin.meant = meant, call
    return standin


def handle_of(owner: nn.Module, name: str, tensor: torch.Tensor) -> StandIn:
    """The tensor that stands for what the running pass of each thread has at a place."""
    handle = tensor.detach().as_subclass(GuardedStandIn)
    handle.meant, handle.place = None, (owner, name)
    return handle


def _meaning(standin: StandIn) -> tuple[Meant, Call]:
    return standin.meant or running(*standin.place)


def answer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function returns that is called with stand-ins somewhere in its arguments."""
    found = []
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, StandIn):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found += [leaf for leaf in tree_leaves(arg) if isinstance(leaf, StandIn)]
    first, handler = found[0], _HANDLERS.get(function)
    meant, call = _meaning(first)
    if handler is _told or not isinstance(meant, Weight | Product | Ones):
        return _called(function, args, kwargs, _stored)
    if function == _REQUIRES_GRAD:
        return _requires_grad(meant)
    if handler is _shown and (not args or args[0] is not first):
        return _called(function, args, kwargs, _stored)  # `x.view_as(weight)` wants its shape only
    if handler is None and not isinstance(meant, Ones) and _writes(function, kwargs):
        raise TypeError(
            f"`{_name(function)}` would write to adapted coefficients, which are a parameter and its update without "
            "memory of their own: use the operation that returns a new tensor"
        )
    if call.recorded and not torch.is_grad_enabled() and _requires_grad(meant):
        # In the forward of a `torch.autograd.Function`, whose backward would not know of the factors.
        raise call.refuse(f"`{_name(function)}` without gradients")
    result = NotImplemented
    if handler is not None and (len(found) == 1 or handler is _shown):
        result = handler(function, first, meant, args, kwargs)
    elif handler is _multiplied and len(found) == len(args) == 2:
        result = _by_ones(meant, _meaning(found[1])[0])
    if result is NotImplemented:
        if isinstance(meant, Weight) or (isinstance(meant, Product) and not meant.has_batch):
            warn(_name(function), call.owner)
        return _called(function, args, kwargs, _dense)
    if type(result) is tuple:
        return tuple([_wrapped(part, call) for part in result])
    return _wrapped(result, call)


def _wrapped(result: Any, call: Call) -> Any:
    return stand_in(result, call) if isinstance(result, Weight | Product | Ones) else result


# Handlers, each for a kind of functions: they return tensors, what further stand-ins stand for, or NotImplemented.


def _told(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shape, dtype and device, which A has too."""
    raise AssertionError("answered before")


def _shown(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views and copies."""
    if isinstance(meant, Ones):
        return Ones(function(meant.tensor, *args[1:], **kwargs))
    if isinstance(meant, Product):
        return NotImplemented
    # Other stand-ins, as in `weight.expand_as(weight)`, tell their shape only.
    others = [_stored(_meaning(arg)[0]) if isinstance(arg, StandIn) else arg for arg in args[1:]]
    return VIEWS[function](function, meant, *others, **kwargs)


def _contracted(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Weight):
        return NotImplemented
    named = {key: _put(standin, meant, (arg,))[0] for key, arg in kwargs.items()} if kwargs else kwargs
    contraction = CONTRACTIONS[function](*_put(standin, meant, args), **named)
    return _factorised(contraction, function, standin, meant, meant, args, kwargs)


def _multiplied(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Weight) or len(args) != 2 or kwargs:
        return NotImplemented
    other = args[1] if args[0] is standin else args[0]
    if is_number(other):
        return by_number(function, meant, other)
    for update in meant.updates:
        if update.weights is not None:
            raise SampleAxisUnknown  # before the product is formed
    return Product.of(meant, other) if isinstance(other, torch.Tensor) else NotImplemented


def _divided(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Weight) or len(args) != 2 or kwargs or args[0] is not standin or not is_number(args[1]):
        return NotImplemented
    return by_number(function, meant, args[1])


def _summed(function: Any, standin: StandIn, meant: Meant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(meant, Product):
        return NotImplemented
    contraction = summed(*_put(standin, meant, args), **kwargs)
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
    def called(value: torch.Tensor) -> torch.Tensor:
        named = {key: _put(standin, value, (arg,))[0] for key, arg in kwargs.items()} if kwargs else kwargs
        return function(*_put(standin, value, args), **named)

    if contraction is None:
        return NotImplemented
    result = contract(contraction, weight, lambda: called(meant.tensor), lambda: called(_dense(meant)))
    return NotImplemented if result is None else result


def _by_ones(one: Meant, other: Meant) -> Any:
    """The product of adapted coefficients with a scale that they hold already."""
    weight, ones = (one, other) if isinstance(other, Ones) else (other, one)
    if isinstance(weight, Weight) and isinstance(ones, Ones):
        if torch.broadcast_shapes(weight.tensor.shape, ones.tensor.shape) == weight.tensor.shape:
            return weight
    return NotImplemented


def _put(standin: StandIn, value: Any, args: Any) -> Any:
    """The arguments, in nested lists and tuples, with `value` in place of the stand-in."""
    put = []
    for arg in args:
        if arg is standin:
            put.append(value)
        else:
            put.append(type(arg)(_put(standin, value, arg)) if type(arg) in (list, tuple) else arg)
    return put


def _called(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], put: Callable[[Meant], torch.Tensor]
) -> Any:
    """The function of plain tensors: every stand-in is replaced by `put` of what it means."""
    args, kwargs = tree_map_only(StandIn, lambda standin: put(_meaning(standin)[0]), (args, kwargs))
    return function(*args, **kwargs)


def _stored(meant: Meant) -> torch.Tensor:
    return meant if isinstance(meant, torch.Tensor) else meant.tensor


def _dense(meant: Meant) -> torch.Tensor:
    if isinstance(meant, Weight):
        return dense_sum(meant)
    return meant.x * dense_sum(meant.weight) if isinstance(meant, Product) else _stored(meant)


def _requires_grad(meant: Meant) -> bool:
    weight = meant.weight if isinstance(meant, Product) else meant
    tensors = [_stored(meant)]
    if isinstance(weight, Weight):
        tensors += [factor for update in weight.updates for factor in update.factors]
    return any([tensor.requires_grad for tensor in tensors])


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def _writes(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = _name(function)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or kwargs.get("out") is not None


_warned: set[tuple[str, str]] = set()


def warn(operation: str, owner: str | None) -> None:
    """Say once for each class of layers and operation that A + Δ is formed."""
    if owner is None or (operation, owner) in _warned or torch.compiler.is_compiling():
        return
    _warned.add((operation, owner))
    warnings.warn(
        f"{owner} calls `{operation}` on its coefficients, for which there is no factorised form: A + Δ is formed. "
        "The result is exact, but a training step costs as much as full fine-tuning, or more",
        PerformanceWarning,
        stacklevel=4,
    )


def _functions(names: str) -> list[Any]:
    """Of torch and of torch.Tensor, attributes as their getters."""
    found = [getattr(space, name) for name in names.split() for space in (torch, torch.Tensor) if hasattr(space, name)]
    return [function if callable(function) else function.__get__ for function in found]


_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
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
    **dict.fromkeys(VIEWS, _shown),
    **dict.fromkeys(CONTRACTIONS, _contracted),
    **dict.fromkeys(PRODUCTS, _multiplied),
    **dict.fromkeys(QUOTIENTS, _divided),
    **dict.fromkeys(SUMS, _summed),
}
