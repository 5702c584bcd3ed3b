"""The tensor that a layer finds in the place of its coefficient parameter. It answers torch's functions itself.

It is a subclass of torch.Tensor with A's shape, dtype and device. A view acts on the real A and on the names of its
axes. A contraction is computed in factorised form. Every other operation gets the exact dense A + Δ. Code that asks
for values past torch's functions (TorchScript, `torch.autograd.Function`, `torch.vmap` over the parameter) is refused,
and the layer is run again with A + Δ as a plain tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..preserved import reached
from .axes import planned
from .operations import CONTRACTIONS, Contraction, Weight, functions
from .places import running
from .plan import Plan, apply, dense_sum, plan_for
from .products import PRODUCTS, QUOTIENTS, SUMS, Product, by_number, is_number, summed
from .views import VIEWS


class PerformanceWarning(UserWarning):
    """The adapted coefficients are formed densely. The result is exact, but this costs more than the layer itself."""


class TensorNeeded(RuntimeError):
    """A stand-in was given to code that takes plain tensors only; `in_function`: to a torch.autograd.Function."""

    def __init__(self, what: str, in_function: bool = False) -> None:
        super().__init__(f"{what} takes plain tensors only, and was given the stand-in of adapted coefficients")
        self.in_function = in_function


class Call:
    """One forward pass of an adapted layer.

    Attributes:
        owner: the name of the layer's class, for warnings. With None there are no warnings.
        recorded: whether autograd records the pass.
        acted: whether the pass has computed something from the values of the coefficients. Reading their shape or
            taking a view does not count.
        refusal: that of a stand-in, until another use of a stand-in shows that the layer has found another way.
    """

    refusal: TensorNeeded | None = None

    def __init__(self, layer: nn.Module, quiet: bool = False) -> None:
        self.owner = None if quiet else type(layer).__qualname__
        self.recorded = not quiet and torch.is_grad_enabled()
        self.acted = False


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
        """The result of a torch function that is called with stand-ins among its arguments."""
        kwargs = kwargs or {}
        found = _stand_ins(args, kwargs)
        meant, call = _meaning(found[0])
        handler, asked = _HANDLERS.get(func), Asked(func, args, kwargs, found[0], meant)
        # `x.view_as(weight)` reads only the shape of the weight.
        is_read = handler is _shown and (len(args) == 0 or args[0] is not found[0])
        if func in _TOLD or is_read or not isinstance(meant, _STANDING):
            return asked.of_tensors(_stored)
        if handler is _requires_grad:
            return _requires_grad(meant)
        if handler is None or (call.recorded and not torch.is_grad_enabled()):
            _check(asked, call)
        call.refusal = None
        result = NotImplemented
        if handler is not None and (len(found) == 1 or handler is _shown):
            result = handler(asked)
        elif handler is _multiplied and len(found) == len(args) == 2:
            result = _by_ones(*found)
        if not isinstance(result, _NOT_YET) and (len(found) > 1 or not isinstance(meant, Ones)):
            call.acted = True
            for other in found[1:]:  # they may stand for another tensor of the layer
                _meaning(other)[1].acted = True
        if result is NotImplemented:
            if isinstance(meant, Weight) or (isinstance(meant, Product) and not meant.has_batch):
                warn(_name(func), call.owner)
            return asked.of_tensors(_dense)
        if type(result) is tuple:
            return tuple([stand_in(part, call) if isinstance(part, Weight) else part for part in result])
        return stand_in(result, call) if isinstance(result, _STANDING) else result

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
        raise _refused(_meaning(standin)[1], TensorNeeded(f"`{func}`"))


_NOT_YET = (*_STANDING, StandIn, tuple)  # results that hold no values of the coefficients


# torch's function for a tensor without memory. It has no public name.
_without_memory: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def stand_in(meant: Weight | Product | Ones, call: Call) -> StandIn:
    """The tensor that stands for coefficients, or for a scale, in one pass."""
    like = meant.tensor
    if torch.compiler.is_dynamo_compiling():
        standin = torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(StandIn)
    else:
        kind = {"dtype": like.dtype, "device": like.device, "strides": like.stride()}
        standin = _without_memory(EagerStandIn, like.shape, **kind)
    standin.meant = meant, call
    return standin


def handle_of(owner: nn.Module, name: str, like: torch.Tensor) -> StandIn:
    """The tensor that stands, in each thread, for what the thread's running pass has at a place."""
    kind = {"dtype": like.dtype, "device": like.device, "strides": like.stride()}
    handle = _without_memory(EagerStandIn, like.shape, **kind)
    handle.meant, handle.place = None, (owner, name)
    return handle  # type: ignore[no-any-return]


