"""The object that a layer finds in its coefficient parameter's place, and that answers torch's functions itself.

It is no tensor: C++ code that meets it asks its `__torch_function__`. Views act on the real A and on the names of its
axes; contractions are answered in factorised form; everything else gets the exact dense A + Δ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .axes import NEW, Atom, Axes, Axis
from .contractions import CONTRACTIONS, Contraction
from .factorised import contract
from .updates import SampleAxisUnknown, Update
from .views import VIEWS


class PerformanceWarning(UserWarning):
    """The adapted coefficients are formed densely, which costs more than the layer itself; the result is exact."""


class StandIn:
    """A + Σ updates, or a view of it, in the place of a coefficient parameter.

    Attributes:
        tensor: A, or a view of it.
        axes: the names of its axes.
        updates: the active updates, of the whole parameter.
        owner: the layer's class, for warnings; None to give none.
        scale: of A's shape, to be multiplied onto `tensor` before anything else.
        recorded: whether autograd recorded operations where this, or what it is a view of, was made.
    """

    handlers: dict[Any, Callable[..., Any]]  # by torch function; each may return NotImplemented

    def __init__(
        self,
        tensor: torch.Tensor,
        axes: Axes,
        updates: Sequence[Update],
        owner: str | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        self.tensor = tensor
        self.axes = axes
        self.updates = updates
        self.owner = owner
        self.scale = scale
        self.recorded = torch.is_grad_enabled()

    def like(self, tensor: torch.Tensor, axes: Axes) -> StandIn:
        return type(self)(tensor, axes, self.updates, self.owner)

    def scaled(self) -> StandIn:
        """Itself with the scale multiplied onto the tensor; one expanded zero stays one."""
        if self.scale is None:
            return self
        return self.like(self.tensor if is_zero_expanded(self.tensor) else self.tensor * self.scale, self.axes)

    def dense(self) -> torch.Tensor:
        """A + Σ updates, lying in memory like A."""
        total = self.tensor
        for update in self.updates:
            if update.samples is not None:
                raise SampleAxisUnknown
            update = update.rows(self.axes).in_fp32
            total = total + self.axes.arrange(update.thin(()), {}).to(total.dtype)
        # A sum lies like its first term where that is transposed; the layer's operation then rounds as with A.
        return total.contiguous() if self.tensor.is_contiguous() else total

    @property
    def weight(self) -> StandIn:
        """The coefficients; `Product` has more than them."""
        return self

    @property
    def requires_grad(self) -> bool:
        factors = [factor for update in self.updates for factor in update.factors]
        return any(tensor.requires_grad for tensor in (self.tensor, *factors))

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def __repr__(self) -> str:
        return f"StandIn(shape={tuple(self.tensor.shape)}, updates={len(self.updates)})"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return answer(function, args, kwargs or {})


class Ones(StandIn):
    """In the place of a scale that A holds already: a product with it is the other factor."""

    @classmethod
    def like_tensor(cls, scale: torch.Tensor) -> Ones:
        axes = Axes(tuple(Axis((Atom(NEW, size, 0),)) for size in scale.shape), {})
        return cls(scale.new_ones(()).expand(scale.shape), axes, ())


def is_zero_expanded(tensor: torch.Tensor) -> bool:
    """Whether this is one zero expanded to a shape: the coefficients of a KAN that consists of its update alone."""
    if tensor.numel() <= 1 or any(tensor.stride()) or tensor.is_meta or torch.compiler.is_compiling():
        return False  # a compiled graph cannot depend on a value; it computes with the zeros
    return not bool(tensor[(0,) * tensor.dim()])


def answer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function returns that is called with stand-ins somewhere in its arguments."""
    found = _standins([args, kwargs])
    if any(standin.scale is not None for standin in found):
        args, kwargs = _mapped(StandIn.scaled, args), _mapped(StandIn.scaled, kwargs)
        found = _standins([args, kwargs])
    handler = found[0].handlers.get(function)
    unrecorded = found[0].recorded and not torch.is_grad_enabled() and found[0].requires_grad
    if unrecorded and handler is not _described and not _writes(function, kwargs):
        # In the forward of a `torch.autograd.Function`, whose backward would not know of the factors.
        raise RuntimeError(f"a StandIn was given to `{_name(function)}` without gradients")
    if handler is not None and (len(found) == 1 or handler in (_viewed, _described)):
        result = handler(function, found[0], args, kwargs)
        if result is not NotImplemented:
            for view in _standins([result]):
                view.recorded = found[0].recorded
            return result
    if len(found) == 2 and function in PRODUCTS and len(args) == 2:
        ones = isinstance(args[1], Ones)
        product, other = (args[0], args[1]) if ones else (args[1], args[0])
        if isinstance(other, Ones) and torch.broadcast_shapes(product.shape, other.shape) == product.shape:
            return product
    if _writes(function, kwargs):
        raise TypeError(
            f"`{_name(function)}` would write to adapted coefficients, which are a parameter and its update without "
            "memory of their own: use the operation that returns a new tensor"
        )
    warn(_name(function), found[0].owner)
    return function(*_mapped(_dense, args), **_mapped(_dense, kwargs))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def _writes(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = _name(function)
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or kwargs.get("out") is not None


def _viewed(function: Callable[..., Any], standin: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args:
        return NotImplemented
    # Other places, as in `x.view_as(weight)` and `x.to(weight)`, tell shape, dtype and device only.
    if args[0] is not standin:
        return _described(function, standin, args, kwargs)
    return VIEWS[function](function, standin, *_mapped(_stored, args[1:]), **_mapped(_stored, kwargs))


def _described(function: Callable[..., Any], standin: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions that ask for shape, dtype and device only."""
    return function(*_mapped(_stored, args), **_mapped(_stored, kwargs))


def _contracted(function: Callable[..., Any], standin: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    description = CONTRACTIONS[function](*args, **kwargs)
    return NotImplemented if description is None else factorised(description, function, standin, args, kwargs)


def factorised(
    description: Contraction,
    function: Callable[..., Any],
    standin: StandIn,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The result of a contraction, or NotImplemented."""

    def base() -> torch.Tensor:
        return function(*_mapped(_stored, args), **_mapped(_stored, kwargs))

    def dense() -> torch.Tensor:
        return function(*_mapped(_dense, args), **_mapped(_dense, kwargs))

    weight = standin.weight
    zero = is_zero_expanded(weight.tensor)
    result = contract(description, weight.axes, weight.updates, weight.dtype, None if zero else base, dense)
    return NotImplemented if result is None else result


def _dense(standin: StandIn) -> torch.Tensor:
    return standin.dense()


def _stored(standin: StandIn) -> torch.Tensor:
    return standin.tensor


PRODUCTS = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply)
PRODUCTS += (torch.Tensor.__mul__, torch.Tensor.__rmul__)
_DESCRIBED = "zeros_like ones_like empty_like full_like rand_like randn_like"
_DESCRIBED += " new_zeros new_ones new_empty new_full"
StandIn.handlers = {
    getattr(namespace, name): _described
    for name in _DESCRIBED.split()
    for namespace in (torch, torch.Tensor)
    if hasattr(namespace, name)
}
StandIn.handlers |= dict.fromkeys(VIEWS, _viewed) | dict.fromkeys(CONTRACTIONS, _contracted)


def _standins(tree: Any) -> list[StandIn]:
    """The stand-ins in nested lists, tuples and dictionaries."""
    if isinstance(tree, StandIn):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [standin for item in tree for standin in _standins(item)] if isinstance(tree, list | tuple) else []


def _mapped(put: Callable[[StandIn], Any], tree: Any) -> Any:
    """Nested lists, tuples and dictionaries with `put(standin)` in place of every stand-in."""
    if isinstance(tree, StandIn):
        return put(tree)
    if isinstance(tree, dict):
        return {key: _mapped(put, value) for key, value in tree.items()}
    return type(tree)([_mapped(put, item) for item in tree]) if type(tree) in (list, tuple) else tree


_warned: set[tuple[str, str]] = set()


def warn(operation: str, owner: str | None) -> None:
    if owner is None or (operation, owner) in _warned or torch.compiler.is_compiling():
        return
    _warned.add((operation, owner))
    warnings.warn(
        f"{owner} calls `{operation}` on its coefficients, for which there is no factorised form: A + Δ is formed. "
        "The result is exact, but a training step costs as much as full fine-tuning, or more",
        PerformanceWarning,
        stacklevel=4,
    )


# What a tensor tells about itself without being read.
_FACTS = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_leaf",
    "itemsize",
)
_FACTS += ("is_quantized", "is_nested", "is_mps", "is_xpu", "names")
_QUESTIONS = ("size", "dim", "numel", "nelement", "ndimension", "element_size", "stride", "is_contiguous")
_QUESTIONS += ("is_floating_point", "is_complex", "get_device")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_OPERATORS = tuple(f"__{side}{name}__" for name in _OPERATORS for side in ("", "r"))
_OPERATORS += ("__neg__", "__pos__", "__abs__", "__getitem__", "__setitem__", "__float__", "__bool__", "__array__")
_OPERATORS += ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")


def _give_tensor_interface() -> None:
    """The attributes and methods of `torch.Tensor`, each as a call of `answer`."""

    def fact(name: str) -> property:
        return property(lambda self: getattr(self.tensor, name))

    def question(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(self.tensor, name)(*args, **kwargs)

    def attribute(getter: Callable[[Any], Any]) -> property:
        return property(lambda self: answer(getter, (self,), {}))

    def method(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: answer(function, (self, *args), kwargs)

    for name in (*(name for name in dir(torch.Tensor) if not name.startswith("_")), *_OPERATORS):
        if name in vars(StandIn) or not hasattr(torch.Tensor, name):
            continue
        original = getattr(torch.Tensor, name)
        if name in _FACTS:
            value = fact(name)
        elif name in _QUESTIONS:
            value = question(name)
        elif callable(original):
            value = method(original)
        else:
            value = attribute(original.__get__)
        setattr(StandIn, name, value)
    StandIn.__hash__ = object.__hash__


_give_tensor_interface()
