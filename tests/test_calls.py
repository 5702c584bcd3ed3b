"""Calls do not see each other: threads, calls inside of calls, and calls that fail."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from conftest import assert_different, assert_equal
from layer_table import config, lotra_layers, make, randomize
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from peft_lotra import mixed_batch
from peft_lotra.standin import calls
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
    assert (calls._stacks.at, calls._passes, calls._handles, calls._held) == ({}, {}, set(), {})
    assert mixed_batch._calls.stack == ()
    for layer in lotra_layers(model).values():
        assert not layer._needs_tensor
        assert not any(isinstance(v, StandIn) for m in layer.modules() for v in vars(m).values())


class AtCall(TorchFunctionMode):
    """Calls `visit()` before the k-th call of torch in this thread; counts them."""

    def __init__(self, k, visit):
        super().__init__()
        self.k, self.visit, self.count = k, visit, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.k:
            self.visit()
        return func(*args, **(kwargs or {}))


def points(work, most=24):
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
        assert go.wait(20)

    def run():
        with AtCall(k, visit):
            return work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert stopped.wait(20)

        def end():
            go.set()
            return future.result(20)

        try:
            yield end
        finally:
            go.set()


def storm(*works, seconds=0.7):
    """Each of the works again and again in a thread of its own, which take turns as often as Python can."""
    before = sys.getswitchinterval()
    start, stop = threading.Barrier(len(works)), threading.Event()

    def repeat(work):
        start.wait(20)
        times = 0
        try:
            while not stop.is_set():
                work()
                times += 1
        finally:
            stop.set()
        return times

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            futures = [pool.submit(repeat, work) for work in works]
            stop.wait(seconds)
            stop.set()
            assert all(future.result(20) for future in futures)
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


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
@libraries
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