def _meaning(standin: StandIn) -> tuple[Meant, Call]:
    return standin.meant or running(*standin.place)


class Asked(NamedTuple):
    """A torch function that is called with a stand-in among its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    standin: StandIn
    meant: Meant  # by the stand-in

    def about(self, value: Any, function: Callable[..., Any]) -> Any:
        """The result of `function` with `value` in place of the stand-in."""
        args, kwargs, standin = self.args, self.kwargs, self.standin
        if args and not kwargs:
            if args[-1] is standin:
                return function(*args[:-1], value)
            if len(args) > 1 and args[1] is standin:
                return function(args[0], value, *args[2:])
        args, kwargs = tree_map_only(StandIn, lambda _: value, (args, kwargs))
        return function(*args, **kwargs)

    def of_tensors(self, put: Callable[[Meant], torch.Tensor]) -> Any:
        """The result with every stand-in replaced by `put` of its meaning, a plain tensor."""
        args, kwargs = tree_map_only(StandIn, lambda one: put(_meaning(one)[0]), (self.args, self.kwargs))
        return self.function(*args, **kwargs)


def _stand_ins(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[StandIn]:
    found = []
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, StandIn):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [leaf for leaf in tree_leaves(arg) if isinstance(leaf, StandIn)]
    return found


def _check(asked: Asked, call: Call) -> None:
    """Raise TypeError if the function writes to coefficients, TensorNeeded if its gradients would lack the factors."""
    function, meant = asked.function, asked.meant
    if writes(function, asked.kwargs) and function not in _HANDLERS:
        raise TypeError(
            f"`{_name(function)}` would write to adapted coefficients, which are the sum of a parameter and its "
            "update and have no memory of their own: use the operation that returns a new tensor"
        )
    if call.recorded and not torch.is_grad_enabled() and _in_function() and _requires_grad(meant):
        raise _refused(call, TensorNeeded(f"`{_name(function)}` in a torch.autograd.Function", in_function=True))


def _refused(call: Call, refusal: TensorNeeded) -> TensorNeeded:
    """The refusal, which the call remembers, because TorchScript makes another exception of it."""
    call.refusal = refusal
    return refusal


def _in_function() -> bool:
    """Whether the forward of a torch.autograd.Function is running, whose backward would not know the factors.

    torch then disables forward-mode differentiation, too, which `torch.no_grad` does not.
    """
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())  # type: ignore[attr-defined]


def check_recorded(results: Any, coefficients: torch.Tensor, owner: str) -> None:
    """Raise RuntimeError if no result of a pass depends on the coefficients, A + Δ, in the eyes of autograd.

    `checkpoint(use_reentrant=True)` in the layer's own forward is a torch.autograd.Function that reads them unseen.
    """
    if coefficients.grad_fn is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    nodes: list[Any] = [leaf.grad_fn for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    if coefficients.grad_fn in reached(nodes):
        return
    raise RuntimeError(
        f"a {owner} calls `checkpoint(use_reentrant=True)` in its own forward, so its adapter would get no gradients: "
        "checkpoint the adapted layer, or a larger part of the model, instead"
    )


# Handlers, one for each kind of function. They return tensors, the meaning of new stand-ins, or NotImplemented.


def _shown(asked: Asked) -> Any:
    """Views and copies."""
    function, meant = asked.function, asked.meant
    if isinstance(meant, Ones):
        return Ones(function(meant.tensor, *asked.args[1:], **asked.kwargs))
    if isinstance(meant, Product):
        return NotImplemented
    others = []
    for arg in asked.args[1:]:  # only the shape of other stand-ins is read, as in `weight.expand_as(weight)`
        others.append(_stored(_meaning(arg)[0]) if isinstance(arg, StandIn) else arg)
    return VIEWS[function](function, meant, *others, **asked.kwargs)


def _contracted(asked: Asked) -> Any:
    weight, function = asked.meant, asked.function
    if not isinstance(weight, Weight):
        return NotImplemented
    contraction = asked.about(weight, CONTRACTIONS[function])
    weight, plan = _planned(weight, contraction)
    if contraction is None or plan is None:
        return NotImplemented
    if plan.dense:
        return asked.about(dense_sum(weight, plan.dense), function)
    y = None if weight.is_zero else asked.about(weight.tensor, function)
    return apply(plan, contraction, weight, y)


def _planned(weight: Weight, contraction: Contraction | None) -> tuple[Weight, Plan | None]:
    if contraction is not None and contraction.form.kept:  # stacks are for products of matrices
        weight = weight._replace(updates=tuple([one for update in weight.updates for one in update.members()]))
    return weight, None if contraction is None else plan_for(contraction, weight)


def _multiplied(asked: Asked) -> Any:
    meant, args = asked.meant, asked.args
    if not isinstance(meant, Weight) or len(args) != 2 or asked.kwargs:
        return NotImplemented
    other = args[1] if args[0] is asked.standin else args[0]
    if is_number(other):
        return by_number(asked.function, meant, other)
    for update in meant.updates:
        update.check_common()  # before the product is formed
    return Product(other * meant.tensor, meant, other) if isinstance(other, torch.Tensor) else NotImplemented


def _divided(asked: Asked) -> Any:
    is_by_number = len(asked.args) == 2 and not asked.kwargs and is_number(asked.args[1])
    return _multiplied(asked) if is_by_number and asked.args[0] is asked.standin else NotImplemented


def _summed(asked: Asked) -> Any:
    return asked.about(asked.meant, _sum) if isinstance(asked.meant, Product) else NotImplemented


def _sum(product: Product, dim: Any = None, keepdim: bool = False, **others: Any) -> Any:
    if dim is None or others:
        return NotImplemented
    dims = tuple(sorted([d % product.tensor.dim() for d in ((dim,) if isinstance(dim, int) else dim)]))
    weight, contraction = summed(product, dims)
    weight, plan = _planned(weight, contraction)
    if contraction is None or plan is None:
        return NotImplemented
    if plan.dense:
        return _dense(product).sum(dims, keepdim)
    y = apply(plan, contraction, weight, product.tensor.sum(dims))
    for d in dims if keepdim else ():
        y = y.unsqueeze(d)
    return y


def _by_ones(one: StandIn, other: StandIn) -> Any:
    """The product of adapted coefficients with a scale that they already contain: the coefficients themselves."""
    for weight, ones in ((one, other), (other, one)):
        (a, _), (b, _) = _meaning(weight), _meaning(ones)
        if isinstance(a, Weight) and isinstance(b, Ones):
            return weight if _is_broadcast(tuple(b.tensor.shape), tuple(a.tensor.shape)) else NotImplemented
    return NotImplemented


@planned
def _is_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all([a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)])


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
        stacklevel=3,
    )


_TOLD = set(
    functions(
        "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_leaf itemsize nbytes is_quantized "
        "is_nested is_mps is_xpu names grad grad_fn output_nr _version retains_grad "
        "size dim numel nelement ndimension element_size stride is_contiguous is_floating_point is_complex "
        "get_device is_signed is_same_size storage_offset __len__ "
        "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full"
    )
)  # shape, dtype and device are those of A
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(functions("requires_grad"), _requires_grad),
    **dict.fromkeys(VIEWS, _shown),
    **dict.fromkeys(CONTRACTIONS, _contracted),
    **dict.fromkeys(PRODUCTS, _multiplied),
    **dict.fromkeys(QUOTIENTS, _divided),
    **dict.fromkeys(SUMS, _summed),
}
