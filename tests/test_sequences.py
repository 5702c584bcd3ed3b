"""Random sequences of what a program does with adapters; after each step a dense oracle says what the model computes.

The oracle holds the base's coefficients, each adapter's tensors by their names in the state dict, what is active,
merged and disabled, and the tasks around. It adds the updates of each sample by an einsum, and has its own formulas of
the network. It also says which steps are refused. A refused step changes nothing.
"""

import asyncio
import copy
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import assert_equal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kan_layers import ChebyKANLayer, FastKANLayer
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig, adapter_at, at_task

BASE, SAMPLES = "__base__", 4
# Before torch 2.8, a checkpoint cannot be told its context.
TOLD = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
WIDTHS = {"first": (3, 4), "second": (4, 2)}
KINDS: dict[str, dict[str, Any]] = {
    "both": {"r": 2, "alpha": 0.7},
    "first": {"r": 1, "target_modules": ["first"]},
    "second": {"r": (2, 1, 2), "target_modules": ["second"], "alpha": 1.5},
    "whole modes": {"r": (None, 2, None)},
    "lam": {"r": 2, "family": {"lam": (1.0, 1.6)}, "family_degree": 2, "alpha": 1.3},
    "lam in second": {"r": 1, "family": {"lam": (0.5, 2.0)}, "family_degree": 1, "target_modules": ["second"]},
    "task": {"r": 2, "family": ["x", "y", "z"]},
    "codes": {"r": 2, "family": ["x", "y", "z"], "family_code": 1, "alpha": 0.9},
}


