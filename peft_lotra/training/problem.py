"""The loss that a second-order fit minimises, and the residuals and derivatives of its quadratic model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map

from ..placement.sharded import check_not_sharded
from ..preserved import check_model
from .answers import Kind, answer_of, at, first_of, residuals_of
from .checks import check_differentiable
from .losses import ConvexLoss, Given, checked_losses
from .memory import Chunks
from .processes import Processes


class Evaluation(NamedTuple):
    """The loss at θ, and the numbers that the linear system needs besides derivatives by θ.

    Attributes:
        loss: the sum over all kinds, in all processes.
        residuals: r of this process, shape (R,).
        kinds: how many of these residuals belong to each kind, in their order.
        counts: over how many samples each kind's mean is taken, in all processes.
        fitted: how many numbers are to be fitted, in all processes: residuals, labels, or outputs that have a target.
    """

    loss: float
    residuals: torch.Tensor
    kinds: list[int]
    counts: dict[str, int]
    fitted: int


class _OfKind(NamedTuple):
    """The values of one kind in this process, before they are divided by the number of all samples.

    Attributes:
        total: Σ w ℓ.
        roots: r · √(number of all samples), shape (R,).
        counted: the number of samples in this process.
        fitted: see `Evaluation`.
    """

    total: float
    roots: torch.Tensor
    counted: int
    fitted: int


class Problem:
    """Loss, r and R with RᵀR = H/2 and Rᵀr = g/2, for the generalised Gauss–Newton matrix H and the gradient g.

    For least squares, r are the residuals and R is their Jacobian, both divided by √N. For another loss with M
    samples, R has the rows √(w/2M) LᵀJ of each sample, with the sample's weight w, the Jacobian J of its outputs, and
    L Lᵀ = ∂²ℓ/∂o².

    Args:
        model, function, loss: as for `fit_gauss_newton`, where `function` is called `residual_fn`.
        max_memory: the bytes that the fit may hold besides the model.
        across_processes: as for `fit_gauss_newton`. With several processes, r and R are those of this process.

    Raises:
        ValueError, TypeError: if nothing can be fitted.
    """

    def __init__(
        self, model: nn.Module, function: Any, loss: Any, max_memory: int, across_processes: bool | None
    ) -> None:
        check_model(model=model)
        check_not_sharded(
            model, "`model`", "fit it before it is sharded, or save the adapter and fit it in one process"
        )
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                "`model` has no trainable parameters: call `set_adapter` on a PEFT model, load with "
                "`is_trainable=True`, or set `requires_grad` of the parameters to fit"
            )
        check_differentiable(model)
        # pykan reads some of its parameters from plain lists, in which `functional_call` replaces nothing.
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
        self.max_memory, self.chunks, self.processes = max_memory, Chunks(max_memory), Processes(across_processes)
        self.processes.check_same(model)

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

    def _kinds(self, batch: Any, argument: str = "data") -> Iterator[Kind]:
        if self.several and not (isinstance(batch, Mapping) and set(batch) == set(self.functions)):
            raise ValueError(
                f"`{argument}` should be a mapping with the keys of `residual_fn`, {sorted(self.functions)}, but it "
                f"{f'has the keys {sorted(batch)}' if isinstance(batch, Mapping) else f'is a {type(batch).__name__}'}"
            )
        for name, function in self.functions.items():
            part = batch[name] if self.several else batch
            leaves = tree_flatten(part)[0]
            shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            if not all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
                raise TypeError(
                    f"`{argument}{at(name)}` should be made of tensors with a batch axis, but it has {shapes}"
                )
            rows = {len(leaf) for leaf in leaves}
            if len(rows) != 1 or rows == {0}:
                raise ValueError(
                    f"`{argument}{at(name)}` should have one number of rows, above zero, but its shapes are {shapes}"
                )
            yield Kind(name, function, self.losses[name], part, rows.pop())

    @torch.no_grad()
    def evaluate(self, theta: torch.Tensor, batch: Any, argument: str = "data") -> Evaluation:
        answers = self.processes.agreed(self._answers, theta, batch, argument)
        totals = self.processes.totals(answer.counted for answer in answers.values())
        counts = {name: int(total) for name, total in zip(answers, totals, strict=True)}
        if not all(totals):
            name = next(name for name, count in counts.items() if not count)
            raise ValueError(f"every label in `{argument}{at(name)}` is ignored: give labels to fit")
        rows, kinds, total = [], [], 0.0
        for name, answer in answers.items():
            rows.append(answer.roots / math.sqrt(counts[name]))
            kinds.append(len(rows[-1]))
            total += answer.total / counts[name]
        total, fitted = self.processes.totals([total, sum(answer.fitted for answer in answers.values())])
        return Evaluation(total, torch.cat(rows), kinds, counts, int(fitted))

    def _answers(self, theta: torch.Tensor, batch: Any, argument: str) -> dict[str, _OfKind]:
        net, found = self._net(self._named(theta)), {}
        for kind in self._kinds(batch, argument):

            def answered(part: Any, kind: Kind = kind) -> _OfKind:
                return _answered(kind, net, part)

            rows = self._rows_at_a_time(kind, "values", answered)
            parts = [answered(part) for part, _ in kind.chunks(rows)]
            found[kind.name] = _OfKind(
                sum(part.total for part in parts),
                torch.cat([part.roots for part in parts]),
                sum(part.counted for part in parts),
                sum(part.fitted for part in parts),
            )
        return found

    def _rows_at_a_time(self, kind: Kind, what: str, run: Callable[[Any], object]) -> int:
        """How many samples of a kind to take at a time. `run` does the computation for a part of the batch."""

        def measured(rows: int) -> None:
            run(tree_map(lambda leaf: leaf[:rows], kind.batch))

        return self.chunks.rows(f"{what} {kind.name}", kind.size, measured)

    def checked(self, theta: torch.Tensor, batch: Any, first: bool, argument: str = "data") -> Evaluation:
        """`evaluate`, checked: the result is finite. If `first`, samples alone also give the same as in a batch."""
        try:
            found = self.evaluate(theta, batch, argument)
        except RuntimeError as error:
            if not self._works_if_recorded(theta, batch, argument):
                raise
            raise ValueError("`residual_fn` should take derivatives of `net` with `torch.func`") from error
        self.processes.agreed(self._check, found, theta, batch, first, argument)
        return found

    def _works_if_recorded(self, theta: torch.Tensor, batch: Any, argument: str) -> bool:
        """Whether autograd's recording is all that `residual_fn` lacks, as `torch.autograd.grad` in it would."""
        try:
            with torch.enable_grad():
                self._answers(theta, batch, argument)
        except RuntimeError:
            return False
        return True

    def _check(self, found: Evaluation, theta: torch.Tensor, batch: Any, first: bool, argument: str) -> None:
        values, now = found.residuals, f"on `{argument}` and with the parameters that `model` has now"
        if not values.isfinite().all():
            raise ValueError(
                f"`residual_fn` should give finite residuals, but {(~values.isfinite()).sum().item()} of "
                f"{len(values)} are not, {now}"
            )
        if not math.isfinite(found.loss):
            raise ValueError(f"the loss should be finite but it is {found.loss}, {now}")
        if first:
            # Not at θ itself: the residuals of a fitted model may be rounding errors, which differ, and the core of a
            # fresh adapter is zero.
            net = self._net(self._named(1.1 * theta + 0.1 * theta.abs().mean()))
            for kind in self._kinds(batch, argument):
                kind = kind._replace(batch=tree_map(lambda leaf: leaf[:4], kind.batch))
                with torch.no_grad():
                    together = first_of(kind, kind.function(net, kind.batch))
                    alone = torch.cat([first_of(kind, kind.function(net, row)) for row, _ in kind.chunks(1)])
                if not torch.allclose(together, alone, rtol=1e-2, atol=1e-2 * together.abs().max().item()):
                    what = "residuals" if kind.loss is None else "outputs"
                    raise ValueError(
                        f"`residual_fn{at(kind.name)}` should compute the {what} of a sample from this sample alone, "
                        f"but the first samples give {alone.flatten().tolist()} one by one, and "
                        f"{together.flatten().tolist()} together: is there a batch mean, or dropout?"
                    )

    def rows(self, theta: torch.Tensor, batch: Any, counts: dict[str, int]) -> Iterator[torch.Tensor]:
        """Blocks of rows of R, in the order of r, in the dtype of θ. shape: (rows, P)"""
        parameters = self._named(theta)
        parts = []
        for kind in self._kinds(batch):
            if kind.loss is None:
                parts.append(self._jacobian(kind, parameters, counts[kind.name]))
            else:
                parts.append(self._times_factors(kind, kind.loss, parameters, counts[kind.name]))
        return chain.from_iterable(parts)

    def _of_sample(self, kind: Kind, parameters: dict[str, torch.Tensor], sample: Any) -> torch.Tensor:
        answer = kind.function(self._net(parameters), tree_map(lambda leaf: leaf.unsqueeze(0), sample))
        return first_of(kind, answer)

    def _jacobian(self, kind: Kind, parameters: dict[str, torch.Tensor], samples: int) -> Iterator[torch.Tensor]:
        def of_sample(parameters: dict[str, torch.Tensor], sample: Any) -> torch.Tensor:
            return self._of_sample(kind, parameters, sample).flatten()

        with torch.no_grad():
            count = of_sample(parameters, tree_map(lambda leaf: leaf[0], kind.batch)).numel()
        # For one residual, a gradient is cheaper than a Jacobian of one row.
        rows_of = grad(lambda *args: of_sample(*args).sum()) if count == 1 else jacrev(of_sample)

        def of_chunk(chunk: Any) -> torch.Tensor:
            rows = _of_each_sample(rows_of, (None, 0), parameters, chunk)
            columns = [rows[key].detach().reshape(rows[key].shape[0] * count, -1) for key in parameters]
            return torch.cat(columns, dim=1).div_(math.sqrt(samples))

        return self._by_chunks(kind, of_chunk)

    def _times_factors(
        self, kind: Kind, loss: ConvexLoss, parameters: dict[str, torch.Tensor], count: int
    ) -> Iterator[torch.Tensor]:
        """√(w/2M) LᵀJ, by a reverse pass for each column of L; J itself is not formed."""

        def of_sample(sample: Any, factor: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs, pull_back = vjp(lambda p: self._of_sample(kind, p, sample), parameters)[:2]
            blocks = factor.flatten(0, -3) if factor.ndim > 2 else factor.unsqueeze(0)
            eye = torch.eye(len(blocks), dtype=factor.dtype, device=factor.device)
            columns = torch.einsum("tkm,ts->tmsk", blocks, eye).reshape(-1, *outputs.shape)
            return vmap(pull_back)(columns.to(outputs.dtype))[0]

        def of_chunk(chunk: Any) -> torch.Tensor:
            with torch.no_grad():
                factors = self._factors(kind, loss, parameters, chunk, count)
            rows = _of_each_sample(of_sample, (0, 0), chunk, factors)
            return torch.cat([rows[key].detach().reshape(-1, p.numel()) for key, p in parameters.items()], dim=1)

        return self._by_chunks(kind, of_chunk)

    def _by_chunks(self, kind: Kind, of_chunk: Callable[[Any], torch.Tensor]) -> Iterator[torch.Tensor]:
        """`of_chunk` of every chunk. The solver copies each block to fp64, and this copy is measured, too."""
        rows = self._rows_at_a_time(kind, "rows", lambda part: of_chunk(part).to(torch.float64, copy=True))
        return (of_chunk(part) for part, _ in kind.chunks(rows))

    def product(self, theta: torch.Tensor, batch: Any, counts: dict[str, int], vector: torch.Tensor) -> torch.Tensor:
        """RᵀR v by a forward and a reverse pass, without R, in fp64, with the rows of this process. shapes: (P,)"""
        parameters, tangents = self._named(theta), self._named(vector.to(theta))
        total = torch.zeros_like(vector, dtype=torch.float64)
        for kind in self._kinds(batch):

            def of_chunk(chunk: Any, kind: Kind = kind) -> torch.Tensor:
                def outputs(p: dict[str, torch.Tensor]) -> torch.Tensor:
                    return first_of(kind, kind.function(self._net(p), chunk))

                with torch.no_grad():
                    along = jvp(outputs, (parameters,), (tangents,))[1]
                if kind.loss is None:
                    along = along / counts[kind.name]
                else:
                    with torch.no_grad():
                        factors = self._factors(kind, kind.loss, parameters, chunk, counts[kind.name])
                    wide = along.double().reshape(*factors.shape[:-1], 1)
                    along = (factors @ (factors.mT @ wide)).reshape(along.shape)
                return self._pulled(outputs, parameters, along)

            for chunk, _ in kind.chunks(self._rows_at_a_time(kind, "product", of_chunk)):
                total += of_chunk(chunk)
        return total

    def _factors(
        self, kind: Kind, loss: ConvexLoss, parameters: dict[str, torch.Tensor], chunk: Any, count: int
    ) -> torch.Tensor:
        """√(w/2M) L. shape: (N, ..., k, m)"""
        rows = len(tree_flatten(chunk)[0][0])
        answer = answer_of(kind, kind.function(self._net(parameters), chunk), rows, loss)
        factor = loss.factor(answer.outputs, answer.targets)
        return answer.over_samples(factor).div(2 * count).sqrt() * factor

    def gradient(self, theta: torch.Tensor, batch: Any, counts: dict[str, int]) -> torch.Tensor | None:
        """The part of g/2 that Rᵀr lacks, because r is zero for some losses; of all processes, in fp64. shape: (P,)"""
        parameters, total = self._named(theta), None
        for kind in self._kinds(batch):
            if not isinstance(kind.loss, Given):
                continue

            def of_chunk(chunk: Any, kind: Kind = kind, loss: Given = kind.loss) -> torch.Tensor:
                def outputs(p: dict[str, torch.Tensor]) -> torch.Tensor:
                    return first_of(kind, kind.function(self._net(p), chunk))

                with torch.no_grad():
                    given, rows = kind.function(self._net(parameters), chunk), len(tree_flatten(chunk)[0][0])
                    answer = answer_of(kind, given, rows, loss)
                    gradient = loss.gradient(answer.outputs, answer.targets)
                    gradient = answer.over_samples(gradient) * gradient / (2 * counts[kind.name])
                return self._pulled(outputs, parameters, gradient)

            rows = self._rows_at_a_time(kind, "gradient", of_chunk)
            for chunk, _ in kind.chunks(rows):
                pulled = of_chunk(chunk)
                total = pulled if total is None else total + pulled
        return None if total is None else self.processes.sum(total)

    @staticmethod
    def _pulled(
        outputs: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        parameters: dict[str, torch.Tensor],
        cotangent: torch.Tensor,
    ) -> torch.Tensor:
        """(∂outputs/∂θ)ᵀ · cotangent, in fp64. shape: (P,)"""
        of_outputs, pull_back = vjp(outputs, parameters)[:2]
        (pulled,) = pull_back(cotangent.detach().to(of_outputs.dtype))
        return torch.cat([pulled[key].detach().flatten() for key in parameters]).double()


def _answered(kind: Kind, net: Callable[..., Any], part: Any) -> _OfKind:
    given, rows, loss = kind.function(net, part), len(tree_flatten(part)[0][0]), kind.loss
    if loss is None:
        values = residuals_of(kind, given, rows).double().flatten()
        return _OfKind(values.square().sum().item(), values, rows, len(values))
    answer = answer_of(kind, given, rows, loss)
    value, residual = (f(answer.outputs, answer.targets) for f in (loss.value, loss.residual))
    roots = ((answer.over_samples(residual) / 2).sqrt() * residual).flatten()
    counted, fitted = loss.counted(answer.outputs, answer.targets), loss.fitted(answer.outputs, answer.targets, roots)
    return _OfKind((answer.weights @ value).item(), roots, counted, fitted)


def _of_each_sample(function: Callable[..., Any], in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """`vmap`, with an error that says what a forward pass may not do under it."""
    try:
        return vmap(function, in_dims)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        own = [dim is None for dim in in_dims]
        function(*[a if k else tree_map(lambda leaf: leaf[0], a) for a, k in zip(arguments, own, strict=True)])
        raise ValueError(  # a sample alone has not failed
            f"`torch.func.vmap`, which takes the Jacobian of each sample, fails ({error}). It needs a forward pass "
            "that does not branch on values of tensors. The mask of sdpa attention does so in models of transformers "
            'with padding: call `model.set_attn_implementation("eager")`'
        ) from error
