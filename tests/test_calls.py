"""Calls do not see each other: threads, calls inside of calls, and calls that fail."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from adapted_layers import adapt
from conftest import assert_different, assert_equal
from kan_layers import ChebyKANLayer
from launching import LIMIT
from layer_table import config, lotra_layers, make, randomize
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from peft_lotra.calls import context
from peft_lotra.standin import PerformanceWarning, places
from peft_lotra.standin.tensor import StandIn

LIBRARIES = ["pykan", "efficient-kan", "fast-kan", "ChebyKAN"]
libraries = pytest.mark.parametrize("name", LIBRARIES)
BATCHES = [  # adapters by sample, of 8 samples
    ["one"] * 8,
    ["two", "one", "__base__", "two"] * 2,
    ["__base__"] * 8,
    ["two"] * 8,
]


def adapted(name, **kwargs):
    """A model of two layers with a head, its adapters "one", which is active, and "two"; an input."""
    base, x = make(name)
    model = nn.Sequential()
    model.add_module("kan", base)
    model.add_module("head", nn.Linear(2, 2, dtype=x.dtype))
    model = get_peft_model(model, config(name, **kwargs), adapter_name="one")
    model.add_adapter("two", config(name, **kwargs))
    for adapter in ("one", "two"):
        randomize(model, adapter)
    if kwargs.get("modules_to_save"):
        nn.init.normal_(model.base_model.model.head.modules_to_save["two"].weight)
    return model, x


def gradients(model, x):
    """By the active adapter's factors."""
    factors = [p for n, p in model.named_parameters() if ".one" in n and "lotra_" in n]
    return torch.autograd.grad(model(x).square().sum(), factors)


def inferred(model, x):
    with torch.no_grad():
        return model(x)


def assert_same(results, expected):
    """To the bit."""
    for actual, wanted in zip(results, expected, strict=True):
        assert_equal(actual, wanted, 0)


def assert_untouched(model):
    """No pass is under way, and none was found to need the dense coefficients."""
    assert context.variable.get() == context.Context()
    assert places._places == {}
    for layer in lotra_layers(model).values():
        assert not layer._needs_tensor
        assert not any(isinstance(v, StandIn) for m in layer.modules() for v in vars(m).values())


class AtCall(TorchFunctionMode):
    """Calls `visit()` before the k-th call of torch in this thread; counts them."""

    def __init__(self, k, visit):
        super().__init__()
        self.k, self.visit, self.count = k, visit, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch._C._set_grad_enabled:  # by which torch leaves `no_grad`
            self.count += 1
            if self.count == self.k:
                self.visit()
        return func(*args, **(kwargs or {}))


