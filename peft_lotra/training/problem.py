"""The loss that a second-order fit minimises, and the residuals and derivatives of its quadratic model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..placement.sharded import check_not_sharded
from ..preserved import check_model
from .answers import Kind, Net, at, first_of, is_batches, weighted
from .checks import check_differentiable, check_functions, check_repeatable, followed
from .losses import CrossEntropy, Given, checked_losses
from .memory import Chunks
from .processes import Processes

_T = TypeVar("_T")
Parameters = dict[str, torch.Tensor]
# Σ w ℓ over some samples, r · √(number of all samples), shape (R,), and the number of these samples
Values = tuple[torch.Tensor, torch.Tensor, int]
OfOutputs = Callable[[Kind, Any, Callable[[Parameters], torch.Tensor]], torch.Tensor]


class Evaluation(NamedTuple):
    """The loss at θ on a batch, and the numbers that the linear system needs besides derivatives by θ.

    Attributes:
        loss: the sum over all kinds, in all processes.
        total: the loss with the prior.
        residuals: r of this process, shape (R,).
        kinds: the kinds of these residuals in their order, with how many belong to each; again for each of several
            batches.
        counts: over how many samples each kind's mean is taken, in all processes.
        beside: the values of the tensors that were read beside the loss.
    """

    theta: torch.Tensor
    batch: Any
    loss: float
    total: float
    residuals: torch.Tensor
    kinds: list[tuple[str, int]]
    counts: dict[str, int]
    beside: tuple[float, ...] = ()


class Problem:
    """Loss, r and R with RᵀR = H/2 and Rᵀr = g/2, for the generalised Gauss–Newton matrix H and the gradient g.

    For least squares, r are the residuals and R is their Jacobian, both divided by √N. For another loss with M
    samples, R has the rows √(w/M) FᵀJ of each sample, with the sample's weight w, the Jacobian J of its outputs, and
    2 F Fᵀ = ∂²ℓ/∂o².

    The arguments are those of `fit_gauss_newton`: `function` is its `residual_fn`, `across` its `across_processes`.
    With several processes, r and R are those of this process. `start` is θ₀ of the prior, which is θ at first.
    """

    def __init__(
        self, model: nn.Module, function: Any, loss: Any, weight_decay: float, max_memory: int, across: bool | None
    ) -> None:
        check_model(model=model)
        instead = "fit it before it is sharded, or save the adapter and fit it in one process"
        check_not_sharded(model, "`model`", instead)
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
        self.several = isinstance(function, Mapping)
        self.functions = function if isinstance(function, Mapping) else {"": function}
        if not self.functions or not all(map(callable, self.functions.values())):
            raise TypeError(
                f"`residual_fn` should be a function of (net, batch), or a mapping from names to such functions, but "
                f"the value passed is {function!r}"
            )
        self.losses = checked_losses(loss, list(self.functions))
        self.weight_decay, self.start = weight_decay, self.parameters()
        self.max_memory, self.chunks, self.processes = max_memory, Chunks(max_memory), Processes(across)
        self.processes.check_same(model)

    def parameters(self) -> torch.Tensor:
        """θ, in the widest dtype of its parts."""
        return torch.cat([p.detach().flatten() for p in self.trained.values()])

    @torch.no_grad()
    def write(self, theta: torch.Tensor) -> None:
        for name, value in self._named(theta).items():
            self.trained[name].copy_(value)

    def away(self, theta: torch.Tensor) -> torch.Tensor:
        """θ − θ₀ in fp64."""
        return theta.double() - self.start.double()

    def _named(self, theta: torch.Tensor) -> Parameters:
        parts = theta.split([p.numel() for p in self.trained.values()])
        return {name: part.view_as(p).to(p) for (name, p), part in zip(self.trained.items(), parts, strict=True)}

    def _net(self, parameters: Parameters) -> Net:
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
        if is_batches(batch):
            for part in batch:
                yield from self._kinds(part, argument)
            return
        if self.several and not (isinstance(batch, Mapping) and set(batch) == set(self.functions)):
            raise ValueError(
                f"`{argument}` should be a mapping with the keys of `residual_fn`, {sorted(self.functions)}, but it "
                f"{f'has the keys {sorted(batch)}' if isinstance(batch, Mapping) else f'is a {type(batch).__name__}'}"
            )
        for name, function in self.functions.items():
            part = batch[name] if self.several else batch
            leaves = tree_leaves(part)
            shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            if not all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
                arrays = any(hasattr(leaf, "__array__") and not isinstance(leaf, torch.Tensor) for leaf in leaves)
                cure = ": convert arrays by `torch.as_tensor`" if arrays else ""
                given = [leaf if isinstance(leaf, float | int | tuple) else type(leaf).__name__ for leaf in shapes]
                raise TypeError(
                    f"`{argument}{at(name)}` should be made of tensors with a batch axis, not {given}{cure}"
                )
            rows = {len(leaf) for leaf in leaves}
            if len(rows) != 1 or rows == {0}:
                raise ValueError(f"`{argument}{at(name)}` should have one number of rows, above zero, not {shapes}")
            yield Kind(name, function, self.losses[name], part, rows.pop())

    def _by_chunks(self, kind: Kind, what: str, of_chunk: Callable[[Any], _T]) -> Iterator[_T]:
        """`of_chunk` of each of the parts of the batch that there is room for. The room is measured at once."""
        rows = self.chunks.rows(f"{what} {kind.name}", kind.size, lambda rows: of_chunk(kind.first(rows)))
        return map(of_chunk, kind.chunks(rows))

    @torch.no_grad()
    def evaluate(
        self, theta: torch.Tensor, batch: Any, argument: str = "data", beside: tuple[torch.Tensor, ...] = ()
    ) -> Evaluation:
        found = self.processes.agreed(self._explained, theta, batch, argument)
        own = {name: sum(n for key, (_, _, n) in found if key == name) for name in self.functions}
        counts = dict(zip(own, map(int, self.processes.totals(own.values())), strict=True))
        for name, count in counts.items():
            if not count:
                raise ValueError(f"every label in `{argument}{at(name)}` is ignored: give labels to fit")
        here = torch.stack([total / counts[name] for name, (total, _, _) in found]).sum()
        prior = self.weight_decay * self.away(theta).square().sum() if self.weight_decay else torch.zeros_like(here)
        # All are read at once: each look at an accelerator waits for it.
        read = torch.stack([here, prior, *beside]).tolist()
        (loss,) = self.processes.totals(read[:1])
        kinds = [(name, len(roots)) for name, (_, roots, _) in found]
        residuals = _residuals(found, counts)
        return Evaluation(theta, batch, loss, loss + read[1], residuals, kinds, counts, tuple(read[2:]))

    def fitted(self, point: Evaluation) -> int:
        """How many numbers are to be fitted, in all processes: residuals, outputs that have a target, or labels."""
        own = [sum(n for key, n in point.kinds if key == name) for name in point.counts]
        numbers = dict(zip(point.counts, self.processes.totals(own), strict=True))
        for name, loss in self.losses.items():
            if isinstance(loss, CrossEntropy):  # P numbers separate about 2P labels (Cover, 1965, for two classes)
                numbers[name] = point.counts[name]
        return int(sum(numbers.values()))

    def _values(self, theta: torch.Tensor, batch: Any, argument: str) -> list[tuple[str, Values]]:
        net, found = self._net(self._named(theta)), []
        for kind in self._kinds(batch, argument):
            parts = self._by_chunks(kind, "values", partial(_values, kind, net))
            totals, roots, counted = zip(*parts, strict=True)
            found.append((kind.name, (torch.stack(totals).sum(), torch.cat(roots), sum(counted))))
        return found

    def _explained(self, theta: torch.Tensor, batch: Any, argument: str) -> list[tuple[str, Values]]:
        """`_values`, with an error that says what `residual_fn` lacks: autograd's recording, or one dtype."""
        try:
            return self._values(theta, batch, argument)
        except RuntimeError as error:
            comes_back = True
            with suppress(RuntimeError):
                self._values(theta, batch, argument)
                comes_back = False
            if not comes_back:
                raise
            with suppress(RuntimeError), torch.enable_grad():
                self._values(theta, batch, argument)
                raise ValueError("`residual_fn` should take derivatives of `net` with `torch.func`") from error
            leaves = tree_leaves(first_of(batch))
            given = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
            if given - {theta.dtype}:
                (dtype,) = list(given - {theta.dtype})[:1]
                raise ValueError(
                    f"`residual_fn` fails ({error}), and `{argument}` has tensors of {dtype} beside a model of "
                    f"{theta.dtype}: convert one of them, as by `x.to({theta.dtype})` or `model.to({dtype})`"
                ) from error
            raise

    def not_finite(self, found: Evaluation) -> str:
        """What is not finite at θ, or in which data, for an error or a warning."""
        parts = found.residuals.split([n for _, n in found.kinds])
        own = {name for (name, _), part in zip(found.kinds, parts, strict=True) if not part.isfinite().all()}
        lacking = self.processes.any(*[name in own for name in found.counts])
        named = [f"`data{at(name)}`" for name, lacks in zip(found.counts, lacking, strict=True) if lacks]
        if named:
            return f"the residuals of {' and of '.join(named)}"
        return "the derivatives of the residuals" if math.isfinite(found.total) else "the loss"

    def checked(self, theta: torch.Tensor, batch: Any, first: bool, argument: str = "data") -> Evaluation:
        """`evaluate`, checked: the result is finite. If `first`, samples alone also give the same as in a batch."""
        if first:
            check_repeatable(self.model)
        found = self.evaluate(theta, batch, argument)
        self.processes.agreed(self._check, found, first, argument)
        return found

    def _check(self, found: Evaluation, first: bool, argument: str) -> None:
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
            net = self._net(self._named(1.1 * found.theta + 0.1 * found.theta.abs().mean()))
            for kind in self._kinds(first_of(found.batch), argument):
                few = kind._replace(batch=kind.first(4))
                _check_separate(few, net)
                check_functions(few.outputs(net, tree_map_only(torch.Tensor, followed, few.batch)))
                if isinstance(kind.loss, Given):
                    kind.loss.check_gradient(*few.answer(net, few.batch)[:2])
            if is_batches(found.batch):
                again = _residuals(self._values(found.theta, found.batch, argument), found.counts)
                if not torch.equal(again, values):
                    raise ValueError(
                        f"`{argument}` should give the same batches whenever it is read, but the second reading gave "
                        "others: use a DataLoader with `shuffle=False` and without random transforms"
                    )

    def rows(self, point: Evaluation) -> Iterator[torch.Tensor]:
        """Blocks of rows of R, in the order of r, in fp64. shape: (rows, P)"""
        parameters = self._named(point.theta)

        def of_chunk(kind: Kind, chunk: Any) -> torch.Tensor:
            """√(1/M) FᵀJ, by a reverse pass for each column of F; J itself is not formed."""
            with torch.no_grad():
                factors = kind.factors(self._net(parameters), chunk)

            def of_sample(sample: Any, factor: torch.Tensor | None = None) -> Parameters:
                sample = tree_map(lambda leaf: leaf.unsqueeze(0), sample)
                outputs, pull_back = vjp(lambda p: kind.outputs(self._net(p), sample), parameters)[:2]
                factor = kind.loss.factor(outputs, None) if factor is None else factor
                blocks = factor.reshape(-1, *factor.shape[-2:])
                eye = torch.eye(len(blocks), dtype=blocks.dtype, device=blocks.device)
                columns = torch.einsum("tkm,ts->tmsk", blocks, eye).reshape(-1, *outputs.shape).to(outputs.dtype)
                # For one residual, a reverse pass without `vmap` is cheaper.
                return pull_back(columns[0])[0] if len(columns) == 1 else vmap(pull_back)(columns)[0]

            rows = _of_each_sample(of_sample, chunk, *([] if factors is None else [factors]))
            columns = [rows[name].detach().reshape(-1, p.numel()) for name, p in parameters.items()]
            return torch.cat(columns, dim=1).double().div_(math.sqrt(point.counts[kind.name]))

        def parts(batch: Any) -> Iterator[Iterator[torch.Tensor]]:
            return (self._by_chunks(kind, "rows", partial(of_chunk, kind)) for kind in self._kinds(batch))

        list(parts(first_of(point.batch)))  # all kinds are measured before the first block is made
        return chain.from_iterable(parts(point.batch))

    def product(self, point: Evaluation, vector: torch.Tensor) -> torch.Tensor:
        """RᵀR v by a forward and a reverse pass, without R, in fp64, with the rows of this process. shapes: (P,)"""
        parameters, tangents = self._named(point.theta), self._named(vector.to(point.theta))

        def of_outputs(kind: Kind, chunk: Any, outputs: Callable[[Parameters], torch.Tensor]) -> torch.Tensor:
            along = jvp(outputs, (parameters,), (tangents,))[1]
            factors = kind.factors(self._net(parameters), chunk)
            if factors is None:
                return along
            wide = along.double().reshape(*factors.shape[:-1], 1)
            return (factors @ (factors.mT @ wide)).reshape(along.shape)

        return self._pulled_back(point, "product", self._kinds(point.batch), of_outputs)

    def rest(self, point: Evaluation) -> torch.Tensor:
        """The part of g/2 that Rᵀr lacks: of the prior, and of losses whose r is zero; in fp64. shape: (P,)"""

        def of_outputs(kind: Kind, chunk: Any, outputs: Callable[[Parameters], torch.Tensor]) -> torch.Tensor:
            assert isinstance(kind.loss, Given)
            outputs_now, targets, weights = kind.answer(self._net(self._named(point.theta)), chunk)
            return weighted(weights / 2, kind.loss.gradient(outputs_now, targets))

        if any(isinstance(loss, Given) for loss in self.losses.values()):
            given = (kind for kind in self._kinds(point.batch) if isinstance(kind.loss, Given))
            found = self.processes.sum(self.processes.agreed(self._pulled_back, point, "gradient", given, of_outputs))
        else:
            found = torch.zeros_like(point.theta, dtype=torch.float64)
        return found + self.weight_decay * self.away(point.theta) if self.weight_decay else found

    def _pulled_back(self, point: Evaluation, what: str, kinds: Iterable[Kind], of_outputs: OfOutputs) -> torch.Tensor:
        """Σ (∂outputs/∂θ)ᵀ · `of_outputs` / M over all samples of this process, in fp64. shape: (P,)"""
        parameters = self._named(point.theta)
        total = torch.zeros_like(point.theta, dtype=torch.float64)

        def of_chunk(kind: Kind, chunk: Any) -> torch.Tensor:
            def outputs(p: Parameters) -> torch.Tensor:
                return kind.outputs(self._net(p), chunk)

            with torch.no_grad():
                cotangent = of_outputs(kind, chunk, outputs) / point.counts[kind.name]
            of_parameters, pull_back = vjp(outputs, parameters)[:2]
            (pulled,) = pull_back(cotangent.to(of_parameters.dtype))
            return torch.cat([pulled[name].detach().flatten() for name in parameters]).double()

        for kind in kinds:
            for pulled in self._by_chunks(kind, what, partial(of_chunk, kind)):
                total += pulled
        return total