class Net(nn.Module):
    """Two layers of 3 basis functions; the samples are first, and with FastKAN also another axis may have them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        for name, (n, m) in WIDTHS.items():
            layer = ChebyKANLayer(n, m, 2) if kind == "ChebyKAN" else FastKANLayer(n, m, 3, use_layernorm=False)
            self.add_module(name, layer)

    def forward(self, x):
        return self.second(self.first(x))


# The oracle ----------------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """The model refuses this step, says the oracle."""


# T_0, T_1, T_2 in powers, a column each
POWERS = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)


def polynomials(x: torch.Tensor, degree: int = 2) -> torch.Tensor:
    return torch.stack([x**0, x, x**2], -1) @ POWERS[:, : degree + 1]


def weights(kind: str, task: Mapping[str, Any], codes: torch.Tensor | None = None) -> torch.Tensor | None:
    """c, shape (P,) or (samples, P), for a kind of adapter; None if it is not for such tasks."""
    config, ((parameter, value),) = KINDS.get(kind, {}), task.items()
    match config.get("family"), parameter:
        case {"lam": (a, b)}, "lam":
            x = torch.as_tensor(value, dtype=torch.float64)
            return polynomials((2 * x - a - b) / (b - a), config["family_degree"])
        case [*names], "task":
            rows = torch.eye(len(names)) if codes is None else torch.cat([torch.ones(len(names), 1), codes], 1)
            return rows[names.index(value)] if isinstance(value, str) else rows[[names.index(v) for v in value]]
    return None


@dataclass(eq=False)
class Adapter:
    """`kind` is one of KINDS, or "ordinary"; `tensors` are by layer, and by name in the state dict."""

    kind: str
    alpha: float
    scale: float
    tensors: dict[str, dict[str, torch.Tensor]]

    @property
    def is_family(self) -> bool:
        return "family" in KINDS.get(self.kind, {})

    @property
    def codes(self) -> torch.Tensor | None:
        """Those of all tasks, shape (tasks, k), which one layer has for all."""
        return next((held["lotra_codes"] for held in self.tensors.values() if "lotra_codes" in held), None)

    def update(self, layer: str, c: torch.Tensor) -> torch.Tensor:
        """Δ for each row of c, shape (rows, n, m, basis)."""
        core = self.tensors[layer]["lotra_core"]
        core = core if self.is_family else core[..., None]
        sides = [self.tensors[layer].get(f"lotra_U{k + 1}", torch.eye(core.shape[k])) for k in range(3)]
        return self.scale * torch.einsum("abcp,ia,ob,dc,np->niod", core, *sides, c)


class Task(NamedTuple):
    """A task that was entered: the axis of samples, the kinds of the adapters that it is for, the adapted layers."""

    task: Mapping[str, Any]
    axis: int
    adapters: Mapping[str, str]
    layers: frozenset[str]


class Call(NamedTuple):
    """What a call says: names of samples, tasks around it, the innermost last, and one as an argument."""

    names: list[str] | None = None
    around: Sequence[Mapping[str, Any]] = ()
    own: Mapping[str, Any] | None = None
    axis: int = 0

    def on_new_leaves(self) -> tuple["Call", list[torch.Tensor]]:
        """The call with new tensors in place of numbers of samples, and these tensors."""
        leaves = []

        def new(task):
            if not isinstance(task.get("lam"), tuple):
                return task
            leaves.append(torch.tensor(task["lam"], requires_grad=True))
            return {"lam": leaves[-1]}

        return self._replace(around=[new(task) for task in self.around], own=self.own and new(self.own)), leaves


@dataclass(eq=False)
class Oracle:
    """`base` is by layer, shape (n, m, basis); `rest` has FastKAN's other branch; `sign` is -1 after a write to merged
    coefficients; `primary` is the adapter that PeftModel, not the tuner, has as its active one.
    """

    kind: str
    base: dict[str, torch.Tensor]
    rest: dict[str, tuple[torch.Tensor, torch.Tensor]]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {layer: {} for layer in WIDTHS})
    sign: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WIDTHS, 1))
    adapted: set[str] = field(default_factory=set)
    tasks: list[Task] = field(default_factory=list)
    primary: str | None = None
    disabled: bool = False
    training: bool = False

    def tensors(self) -> dict[tuple[str, str, str], torch.Tensor]:
        """The tensors of adapters by adapter, layer and name."""
        layers = {(name, layer): held for name, own in self.adapters.items() for layer, held in own.tensors.items()}
        return {(*key, name): tensor for key, held in layers.items() for name, tensor in held.items()}

    def held(self, layer: str) -> torch.Tensor:
        """The coefficients of the base layer, with what is merged into them."""
        return self.sign[layer] * sum(self.merged[layer].values(), self.base[layer])

    def used(self, layer: str) -> list[str]:
        return [n for n in self.active if layer in self.adapters[n].tensors and n not in self.merged[layer]]

    def entered(self, task: Mapping[str, Any], axis: int, names: Sequence[str] | None, argument: bool) -> Task:
        """A task around calls, or as the argument of a call with these names."""
        meant = self.adapters if not argument else self.active if names is None else names
        fits = {n: self.adapters[n].kind for n in meant if n in self.adapters}
        fits = {n: kind for n, kind in fits.items() if weights(kind, task) is not None}
        used = {n for layer in WIDTHS for n in self.used(layer)}
        if not fits or (names is None and not used & fits.keys()):
            raise RefusedError("a task of nothing that is in use")
        return Task(task, axis, fits, frozenset(self.adapted))

    def c(self, name: str, layer: str, tasks: Sequence[Task]) -> tuple[torch.Tensor, int | None]:
        """c, and the axis of samples if it has a row for each."""
        adapter = self.adapters[name]
        if not adapter.is_family:
            return torch.ones(1), None
        for task, axis, adapters, layers in reversed(tasks):
            if layer in layers and adapters.get(name) == adapter.kind:
                c = weights(adapter.kind, task, adapter.codes)
                return c, axis if c.dim() == 2 else None
        raise RefusedError(f"a family at no task in {layer}")

    def output(self, x: torch.Tensor, call: Call, tasks: Sequence[Task]) -> torch.Tensor:
        self.need(*filter(None, [self.primary]))  # PeftModel looks at its config in every call
        names, tasks = call.names, [*tasks, *(self.entered(task, call.axis, None, False) for task in call.around)]
        if names is not None and (self.training or not {*names} <= {*self.adapters, BASE}):
            raise RefusedError("names in training mode, or that nobody has")
        if call.own is not None:
            tasks.append(self.entered(call.own, call.axis, names, True))
        if self.disabled:
            self.unmerge()
            names = None
        for layer in WIDTHS:
            updates, samples = {}, set()
            if names is not None and self.merged[layer]:
                raise RefusedError("names while adapters are merged")
            if names is not None and layer in self.adapted:
                samples.add((call.axis, len(names)))
            used = [] if self.disabled else self.used(layer) if names is None else dict.fromkeys(names)
            for name in used:
                if name != BASE and layer in self.adapters[name].tensors:
                    updates[name], axis = self.c(name, layer, tasks)
                    samples |= {(axis, len(updates[name]))} if axis is not None else set()
            if len(samples) > 1 or any(count != SAMPLES for _, count in samples):
                raise RefusedError("samples on two axes, or another number of samples")
            axis = samples.pop()[0] if samples else 0
            A = self.held(layer)[None]
            for name, c in updates.items():
                shown = torch.ones(1, 1) if names is None else torch.tensor([[float(n == name)] for n in names])
                A = A + self.adapters[name].update(layer, shown * c)
            x = self.layer(layer, x.movedim(axis, 0), A.expand(SAMPLES, -1, -1, -1)).movedim(0, axis)
        return x

    def layer(self, name: str, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """x, shape (samples, …, n), and A, shape (samples, n, m, basis)."""
        if self.kind == "ChebyKAN":
            return torch.einsum("n...id,niod->n...o", polynomials(torch.tanh(x)), A)
        basis = torch.exp(-(((x[..., None] - torch.tensor([-2.0, 0.0, 2.0])) / 2) ** 2))
        weight, bias = self.rest[name]
        return torch.einsum("n...id,niod->n...o", basis, A) + (x * torch.sigmoid(x)) @ weight.T + bias

    def can_unmerge(self) -> None:
        if min(self.sign.values()) < 0:
            raise RefusedError("merged coefficients have been written to")

    def unmerge(self) -> None:
        self.can_unmerge()
        self.merged = {layer: {} for layer in WIDTHS}

    def merge(self, names: Sequence[str]) -> None:
        self.need(*names)
        self.can_unmerge()
        updates = {}
        for layer in WIDTHS:
            new = [n for n in names if layer in self.adapters[n].tensors and n not in self.merged[layer]]
            for name in new:
                c, axis = self.c(name, layer, self.tasks)
                if axis is not None:
                    raise RefusedError("a task for each sample is not one update")
                updates[layer, name] = self.adapters[name].update(layer, c[None])[0].detach()
        for (layer, name), update in updates.items():
            self.merged[layer][name] = update

    def need(self, *names: str) -> None:
        if not self.adapters.keys() >= {*names}:
            raise RefusedError("no such adapter")

    def new(self, name: str) -> None:
        """A new adapter, for which PEFT unmerges the others."""
        if name in self.adapters:
            raise RefusedError("there is such an adapter")
        self.can_unmerge()


# The model -----------------------------------------------------------------------------------------------------------


@contextmanager
def attempt():
    """Collects a refusal: an error that this package or PEFT raises, in words. Other errors remain errors."""
    refusals: list[Exception] = []
    try:
        yield refusals
    except (ValueError, TypeError, RuntimeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = {"peft", "peft_lotra"} & {*Path(last.filename).parts} and "raise" in (last.line or "")
        if not ours or not str(error):
            raise
        refusals.append(error)


def parameters(model: nn.Module, adapter: str | None = None) -> dict[tuple[str, str, str], nn.Parameter]:
    """The tensors of adapters by adapter, layer and name."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lotra_" in name:
            *_, layer, tensor, owner = name.split(".")
            found[owner, layer, tensor] = parameter
    return {key: p for key, p in found.items() if adapter in (None, key[0])}


