"""What a second-order fit minimises: the loss, and residuals and derivatives of its quadratic model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map

from ..placement.sharded import check_not_sharded
from ..preserved import check_model
from .losses import ConvexLoss, Given, OutputLoss, checked_losses, described

Function = Callable[[Callable[..., Any], Any], Any]
Loss = str | OutputLoss

# Numbers that a chunk of per-sample gradients may hold, where `chunk_size` is not given: 256 MiB in fp32.
_CHUNK_NUMBERS = 2**26


class Evaluation(NamedTuple):
    """The loss at θ, and what the linear system needs of it besides derivatives by θ.

    Attributes:
        loss: the sum over all kinds.
        residuals: r, shape (R,).
        counts: by kind, how many samples its mean is taken over.
        fitted: how many numbers are to be fitted: residuals, labels, or outputs that have a target.
    """

    loss: float
    residuals: torch.Tensor
    counts: dict[str, int]
    fitted: int


class _Kind(NamedTuple):
    """A kind of residuals; `batch` has `size` rows, and `loss` is None for least squares."""

    name: str
    function: Function
    loss: ConvexLoss | None
    batch: Any
    size: int

    def chunks(self, rows: int) -> Iterator[tuple[Any, int]]:
        """Parts of the batch, and their numbers of rows."""
        leaves, spec = tree_flatten(self.batch)
        for chunk in zip(*(leaf.split(rows) for leaf in leaves), strict=True):
            yield spec.unflatten(chunk), len(chunk[0])


class _Answer(NamedTuple):
    """What a function gives for a batch under a loss: outputs in fp64, targets, and the weights of the samples."""

    outputs: torch.Tensor
    targets: Any
    weights: torch.Tensor

    def over_samples(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weights, so that they multiply a tensor with one entry or more for each sample."""
        return self.weights.view(-1, *[1] * (tensor.ndim - 1))