def _residuals(found: list[tuple[str, Values]], counts: Mapping[str, int]) -> torch.Tensor:
    """r of all kinds and batches, from `Problem._values`. shape: (R,)"""
    return torch.cat([roots / math.sqrt(counts[name]) for name, (_, roots, _) in found])


def _values(kind: Kind, net: Net, part: Any) -> Values:
    outputs, targets, weights = kind.answer(net, part)
    roots = weighted(weights.sqrt(), kind.loss.residual(outputs, targets)).flatten()
    return weights @ kind.loss.value(outputs, targets), roots, kind.loss.counted(outputs, targets)


@torch.no_grad()
def _check_separate(kind: Kind, net: Net) -> None:
    together = kind.outputs(net, kind.batch)
    singles = [kind.outputs(net, row) for row in kind.chunks(1)]
    if singles[0].shape[1:] != together.shape[1:]:
        raise ValueError(
            f"`residual_fn{at(kind.name)}` gives {kind.noun} of the shape {tuple(together.shape)} for "
            f"{len(together)} samples and {tuple(singles[0].shape)} for one. A difference of the shapes (N, 1) and "
            "(N,) has the shape (N, N): give both the same axes, as by `y[:, None]`"
        )
    alone = torch.cat(singles)
    if not torch.allclose(together, alone, rtol=1e-2, atol=1e-2 * together.abs().max().item()):
        raise ValueError(
            f"`residual_fn{at(kind.name)}` should compute the {kind.noun} of a sample from this sample alone, but the "
            f"first samples give {alone.flatten().tolist()} one by one, and {together.flatten().tolist()} together: "
            "is there a batch mean, or dropout?"
        )


def _of_each_sample(function: Callable[..., Any], *arguments: Any) -> Any:
    """`vmap`, with an error that says what a forward pass may not do under it."""
    try:
        return vmap(function)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        function(*tree_map(lambda leaf: leaf[0], arguments))
        raise ValueError(  # a sample alone has not failed
            f"`torch.func.vmap`, which takes the Jacobian of each sample, fails ({error}). It needs a forward pass "
            "that does not branch on values of tensors. The mask of sdpa attention does so in models of transformers "
            'with padding: call `model.set_attn_implementation("eager")`'
        ) from error