def stored(model: nn.Module, kind: str, layer: str) -> torch.Tensor:
    """The coefficients that the base layer holds, as a view of the shape (n, m, basis)."""
    module = dict(model.named_modules())
    path = f"base_model.model.{layer}"
    module = module.get(f"{path}.base_layer", module.get(path))
    if kind == "ChebyKAN":
        return module.cheby_coeffs.data
    n, m = WIDTHS[layer]
    return module.spline_linear.weight.data.view(m, n, 3).permute(1, 0, 2)


@contextmanager
def differentiable(model: nn.Module):
    """While this is entered, somebody differentiates by the tensors of all adapters."""
    flags = [(p, p.requires_grad) for p in parameters(model).values()]
    for p, _ in flags:
        p.requires_grad_()
    try:
        yield [p for p, _ in flags]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def gradients(y: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True))


def given(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task as the model takes it."""
    return {key: torch.tensor(value) if isinstance(value, tuple) else value for key, value in task.items()}


# The sequences -------------------------------------------------------------------------------------------------------

NAMES = ["default", "one", "two", "three"]
KIND = st.sampled_from(list(KINDS))
FAMILY = st.sampled_from([kind for kind, config in KINDS.items() if "family" in config])
# Adapters that there are, or new names, by number. WRONG is a name that there is not, or one that there is.
WRONG = 9
NUMBER = st.integers(0, WRONG)
NUMBERS = st.lists(NUMBER, min_size=1, max_size=2, unique=True)
LAM, TASK = st.sampled_from([1.0, 1.15, 1.3, 1.6]), st.sampled_from(["x", "y", "z"])
TASKS = st.one_of(
    st.builds(lambda lam: {"lam": lam}, LAM | st.tuples(*[LAM] * SAMPLES)),
    st.builds(lambda task: {"task": task}, TASK | st.lists(TASK, min_size=SAMPLES, max_size=SAMPLES)),
    st.just({"lam": (1.0, 1.3)}),  # for fewer samples than there are
)
AXES = st.integers(0, 1)
# Names by number, tasks around, of which one may be the argument, the axis of samples, and what is wrong.
CALLS = st.tuples(
    st.none() | st.lists(st.integers(0, 4), min_size=SAMPLES, max_size=SAMPLES),
    st.lists(TASKS, max_size=3),
    st.lists(TASKS, max_size=3),
    AXES,
    st.sampled_from([None, None, None, "name", "length", "task", "mode"]),
)


class Sequences(RuleBasedStateMachine):
    """`contexts` are entered, with what the oracle knows of them; `others` are models that were left, and what they
    compute.
    """

    @initialize(
        kind=st.sampled_from(["ChebyKAN", "FastKAN"]),
        name=st.sampled_from(NAMES),
        first=KIND,
        second=st.none() | FAMILY,
    )
    def start(self, kind, name, first, second):
        torch.manual_seed(0)
        self.contexts: list[tuple[Any, Task | None]] = []
        self.others: list[tuple[nn.Module, torch.Tensor | None]] = []
        net = Net(kind)
        self.x = 2 * torch.rand((SAMPLES, SAMPLES, 3) if kind == "FastKAN" else (SAMPLES, 3)) - 1
        layers = {layer: getattr(net, layer) for layer in WIDTHS}
        branches = {n: layer.base_linear for n, layer in layers.items() if kind == "FastKAN"}
        rest = {n: (branch.weight.data, branch.bias.data) for n, branch in branches.items()}
        self.model = get_peft_model(net, LoTRAConfig(**KINDS[first]), adapter_name=name).eval()
        base = {layer: stored(self.model, kind, layer).clone() for layer in WIDTHS}
        self.oracle = Oracle(kind, base, rest, active=[name], primary=name)
        self.fill(name, first)
        if second is not None:
            self.add(0, second, False)

    def there(self, number: int) -> str:
        """The name of an adapter."""
        names = list(self.oracle.adapters)
        return "nobody" if number == WRONG or not names else names[number % len(names)]

    def new(self, number: int) -> str:
        """A name that no adapter has."""
        names = [name for name in NAMES if name not in self.oracle.adapters]
        return self.there(0) if number == WRONG or not names else names[number % len(names)]

    def fill(self, name, kind):
        """Draw the tensors of a new adapter."""
        with torch.no_grad():
            for p in parameters(self.model, name).values():
                nn.init.normal_(p, std=0.6)
        alpha = KINDS[kind].get("alpha", 1.0)
        self.record(name, kind, alpha, alpha)

    def record(self, name, kind, alpha, scale):
        """Note a new adapter with the tensors that the model has."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for (_, layer, tensor), p in parameters(self.model, name).items():
            tensors.setdefault(layer, {})[tensor] = p.detach().clone().requires_grad_()
        self.oracle.unmerge()
        self.oracle.adapters[name] = Adapter(kind, alpha, scale, tensors)
        self.oracle.adapted |= tensors.keys()

    def done(self, step, check) -> bool:
        """Take a step that is refused if the check is, and say whether it was done."""
        try:
            check()
            expected = None
        except RefusedError as error:
            expected = error
        with attempt() as refusals:
            step()
        assert bool(refusals) == (expected is not None), f"refused: {refusals}, expected: {expected!r}"
        return not refusals

    # Adapters

    @rule(name=NUMBER, kind=KIND, use=st.booleans())
    def add(self, name, kind, use):
        self.add_as(self.new(name), kind, use)

    def add_as(self, name, kind, use):
        config = LoTRAConfig(**KINDS[kind])
        if self.done(lambda: self.model.add_adapter(name, config), lambda: self.oracle.new(name)):
            self.fill(name, kind)
            if use:
                self.agrees()
                self.set_to([name])

    @rule(names=NUMBERS)
    def set_active(self, names):
        self.set_to(list(dict.fromkeys(map(self.there, names))))

    def set_to(self, names):
        def check():
            self.oracle.need(*names)
            if len(names) == 1:
                self.oracle.primary = names[0]  # PeftModel notes it first
            self.oracle.unmerge()

        several = len(names) > 1
        owner = self.model.base_model if several else self.model
        if self.done(lambda: owner.set_adapter(names if several else names[0]), check):
            self.oracle.active = names

    @rule(names=st.none() | NUMBERS, safe=st.booleans())
    def merge(self, names, safe):
        names = None if names is None else list(dict.fromkeys(map(self.there, names)))
        self.done(
            lambda: self.model.merge_adapter(names, safe_merge=safe),
            lambda: self.oracle.merge(self.oracle.active if names is None else names),
        )

    @precondition(lambda self: any(self.oracle.merged.values()))
    @rule()
    def unmerge(self):
        self.done(self.model.unmerge_adapter, self.oracle.unmerge)

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        if enabled:
            self.model.base_model.enable_adapter_layers()
            self.oracle.disabled = False
        elif self.done(self.model.base_model.disable_adapter_layers, self.oracle.can_unmerge):
            self.oracle.disabled = True

    @rule(call=CALLS)
    def without_adapters(self, call):
        call, y = self.fitting(call), None

        def check():
            self.oracle.need(self.oracle.primary)
            self.oracle.can_unmerge()
            for task in call.around:
                self.oracle.entered(task, call.axis, None, False)

        def step():
            nonlocal y
            with self.around(call), self.model.disable_adapter():
                y = self.model(self.x, **self.arguments(call))  # PEFT does not look at the arguments

        if self.done(step, check):
            self.oracle.unmerge()
            assert_equal(y, replace(self.oracle, disabled=True).output(self.x, Call(), []))

    @rule(name=NUMBER, again=st.none() | KIND, last=st.sampled_from([False] * 5 + [True]))
    def delete(self, name, again, last):
        """Delete an adapter, seldom the last one, and perhaps add another one of its name."""
        if len(self.oracle.adapters) == 1 and not last:
            return
        name = self.there(name)

        def check():
            self.oracle.need(name)
            if any(name in merged for merged in self.oracle.merged.values()):
                raise RefusedError("the adapter is merged")

        if self.done(lambda: self.model.delete_adapter(name), check):
            del self.oracle.adapters[name]
            active = [n for n in self.oracle.active if n != name]
            if self.oracle.active == [name] and self.oracle.adapters:  # PEFT chooses one
                (one,) = active = self.model.active_adapters
                self.oracle.need(one)
            self.oracle.active = active
            if len(active) == 1:
                self.oracle.primary = active[0]
            if again is not None:
                self.agrees()
                self.add_as(name, again, True)

    @rule(name=NUMBER, factor=st.sampled_from([-0.8, 1.1]))
    def train(self, name, factor):
        name = self.there(name)
        with torch.no_grad():
            for p in parameters(self.model, name).values():
                p.mul_(factor)
        if name in self.oracle.adapters:
            for tensors in self.oracle.adapters[name].tensors.values():
                for key, tensor in tensors.items():
                    tensors[key] = (factor * tensor.detach()).requires_grad_()

    @rule(name=NUMBER, scale=st.sampled_from([0.5, -1.0]))
    def scale(self, name, scale):
        name = self.there(name)
        for module in self.model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(name, scale)
        if name in self.oracle.adapters:
            self.oracle.adapters[name].scale = scale * self.oracle.adapters[name].alpha

    @rule(layer=st.sampled_from(list(WIDTHS)), merge=st.booleans())
    def write(self, layer, merge):
        """Change the sign of the coefficients that the base layer holds, perhaps merged ones. Twice is nothing."""
        if merge:
            self.merge(None, False)
            self.agrees()
        stored(self.model, self.oracle.kind, layer).neg_()
        if self.oracle.merged[layer]:
            self.oracle.sign[layer] *= -1
        else:
            self.oracle.base[layer] = -self.oracle.base[layer]

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)
        self.oracle.training = training

    @rule(family=NUMBER, name=NUMBER, task=st.none() | TASKS)
    def at(self, family, name, task):
        families = [n for n, adapter in self.oracle.adapters.items() if adapter.is_family]
        family = self.there(family) if family == WRONG or not families else families[family % len(families)]
        name, c = self.new(name), None

        def check():
            nonlocal c
            self.oracle.need(family)
            own = self.oracle.adapters[family]
            size = {"lam": 3, "lam in second": 2, "task": 3}.get(own.kind, 0)
            mean = torch.full((3,), 1 / 3) if own.kind == "task" else torch.eye(max(size, 1))[0]
            if own.codes is not None:
                mean = torch.cat([torch.ones(1), own.codes.mean(0)])
            c = mean if task is None else weights(own.kind, task, own.codes)
            if not own.is_family or c is None or c.dim() > 1:
                raise RefusedError("no family, or not one task of it")
            self.oracle.new(name)

        if self.done(lambda: adapter_at(self.model, name, family=family, **given(task or {})), check):
            own = self.oracle.adapters[family]
            self.record(name, "ordinary", own.alpha, own.scale)
            self.oracle.active, self.oracle.primary = [name], name
            self.check_update(name, {layer: own.update(layer, c[None]) for layer in own.tensors})

    @rule(names=NUMBERS, name=NUMBER)
    def combine(self, names, name):
        names, name = list(dict.fromkeys(map(self.there, names))), self.new(name)

        def check():
            self.oracle.need(*names)
            if any(self.oracle.adapters[n].is_family for n in names):
                raise RefusedError("families are not combined")
            self.oracle.new(name)

        add, factors = self.model.base_model.add_weighted_adapter, [0.5, -1.5][: len(names)]
        if self.done(lambda: add(names, factors, name, "cat"), check):
            self.record(name, "ordinary", 1.0, 1.0)
            total: dict[str, torch.Tensor] = {}
            for factor, adapter in zip(factors, map(self.oracle.adapters.get, names), strict=True):
                for layer in adapter.tensors:
                    total[layer] = total.get(layer, 0) + factor * adapter.update(layer, torch.ones(1, 1))
            self.check_update(name, total)

    def check_update(self, name, expected):
        adapter = self.oracle.adapters[name]
        assert adapter.tensors.keys() == expected.keys()
        for layer, update in expected.items():
            assert_equal(adapter.update(layer, torch.ones(1, 1)), update)

    # Files and copies

    @rule(name=NUMBER, to=st.none() | st.integers(0, 3), trained=st.booleans())
    def load(self, name, to, trained):
        """Save an adapter, and load it under a new name, or again under its own."""
        name = self.there(name)
        to = name if to is None else self.new(to)
        if to != name and to in self.oracle.adapters:
            return  # PEFT loads the tensors, but keeps the config of the adapter that there is

        def check():
            self.oracle.need(name)
            if to != name:
                self.oracle.new(to)

        def step():
            with saved(self.model, name) as folder:
                with torch.no_grad():
                    for p in parameters(self.model, name).values() if to == name else ():
                        p.zero_()
                self.model.load_adapter(folder, to, is_trainable=trained)

        if self.done(step, check):
            self.oracle.training &= trained
            if to != name:
                own = self.oracle.adapters[name]
                self.record(to, own.kind, own.alpha, own.alpha)
                for (_, layer, tensor), p in parameters(self.model, to).items():
                    assert_equal(p, own.tensors[layer][tensor], 0)

    @rule(name=st.integers(0, 3), go_on=st.booleans())
    def reload(self, name, go_on):
        """Save an adapter, and load it onto another base."""
        name = self.there(name)
        if name in self.oracle.adapters:
            own, net = self.oracle.adapters[name], Net(self.oracle.kind)
            state = {key.replace(".base_layer", ""): tensor for key, tensor in self.model.state_dict().items()}
            state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
            net.load_state_dict({key: tensor for key, tensor in state.items() if ".lotra_" not in key})
            with saved(self.model, name) as folder:
                model = PeftModel.from_pretrained(net, folder, adapter_name=name)
            base = {layer: stored(self.model, self.oracle.kind, layer).clone() for layer in WIDTHS}
            oracle = Oracle(self.oracle.kind, base, self.oracle.rest, active=[name], primary=name)
            oracle.adapters[name] = Adapter(own.kind, own.alpha, own.alpha, own.tensors)
            oracle.adapted = {*own.tensors}
            self.look_at(model, oracle, go_on)

    @rule(go_on=st.booleans())
    def duplicate(self, go_on):
        self.look_at(copy.deepcopy(self.model), replace(self.oracle, tasks=[]), go_on)

    def look_at(self, model, oracle, go_on):
        """Look at another model, which has no tasks around it; go on with it, or with the present one."""
        present = self.model, self.oracle
        self.model, self.oracle = model, oracle
        self.agrees()
        if go_on:
            self.contexts = [(context, None) for context, _ in self.contexts]
            model, oracle = present
        else:
            self.model, self.oracle = present
        try:
            expected = replace(oracle).output(self.x, Call(), [])
        except RefusedError:
            expected = None
        self.others.append((model, expected))

    @rule(merge=st.booleans())
    def unload(self, merge):
        """Take the adapters out of a copy."""
        plain = None

        def check():
            for layer in WIDTHS if merge else ():
                for name in self.oracle.used(layer):
                    self.oracle.c(name, layer, [])

        def step():
            nonlocal plain
            other = copy.deepcopy(self.model)
            plain = other.merge_and_unload() if merge else other.unload()

        if self.done(step, check):
            active = self.oracle.active if merge else []
            left = replace(self.oracle, disabled=False, active=active, primary=None)
            assert_equal(plain(self.x), left.output(self.x, Call(), []))

    # Tasks and passes

    @rule(tasks=st.lists(TASKS, min_size=1, max_size=3), axis=AXES)
    def enter(self, tasks, axis):
        axis, entered = axis if self.x.dim() == 3 else 0, None
        task = next((task for task in tasks if self.fits(task, axis, None, False)), tasks[0])

        def check():
            nonlocal entered
            entered = self.oracle.entered(task, axis, None, False)

        context = at_task(self.model, batch_axis=axis, **given(task))
        if self.done(context.__enter__, check):
            self.oracle.tasks.append(entered)
            self.contexts.append((context, entered))

    @precondition(lambda self: self.contexts)
    @rule(k=st.integers(0, 5))
    def leave(self, k):
        """Leave a context, not always the last."""
        context, entered = self.contexts.pop(k % len(self.contexts))
        context.__exit__(None, None, None)
        self.oracle.tasks = [task for task in self.oracle.tasks if task is not entered]

    def fitting(self, drawn) -> Call:
        """A call that says what fits the adapters, except for what is to be wrong."""
        names, around, own, axis, wrong = drawn
        axis = axis if self.x.dim() == 3 else 0
        if names is not None:
            known = [BASE, *self.oracle.adapters]
            names = [known[k % len(known)] for k in names]
            names = {"name": ["nobody", *names[1:]], "length": names[1:]}.get(wrong, names)
            names = None if self.oracle.training and wrong != "mode" else names
        if wrong is None:
            around = [{"lam": 1.15}, {"task": "z"}, *around]
        around = [task for task in around if wrong == "task" or self.fits(task, axis, None, False)]
        own = [task for task in own if wrong == "task" or self.fits(task, axis, names, True)]
        return Call(names, around, next(iter(own), None), axis)

    def fits(self, *arguments) -> bool:
        try:
            return bool(self.oracle.entered(*arguments))
        except RefusedError:
            return False

    @staticmethod
    def arguments(call: Call) -> dict[str, Any]:
        said = {"adapter_names": call.names, "lotra_task": call.own and given(call.own)}
        said = {key: value for key, value in said.items() if value is not None}
        return said | ({"batch_axis": call.axis} if said and call.axis else {})

    @contextmanager
    def around(self, call: Call):
        with ExitStack() as stack:
            for task in call.around:
                stack.enter_context(at_task(self.model, batch_axis=call.axis, **given(task)))
            yield

    def compare(self, call: Call, run) -> None:
        """Compare a pass, and its gradients by all adapters' tensors, x and tasks, with the oracle.

        `run(x, call)` gives y, and a function that runs a function as the backward pass is to be run.
        """
        x, (own, leaves) = self.x.clone().requires_grad_(), call.on_new_leaves()
        try:
            expected = self.oracle.output(x, own, self.oracle.tasks)
            tensors = map(self.oracle.tensors().get, parameters(self.model))
            slopes = gradients(expected, [*tensors, x, *leaves])
        except RefusedError:
            expected, slopes = None, []
        x, (own, leaves) = self.x.clone().requires_grad_(), call.on_new_leaves()
        with differentiable(self.model) as tensors:
            with attempt() as refusals:
                y, backward = run(x, own)
            check_output(None if refusals else y, expected, refusals)
            if expected is not None:
                found = backward(lambda: gradients(y, [*tensors, x, *leaves]))
                for actual, slope in zip(found, slopes, strict=True):
                    assert_equal(actual, slope)

    @rule(call=CALLS)
    def call(self, call):
        def run(x, call):
            with self.around(call):
                return self.model(x, **self.arguments(call)), lambda function: function()

        self.compare(self.fitting(call), run)

    @precondition(lambda self: TOLD)
    @rule(call=CALLS, other=CALLS, inside=st.booleans(), elsewhere=st.booleans())
    def checkpointed(self, call, other, inside, elsewhere):
        """The backward pass is in another context, and perhaps in another thread."""
        other = self.fitting((*other[:4], None))

        def run(x, call):
            def forward(x):
                with self.around(call) if inside else nullcontext():
                    return self.model(x, **self.arguments(call))

            with nullcontext() if inside else self.around(call):
                return checkpoint(forward, x, use_reentrant=False), backward

        def backward(function):
            found = []

            def work():
                with self.around(other):
                    found.extend(function())

            in_thread(work) if elsewhere else work()
            return found

        self.compare(self.fitting(call), run)

    @rule(calls=st.lists(CALLS, min_size=2, max_size=2), elsewhere=st.booleans())
    def handlers(self, calls, elsewhere):
        """Of asyncio, which await while they are at their tasks."""
        calls = list(map(self.fitting, calls))

        async def handler(call):
            y = None
            with attempt() as refusals, self.around(call):
                await asyncio.sleep(0)
                arguments = self.arguments(call)
                y = await asyncio.to_thread(self.model, self.x, **arguments) if elsewhere else None
                y = self.model(self.x, **arguments) if y is None else y
                await asyncio.sleep(0)
            return y, refusals

        async def main():
            return await asyncio.gather(*map(handler, calls))

        self.check_outputs(calls, asyncio.run(main()), self.oracle.tasks)

    @rule(calls=st.lists(CALLS, min_size=2, max_size=2))
    def threads(self, calls):
        """New threads have no tasks around them."""
        calls, barrier = list(map(self.fitting, calls)), threading.Barrier(2, timeout=60)
        found: list[Any] = [None, None]

        def work(k):
            y, stack = None, ExitStack()
            with attempt() as refusals:
                stack.enter_context(self.around(calls[k]))
            barrier.wait()
            if not refusals:
                with attempt() as refusals, stack:
                    y = self.model(self.x, **self.arguments(calls[k]))
            found[k] = y, refusals

        in_thread(lambda: work(0), lambda: work(1))
        self.check_outputs(calls, found, [])

    def check_outputs(self, calls, found, tasks):
        for call, (y, refusals) in zip(calls, found, strict=True):
            try:
                expected = self.oracle.output(self.x, call, tasks)
            except RefusedError:
                expected = None
            check_output(y, expected, refusals)

    # After every step

    @invariant()
    def agrees(self):
        """What the model holds, and what it computes here, if need be at a task."""
        oracle, tensors = self.oracle, parameters(self.model)
        assert tensors.keys() == oracle.tensors().keys()
        for key, tensor in oracle.tensors().items():
            assert_equal(tensors[key], tensor, 0)
        for call in (Call(), self.fitting((None, [], [], 0, None))):
            with attempt() as refusals, self.around(call):
                y = self.model(self.x)
            self.check_outputs([call], [(None if refusals else y, refusals)], oracle.tasks)
            if not refusals:
                break
        assert self.model.active_adapters == oracle.active
        for layer in WIDTHS:
            tolerance = 1e-10 if oracle.merged[layer] else 0
            assert_equal(stored(self.model, oracle.kind, layer), oracle.held(layer), tolerance)
            module = self.model.get_submodule(f"base_model.model.{layer}")
            assert hasattr(module, "base_layer") == (layer in oracle.adapted)
            if layer in oracle.adapted:
                assert (module.active_adapters, module.merged_adapters) == (oracle.active, list(oracle.merged[layer]))

    def teardown(self):
        for context, _ in reversed(getattr(self, "contexts", ())):
            context.__exit__(None, None, None)
        for model, expected in getattr(self, "others", ()):
            with attempt() as refusals:
                y = model(self.x)
            check_output(None if refusals else y, expected, refusals)


def check_output(y, expected, refusals):
    assert (expected is None) == bool(refusals), f"refused: {refusals}, expected: {expected}"
    if expected is not None:
        assert_equal(y, expected)


@contextmanager
def saved(model, name):
    """The folder of a saved adapter."""
    model.create_or_update_model_card = lambda _: None  # it would take longer than all the rest
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, selected_adapters=[name])
        yield directory if name == "default" else f"{directory}/{name}"


def in_thread(*functions):
    """Run functions in threads of their own, beside each other."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_sequences(count):
    profile = settings(
        max_examples=count,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Sequences, settings=profile)