def points(work, most=16):
    """Numbers of the calls of torch that `work()` makes: all of them, or that many from the first to the last."""
    with AtCall(0, None) as mode:
        work()
    assert mode.count > 10
    return sorted({1 + k * (mode.count - 1) // (most - 1) for k in range(most)})


@contextmanager
def amid(work, k):
    """While this is entered, another thread has stopped before its k-th call of torch; gives what ends it."""
    stopped, go = threading.Event(), threading.Event()

    def visit():
        stopped.set()
        assert go.wait(LIMIT)

    def run():
        with AtCall(k, visit):
            return work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert stopped.wait(LIMIT)

        def end():
            go.set()
            return future.result(LIMIT)

        try:
            yield end
        finally:
            go.set()


def storm(*works, times=10):
    """Each of the works in a thread of its own until all have been done so many times; threads take turns as often as
    Python can.
    """
    before = sys.getswitchinterval()
    start, stop, done = threading.Barrier(len(works)), threading.Event(), [0] * len(works)

    def repeat(k):
        start.wait(LIMIT)
        try:
            while min(done) < times and not stop.is_set():
                works[k]()
                done[k] += 1
        except BaseException:
            stop.set()
            raise

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            for future in [pool.submit(repeat, k) for k in range(len(works))]:
                future.result(LIMIT)
    finally:
        sys.setswitchinterval(before)


# Training beside inference -------------------------------------------------------------------------------------------


@libraries
def test_training_while_another_thread_infers(name):
    """One thread stops before each call of torch of its pass, and the other one runs then, or stops as well."""
    model, x = adapted(name)
    expected, y = gradients(model, x), inferred(model, x)
    assert all(gradient.any() for gradient in expected[1:])
    trains, infers = lambda: gradients(model, x), lambda: inferred(model, x)
    for k in points(infers):
        with amid(trains, k) as end:
            assert_equal(infers(), y, 0)
            assert_same(end(), expected)
        with amid(infers, k) as end:
            assert_same(trains(), expected)
            assert_equal(end(), y, 0)
        with amid(trains, k) as end, amid(infers, k) as end_other:
            assert_same(end(), expected)
            assert_equal(end_other(), y, 0)
    assert_untouched(model)


@libraries
def test_training_in_a_storm_of_inference(name):
    model, x = adapted(name)
    expected, y = gradients(model, x), inferred(model, x)
    storm(
        lambda: assert_same(gradients(model, x), expected),
        *[lambda: assert_equal(inferred(model, x), y, 0)] * 3,
    )
    assert_untouched(model)


# Adapters by sample --------------------------------------------------------------------------------------------------


def alone(model, x):
    """The outputs for all batches, one after the other, which differ."""
    outputs = [model(x, adapter_names=names) for names in BATCHES]
    for k, y in enumerate(outputs):
        for other in outputs[:k]:
            assert_different(y, other)
    return outputs


@pytest.mark.parametrize("modules_to_save", [None, ["head"]])
@libraries
def test_threads_with_other_adapters_by_sample(name, modules_to_save):
    model, x = adapted(name, modules_to_save=modules_to_save)
    model.eval()
    with torch.no_grad():
        expected, y = alone(model, x), model(x)
    assert_equal(expected[0], y)

    def work(k):
        with torch.no_grad():
            return model(x, adapter_names=BATCHES[k])

    for k in points(lambda: work(1)):
        with amid(lambda: work(1), k) as end:
            assert_equal(work(3), expected[3], 0)
            assert_equal(inferred(model, x), y, 0)
            assert_equal(end(), expected[1], 0)
        with amid(lambda: work(1), k) as end, amid(lambda: work(3), min(k, 10)) as end_other:
            assert_equal(end(), expected[1], 0)
            assert_equal(end_other(), expected[3], 0)
    assert_untouched(model)


@pytest.mark.parametrize("modules_to_save", [None, ["head"]])
@libraries
def test_a_storm_of_other_adapters_by_sample(name, modules_to_save):
    model, x = adapted(name, modules_to_save=modules_to_save)
    model.eval()
    with torch.no_grad():
        expected, y = alone(model, x), model(x)

    def work(k):
        with torch.no_grad():
            assert_equal(model(x, adapter_names=BATCHES[k]), expected[k], 0)

    storm(*[lambda k=k: work(k) for k in range(4)], lambda: assert_equal(inferred(model, x), y, 0))
    assert_untouched(model)


@pytest.mark.parametrize("active", ["one", "two"])
@libraries
def test_a_copy_of_a_module_that_not_every_adapter_has(name, active):
    """The output is that of each adapter alone, whichever one is active."""
    model, x = adapted(name, modules_to_save=["head"])
    model.delete_adapter("two")
    model.add_adapter("two", config(name))
    randomize(model, "two")
    nn.init.normal_(model.base_model.model.head.modules_to_save["one"].weight)
    model.eval()
    expected = {adapter: with_active(model, x, adapter) for adapter in ("one", "two")} | {
        "__base__": disabled(model, x)
    }
    model.set_adapter(active)
    outputs = alone(model, x)
    for names, y in zip(BATCHES, outputs, strict=True):
        if len(set(names)) == 1:  # pykan takes deviations over a batch
            assert_equal(y, expected[names[0]])
    assert_equal(disabled(model, x), expected["__base__"])


def test_modules_are_told_once_how_to_get_the_names():
    """Also if the first calls come from several threads."""
    model, x = adapted("ChebyKAN", modules_to_save=["head"])
    model.eval()
    head, start = model.base_model.model.head, threading.Barrier(8)

    def work():
        start.wait(LIMIT)
        return model(x, adapter_names=BATCHES[1])

    assert not head._forward_pre_hooks
    with ThreadPoolExecutor(8) as pool:
        outputs = [future.result(LIMIT) for future in [pool.submit(work) for _ in range(8)]]
    assert len(head._forward_pre_hooks) == 1
    assert_same(outputs[1:], outputs[:-1])


# Calls inside of calls -----------------------------------------------------------------------------------------------


def with_active(model, x, adapter):
    before = model.active_adapter
    model.set_adapter(adapter)
    try:
        return model(x)
    finally:
        model.set_adapter(before)


def disabled(model, x):
    with model.disable_adapter():
        return model(x)


INNER = {
    "other adapters by sample": lambda model, x: model(x, adapter_names=BATCHES[1]),
    "fewer samples": lambda model, x: model(x[:3], adapter_names=BATCHES[1][:3]),
    "the active adapter": lambda model, x: model(x),
    "another active adapter": lambda model, x: with_active(model, x, "two"),
    "no adapter": disabled,
    "no adapter, fewer samples": lambda model, x: disabled(model, x[:3]),
    "no gradients": inferred,
}
OUTER = {
    "training": lambda model, x: gradients(model, x),
    "inference": lambda model, x: [inferred(model, x)],
    "one adapter for all samples": lambda model, x: [model(x, adapter_names=BATCHES[3])],
    "adapters by sample": lambda model, x: [model(x, adapter_names=BATCHES[1])],
}


# All with one library; with the others those whose inner call has other samples, adapters or gradients.
NESTED = [("efficient-kan", inner) for inner in INNER]
NESTED += [(name, inner) for name in LIBRARIES if name != "efficient-kan" for inner in list(INNER)[::3]]


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize(("name", "inner"), NESTED)
def test_a_call_inside_of_a_call(name, inner, outer):
    """Before each call of torch of the outer one: in layers, between them, and in what they call."""
    model, x = adapted(name, modules_to_save=["head"])
    model.eval()
    expected, y = OUTER[outer](model, x), INNER[inner](model, x)
    seen = []
    for k in points(lambda: OUTER[outer](model, x)):
        with AtCall(k, lambda: seen.append(INNER[inner](model, x))):
            results = OUTER[outer](model, x)
        assert_same(results, expected)
        assert_equal(seen.pop(), y, 0)
    assert not seen
    assert_untouched(model)


# Calls that fail -----------------------------------------------------------------------------------------------------


class Failure(Exception):
    """Of the user's own code."""


FAILURES = [
    Failure("of a user"),
    RuntimeError("no StandIn: takes plain tensors only, and was given the stand-in of adapted coefficients"),
    ValueError("a StandIn"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{type(failure).__name__} {failure}"[:24])
@libraries
def test_a_call_that_fails_changes_no_later_one(name, failure):
    """Raised before each call of torch: in layers, between them, and in what they call."""
    model, x = adapted(name, modules_to_save=["head"])
    model.eval()
    expected = {outer: work(model, x) for outer, work in OUTER.items()}

    def fail():
        raise failure

    for work in OUTER.values():
        for k in points(lambda work=work: work(model, x)):
            with pytest.raises(type(failure)) as caught, AtCall(k, fail):
                work(model, x)
            assert caught.value is failure
            assert_untouched(model)
    for outer, work in OUTER.items():
        assert_same(work(model, x), expected[outer])


@libraries
def test_an_inner_call_that_fails_is_not_seen_by_the_outer_one(name):
    model, x = adapted(name, modules_to_save=["head"])
    model.eval()
    failures = []

    def fail():
        with pytest.raises(Failure), AtCall(len(failures) % 12 + 1, fail_inside):
            model(x, adapter_names=BATCHES[1])
        failures.append(1)

    def fail_inside():
        raise Failure

    for work in OUTER.values():
        expected = work(model, x)
        for k in points(lambda work=work: work(model, x)):
            with AtCall(k, fail):
                results = work(model, x)
            assert_same(results, expected)
    assert len(failures) > 40
    assert_untouched(model)


@libraries
def test_a_thread_that_fails_does_not_disturb_the_others(name):
    model, x = adapted(name)
    expected = gradients(model, x)

    def fail():
        raise RuntimeError("a StandIn")

    numbers = iter(range(10**9))

    def fails():
        with pytest.raises(RuntimeError, match="a StandIn"), AtCall(next(numbers) % 10 + 1, fail):
            inferred(model, x)

    storm(lambda: assert_same(gradients(model, x), expected), fails, fails)
    assert_untouched(model)


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
@libraries
def test_hooks_that_call_the_model_and_hooks_that_fail(name, hook):
    """Of the layer inside the adapter, and of the adapted layer."""
    model, x = adapted(name)
    model.eval()
    layer = list(lotra_layers(model).values())[-1]
    expected, y = OUTER["adapters by sample"](model, x), model(x)
    assert_different(expected[0], y)
    for module in (layer, layer.get_base_layer()):
        running, seen = [], []

        def call(*_, running=running, seen=seen):
            if not running:
                running.append(1)
                try:
                    seen.append(model(x, adapter_names=BATCHES[3]))
                finally:
                    running.pop()

        handle = getattr(module, hook)(call)
        assert_same(OUTER["adapters by sample"](model, x), expected)
        assert_equal(model(x), y, 0)
        handle.remove()
        wanted = model(x, adapter_names=BATCHES[3])
        assert len(seen) >= 2
        assert all(torch.equal(other, wanted) for other in seen)

        def fail(*_):
            raise KeyboardInterrupt

        handle = getattr(module, hook)(fail)
        for names in (None, BATCHES[1]):
            with pytest.raises(KeyboardInterrupt):
                model(x, adapter_names=names)
            assert_untouched(model)
        handle.remove()
    assert_same(OUTER["adapters by sample"](model, x), expected)
    assert_equal(model(x), y, 0)


class Choosy(ChebyKANLayer):
    """Calls `inside()` first; has its coefficients as a plain tensor where `picky()` says so, else in its own way."""

    inside, picky = staticmethod(lambda: None), staticmethod(lambda: True)

    def forward(self, x):
        self.inside()
        if self.picky():
            return Product.apply(x, self.cheby_coeffs)
        return super().forward(x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.sum(-1)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight.sum(-1).T, (x.T @ g)[..., None].expand_as(weight)


def choosy():
    _, model, x = adapt(Choosy(6, 5, 3), {"cheby_coeffs": "i o d"}, (9, 6), torch.float64, r=2)
    (layer,) = lotra_layers(model).values()
    return model, x, layer, layer.get_base_layer()


def test_a_layer_that_helps_itself_and_fails_later_is_not_run_again():
    """Its error is not taken for the refusal that it has seen to itself."""
    model, x, layer, base = choosy()
    runs = []

    def helps_itself():
        runs.append(1)
        with pytest.raises(RuntimeError, match="takes plain tensors only"):
            Product.apply(x, base.cheby_coeffs)
        base.cheby_coeffs.permute(1, 0, 2)
        raise Failure

    base.inside = helps_itself
    with pytest.raises(Failure):
        model(x)
    assert len(runs) == 1
    assert not layer._needs_tensor
    base.inside, base.picky = lambda: None, lambda: False
    y = model(x)  # no warning
    base.picky = lambda: True
    with pytest.warns(PerformanceWarning):
        assert_different(model(x), y)
    assert layer._needs_tensor


@pytest.mark.filterwarnings("ignore::peft_lotra.PerformanceWarning")
def test_threads_find_out_inside_of_inner_calls_that_a_layer_takes_tensors_only():
    """Neither waits for the other one's outer call, which waits as well."""
    model, x, layer, base = choosy()
    expected = model(x).detach()
    layer._needs_tensor = False
    inner, met = threading.local(), threading.Barrier(2)

    def inside():
        if not getattr(inner, "runs", False):
            inner.runs = True
            met.wait(LIMIT)
            assert_equal(model(x).detach(), expected, 0)
            assert_equal(model(x).detach(), expected, 0)

    base.inside = inside
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda: model(x).detach()) for _ in range(2)]
        assert_same([future.result(LIMIT) for future in futures], [expected] * 2)
    assert layer._needs_tensor
    layer._needs_tensor = False
    assert_untouched(model)