class Problem:
    """Loss, r and R with RᵀR = H/2 and Rᵀr = g/2, for the generalised Gauss–Newton matrix H and the gradient g.

    Of least squares r are the residuals and R is their Jacobian, both divided by √N. Under another loss there are rows
    √(w/2M) LᵀJ for each sample, with its weight w, the Jacobian J of its outputs, L Lᵀ = ∂²ℓ/∂o², and M samples.

    Raises:
        ValueError, TypeError: if nothing can be fitted.
    """

    def __init__(self, model: nn.Module, function: Any, loss: Any, chunk_size: int | None) -> None:
        check_model(model=model)
        check_not_sharded(
            model, "`model`", "fit it before it is sharded, or save the adapter and fit it in one process"
        )
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                "`model` has no trainable parameters: call `set_adapter` on a PEFT model, load with "
                "`is_trainable=True`, or set `requires_grad` of what is to be fitted"
            )
        _check_differentiable(model)
        # pykan reads some of its parameters in plain lists, where `functional_call` does not put others.
        names = {p: name for name, p in self.trained.items()}
        self.listed = [
            (entries, index, names[entry])
            for module in model.modules()
            for entries in vars(module).values()
            if type(entries) is list
            for index, entry in enumerate(entries)
            if isinstance(entry, nn.Parameter) and entry in names
        ]
        self.functions = function if isinstance(function, Mapping) else {"": function}
        if not self.functions or not all(map(callable, self.functions.values())):
            raise TypeError(
                f"`residual_fn` should be a function of (net, batch), or a mapping from names to such functions, but "
                f"the value passed is {function!r}"
            )
        self.several = isinstance(function, Mapping)
        self.losses = checked_losses(loss, list(self.functions))
        self.is_least_squares = not any(self.losses.values())
        # A sample has its own gradient of whatever the trained parameters are made into: a dense update, say.
        numbers = sum(p.numel() for p in model.parameters())
        self.chunk_size = lambda count: chunk_size or max(1, _CHUNK_NUMBERS // numbers // count)

    def parameters(self) -> torch.Tensor:
        """θ, in the widest dtype of its parts."""
        return torch.cat([p.detach().flatten() for p in self.trained.values()])

    def write(self, theta: torch.Tensor) -> None:
        with torch.no_grad():
            for name, value in self._named(theta).items():
                self.trained[name].copy_(value)

    def _named(self, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = theta.split([p.numel() for p in self.trained.values()])
        return {name: part.view_as(p).to(p) for (name, p), part in zip(self.trained.items(), parts, strict=True)}

    def _net(self, parameters: dict[str, torch.Tensor]) -> Callable[..., Any]:
        def net(*args: Any, **kwargs: Any) -> Any:
            try:
                for entries, index, name in self.listed:
                    entries[index] = parameters[name]
                return functional_call(self.model, parameters, args, kwargs)
            finally:
                for entries, index, name in self.listed:
                    entries[index] = self.trained[name]

        return net

    def _kinds(self, batch: Any, argument: str = "data") -> Iterator[_Kind]:
        if self.several and not (isinstance(batch, Mapping) and set(batch) == set(self.functions)):
            raise ValueError(
                f"`{argument}` should be a mapping with the keys of `residual_fn`, {sorted(self.functions)}, but it "
                f"is {sorted(batch) if isinstance(batch, Mapping) else type(batch)}"
            )
        for name, function in self.functions.items():
            part = batch[name] if self.several else batch
            leaves = tree_flatten(part)[0]
            shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            if not all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
                raise TypeError(
                    f"`{argument}{_at(name)}` should be made of tensors with a batch axis, but it has {shapes}"
                )
            rows = {len(leaf) for leaf in leaves}
            if len(rows) != 1 or rows == {0}:
                raise ValueError(
                    f"`{argument}{_at(name)}` should have one number of rows, above zero, but its shapes are {shapes}"
                )
            yield _Kind(name, function, self.losses[name], part, rows.pop())

    @torch.no_grad()
    def evaluate(self, theta: torch.Tensor, batch: Any, argument: str = "data") -> Evaluation:
        net = self._net(self._named(theta))
        squares, rows, others, fitted = [], [], 0.0, 0
        counts: dict[str, int] = {}
        for kind in self._kinds(batch, argument):
            name, loss = kind.name, kind.loss
            chunks = kind.chunks(self.chunk_size(1))
            if loss is None:
                values = torch.cat([_residuals(kind, kind.function(net, chunk), size) for chunk, size in chunks])
                counts[name] = kind.size
                rows.append(values.double().flatten() / math.sqrt(kind.size))
                squares.append(rows[-1])
                fitted += rows[-1].numel()
                continue
            answers = [_answer(kind, kind.function(net, chunk), size, loss) for chunk, size in chunks]
            counts[name] = sum(loss.counted(answer.outputs, answer.targets) for answer in answers)
            if not counts[name]:
                raise ValueError(f"every label in `{argument}{_at(name)}` is to be ignored: none is left to be fitted")
            for answer in answers:
                value, residual = (f(answer.outputs, answer.targets) for f in (loss.value, loss.residual))
                others += (answer.weights @ value).item() / counts[name]
                scale = (answer.over_samples(residual) / (2 * counts[name])).sqrt()
                rows.append((scale * residual).flatten())
                fitted += loss.fitted(answer.outputs, answer.targets, rows[-1])
        total = torch.cat(squares).square().sum().item() if squares else 0.0
        return Evaluation(total + others, torch.cat(rows), counts, fitted)

    def checked(self, theta: torch.Tensor, batch: Any, first: bool, argument: str = "data") -> Evaluation:
        """`evaluate`, which must be finite; at `first`, also what single samples give, which must be the same."""
        try:
            found = self.evaluate(theta, batch, argument)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError("`residual_fn` should take derivatives of `net` by `torch.func`") from error
        values, now = found.residuals, f"on `{argument}` and with the parameters that `model` has now"
        if not values.isfinite().all():
            raise ValueError(
                f"`residual_fn` should give finite residuals, but {(~values.isfinite()).sum().item()} of "
                f"{len(values)} are not, {now}"
            )
        if not math.isfinite(found.loss):
            raise ValueError(f"the loss should be finite but it is {found.loss}, {now}")
        if first:
            # Elsewhere, and not where a fresh adapter's core is zero: the residuals of a fitted model may be rounding
            # errors, which differ.
            net = self._net(self._named(1.1 * theta + 0.1 * theta.abs().mean()))
            for kind in self._kinds(batch, argument):
                kind = kind._replace(batch=tree_map(lambda leaf: leaf[:4], kind.batch))
                with torch.no_grad():
                    together = _first(kind, kind.function(net, kind.batch))
                    alone = torch.cat([_first(kind, kind.function(net, row)) for row, _ in kind.chunks(1)])
                if not torch.allclose(together, alone, rtol=1e-2, atol=1e-2 * together.abs().max().item()):
                    what = "residuals" if kind.loss is None else "outputs"
                    raise ValueError(
                        f"`residual_fn{_at(kind.name)}` should compute the {what} of a sample from this sample alone, "
                        f"but those of the first ones are {alone.flatten().tolist()}, and "
                        f"{together.flatten().tolist()} together: a batch mean? dropout?"
                    )
        return found

    def rows(self, theta: torch.Tensor, batch: Any, counts: dict[str, int]) -> Iterator[torch.Tensor]:
        """Blocks of rows of R, in the order of r, in the dtype of θ. shape: (rows, P)"""
        parameters = self._named(theta)
        for kind in self._kinds(batch):
            if kind.loss is None:
                yield from self._jacobian(kind, parameters)
            else:
                yield from self._times_factors(kind, kind.loss, parameters, counts[kind.name])

    def _of_sample(self, kind: _Kind, parameters: dict[str, torch.Tensor], sample: Any) -> torch.Tensor:
        answer = kind.function(self._net(parameters), tree_map(lambda leaf: leaf.unsqueeze(0), sample))
        return _first(kind, answer)

    def _jacobian(self, kind: _Kind, parameters: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        def of_sample(parameters: dict[str, torch.Tensor], sample: Any) -> torch.Tensor:
            return self._of_sample(kind, parameters, sample).flatten()

        with torch.no_grad():
            count = of_sample(parameters, tree_map(lambda leaf: leaf[0], kind.batch)).numel()
        # One residual is the common case, and a gradient is cheaper than a Jacobian of one row.
        rows_of = grad(lambda *args: of_sample(*args).sum()) if count == 1 else jacrev(of_sample)
        for chunk, size in kind.chunks(self.chunk_size(count)):
            rows = vmap(rows_of, in_dims=(None, 0))(parameters, chunk)
            columns = [rows[key].detach().reshape(size * count, -1) for key in parameters]
            yield torch.cat(columns, dim=1) / math.sqrt(kind.size)

    def _times_factors(
        self, kind: _Kind, loss: ConvexLoss, parameters: dict[str, torch.Tensor], count: int
    ) -> Iterator[torch.Tensor]:
        """A reverse pass for each column of L, none for J itself."""

        def of_sample(sample: Any, factor: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs, pull_back = vjp(lambda p: self._of_sample(kind, p, sample), parameters)[:2]
            blocks = factor.flatten(0, -3) if factor.ndim > 2 else factor.unsqueeze(0)
            eye = torch.eye(len(blocks), dtype=factor.dtype, device=factor.device)
            columns = torch.einsum("tkm,ts->tmsk", blocks, eye).reshape(-1, *outputs.shape)
            return vmap(pull_back)(columns.to(outputs.dtype))[0]

        with torch.no_grad():
            first = self._factors(kind, loss, parameters, *next(kind.chunks(1)), count)
        for chunk, size in kind.chunks(self.chunk_size(first.numel() // first.shape[-2])):
            with torch.no_grad():
                factors = self._factors(kind, loss, parameters, chunk, size, count)
            rows = vmap(of_sample)(chunk, factors)
            yield torch.cat([rows[key].detach().reshape(-1, p.numel()) for key, p in parameters.items()], dim=1)

    def _factors(
        self, kind: _Kind, loss: ConvexLoss, parameters: dict[str, torch.Tensor], chunk: Any, rows: int, count: int
    ) -> torch.Tensor:
        """√(w/2M) L. shape: (N, ..., k, m)"""
        answer = _answer(kind, kind.function(self._net(parameters), chunk), rows, loss)
        factor = loss.factor(answer.outputs, answer.targets)
        return answer.over_samples(factor).div(2 * count).sqrt() * factor

    def gradient(self, theta: torch.Tensor, batch: Any, counts: dict[str, int]) -> torch.Tensor | None:
        """What Rᵀr lacks of g/2: that of losses whose r is zero, in fp64; None if there are none. shape: (P,)"""
        parameters, parts = self._named(theta), []
        for kind in self._kinds(batch):
            if not isinstance(kind.loss, Given):
                continue
            for chunk, rows in kind.chunks(self.chunk_size(1)):
                with torch.no_grad():
                    answer = _answer(kind, kind.function(self._net(parameters), chunk), rows, kind.loss)
                    gradient = kind.loss.gradient(answer.outputs, answer.targets)
                    gradient = answer.over_samples(gradient) * gradient / (2 * counts[kind.name])

                def outputs(p: dict[str, torch.Tensor], kind: _Kind = kind, chunk: Any = chunk) -> torch.Tensor:
                    return _first(kind, kind.function(self._net(p), chunk))

                of_chunk, pull_back = vjp(outputs, parameters)[:2]
                (pulled,) = pull_back(gradient.to(of_chunk.dtype))
                parts.append(torch.cat([pulled[key].detach().flatten() for key in parameters]).double())
        return sum(parts[1:], parts[0]) if parts else None


def _first(kind: _Kind, answer: Any) -> torch.Tensor:
    """Residuals, or outputs."""
    return answer if kind.loss is None else answer[0]


def _residuals(kind: _Kind, values: Any, rows: int) -> torch.Tensor:
    _check_real(f"`residual_fn{_at(kind.name)}` should give", values)
    if values.ndim not in (1, 2) or len(values) != rows or not values.numel():
        raise ValueError(
            f"`residual_fn{_at(kind.name)}` should give the residuals of every sample, shape ({rows},) or ({rows}, k) "
            f"for a batch of {rows}, not their mean or sum, but it gave {tuple(values.shape)}"
        )
    return values


def _answer(kind: _Kind, given: Any, rows: int, loss: ConvexLoss) -> _Answer:
    should = f"`residual_fn{_at(kind.name)}` should give"
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise TypeError(
            f"{should} a pair, (outputs, targets), or (outputs, targets, weights), for a `loss` other than "
            f"'least_squares', but it gave {described(given)}"
        )
    outputs, targets, *weights = given
    _check_real(f"{should}, first in the pair,", outputs)
    if not outputs.ndim or len(outputs) != rows or not outputs.numel():
        raise ValueError(f"{should} outputs of {rows} samples, shape ({rows}, ...), but they are {described(outputs)}")
    if wrong := loss.check(outputs, targets):
        raise ValueError(f"{should} {wrong}")
    weight = weights[0] if weights else outputs.new_ones(rows)
    if not isinstance(weight, torch.Tensor) or weight.shape != (rows,):
        raise ValueError(f"{should} weights of shape ({rows},), one for each sample, but they are {described(weight)}")
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f"{should} weights of at least 0, but they go from {weight.min()} to {weight.max()}")
    return _Answer(outputs.double(), targets, weight.double())


def _check_real(should: str, values: Any) -> None:
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        got = f"one of {values.dtype}" if isinstance(values, torch.Tensor) else f"a {type(values).__qualname__}"
        raise TypeError(
            f"{should} a tensor of real floating-point numbers, made by torch from what `net` returns, but it gave "
            f"{got}"
        )


def _check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if a pass of the model writes to it, which torch.func does not differentiate."""
    for name, module in model.named_modules():
        active = isinstance(module, ParamWrapper) and set(module.active_adapters) & set(module.lora_A)
        if active and not module.disable_adapters and not module.merged:
            raise ValueError(
                f"`model` has LoRA on the parameter {module.parameter_name!r} of the layer {name} "
                "(`target_parameters`), which PEFT writes into the layer in every pass, and `torch.func` cannot "
                "differentiate that: name the layer in `target_modules` if it is an nn.Linear, take "
                "`LoTRAConfig(r=(None, r, None))`, which is LoRA of coefficients, or merge the adapter if it stays "
                "as it is"
            )


def _at(name: str) -> str:
    return f"[{name!r}]" if name else ""
