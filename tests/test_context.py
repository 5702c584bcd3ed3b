"""The context of a call (adapters' names, tasks) belongs to this call alone: threads, asyncio, generators, compile."""

import asyncio
import contextvars
import gc
import re
import threading
from contextlib import ExitStack

import pytest
import torch
from conftest import FULLGRAPH, assert_different, assert_equal
from family_models import LAM, X, at, fill, kan, polynomials
from kan_layers import ChebyKAN
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, at_task, change_range

VALUES = (1.0, 1.25, 1.6)
NONE = "'default' is for a family of tasks, and this pass is at none of them"


def oracle(base, model, value):
    return at(base, model, polynomials(value))(X)


def several():
    """A model, and the output of the dense oracle at each of the values."""
    base, model = kan()
    expected = {value: oracle(base, model, value) for value in VALUES}
    assert_different(expected[1.0], expected[1.6])
    return model, expected


def assert_at_none(model):
    with pytest.raises(RuntimeError, match=NONE):
        model(X)


# asyncio -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_handlers_that_await_inside_a_task(compiled):
    model, expected = several()
    net = torch.compile(model, backend="eager", fullgraph=FULLGRAPH) if compiled else model

    async def handler(value, pause):
        for _ in range(4):
            with at_task(model, lam=value):
                await asyncio.sleep(pause)
                y = net(X)
                await asyncio.sleep(pause)
                assert_equal(y, expected[value])
                assert_equal(net(X), expected[value])
            await asyncio.sleep(pause)
            with pytest.raises(RuntimeError, match=NONE):
                model(X)
        return value

    async def main():
        return await asyncio.gather(*[handler(value, k * 1e-3) for k, value in enumerate(VALUES)])

    assert asyncio.run(main()) == list(VALUES)
    assert_at_none(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_thread_and_a_task_of_asyncio_take_the_context_with_them(compiled):
    model, expected = several()
    net = torch.compile(model, backend="eager") if compiled else model

    async def later(started, go):
        started.set()
        await go.wait()
        return net(X)

    async def main():
        started, go = asyncio.Event(), asyncio.Event()
        with at_task(model, lam=1.25):
            assert_equal(await asyncio.to_thread(net, X), expected[1.25])
            task = asyncio.create_task(later(started, go))
            await started.wait()
        with at_task(model, lam=1.6):  # a task of asyncio keeps the context in which it was made
            go.set()
            assert_equal(await task, expected[1.25])
            assert_equal(net(X), expected[1.6])

    asyncio.run(main())
    assert_at_none(model)


def test_names_of_handlers_beside_each_other():
    base, model = kan(family=None)
    model.add_adapter("two", LoTRAConfig(r=2))
    fill(model)
    model.eval()
    expected = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        expected[name] = model(X)
    assert_different(expected["default"], expected["two"])

    async def handler(name):
        for _ in range(3):
            await asyncio.sleep(1e-3)
            assert_equal(await asyncio.to_thread(lambda: model(X, adapter_names=[name] * 8)), expected[name])

    async def main():
        await asyncio.gather(handler("default"), handler("two"), handler("default"))

    asyncio.run(main())
    assert_equal(model(X), expected["two"])


# Generators, and exits in another order ------------------------------------------------------------------------------


def passes(model, value):
    with at_task(model, lam=value):
        while True:
            yield model(X)


def test_generators_that_end_in_another_order():
    model, expected = several()
    first, second = passes(model, 1.0), passes(model, 1.6)
    assert_equal(next(first), expected[1.0])
    assert_equal(next(second), expected[1.6])
    first.close()
    assert_equal(next(second), expected[1.6])
    second.close()
    assert_at_none(model)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_contexts_that_are_left_in_another_order(order):
    """What is still entered last counts."""
    model, expected = several()
    contexts = [at_task(model, lam=value) for value in VALUES]
    for context in contexts:
        context.__enter__()
    entered = list(range(3))
    for k in order:
        assert_equal(model(X), expected[VALUES[entered[-1]]])
        contexts[k].__exit__(None, None, None)
        entered.remove(k)
    assert_at_none(model)
    with at_task(model, lam=1.25):
        assert_equal(model(X), expected[1.25])


def test_a_generator_of_asyncio_that_is_left_early():
    """asyncio ends it in a task of its own, with a copy of the context."""
    model, expected = several()

    async def answers():
        with at_task(model, lam=1.6):
            for _ in range(3):
                yield model(X)

    async def handler():
        async for y in answers():
            assert_equal(y, expected[1.6])
            break
        gc.collect()
        await asyncio.sleep(0.01)
        assert_at_none(model)
        with at_task(model, lam=1.25):
            assert_equal(model(X), expected[1.25])
        assert_at_none(model)

    async def around():
        with at_task(model, lam=1.0):
            generator = answers()
            await generator.__anext__()
            await asyncio.create_task(generator.aclose())
            assert_equal(model(X), expected[1.0])

    asyncio.run(handler())
    asyncio.run(around())


def test_a_generator_that_another_thread_ends():
    model, expected = several()
    generator = passes(model, 1.6)
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert_at_none(model)


def test_a_context_that_is_left_elsewhere():
    """In a copy of the context, where a token of a ContextVar could not be reset."""
    model, expected = several()
    context = at_task(model, lam=1.6)
    contextvars.copy_context().run(context.__enter__)
    assert_at_none(model)
    context.__exit__(None, None, None)
    assert_at_none(model)
    with ExitStack() as stack:
        stack.enter_context(at_task(model, lam=1.25))
        contextvars.copy_context().run(stack.close)
        assert_at_none(model)


# torch.compile -------------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 2 * self.model(x)


def test_a_compiled_outer_model():
    """The graph's guards see the context of the thread or task that calls it, and other values need no other graph."""
    model, expected = several()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    outer = torch.compile(Outer(model), backend=backend, fullgraph=FULLGRAPH)
    for value in VALUES:
        with at_task(model, lam=value):
            assert_equal(outer(X), 2 * expected[value])
    assert not FULLGRAPH or len(graphs) == 1
    assert_at_none(model)
    found = {}

    def work(value):
        with at_task(model, lam=value):
            found[value] = outer(X)

    with at_task(model, lam=1.0):
        threads = [threading.Thread(target=work, args=(value,)) for value in VALUES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_equal(outer(X), 2 * expected[1.0])
    for value in VALUES:
        assert_equal(found[value], 2 * expected[value])


@pytest.mark.skipif(not FULLGRAPH, reason="before torch 2.13, adapted layers run between graphs")
@pytest.mark.slow
def test_a_task_that_compiled_code_enters():
    model, expected = several()

    def three(x):
        with at_task(model, lam=1.25):
            y = model(x)
            with at_task(model, lam=1.6):
                z = model(x)
            return y, z, model(x)

    with at_task(model, lam=1.0):
        for y, value in zip(torch.compile(three, backend="eager")(X), (1.25, 1.6, 1.25), strict=True):
            assert_equal(y, expected[value])
        assert_equal(model(X), expected[1.0])
    assert_at_none(model)


# Tasks that nothing uses ---------------------------------------------------------------------------------------------


def test_a_task_that_nothing_uses_is_refused():
    base, model = kan()
    with at_task(model, lam=1.25):
        model.merge_adapter()
    y = model(X)
    assert_equal(y, oracle(base, model, 1.25))
    with pytest.raises(ValueError, match=r"`lam`=1.6.*'default'.*merged.*`unmerge_adapter\(\)`"):
        with at_task(model, lam=1.6):
            pass
    with pytest.raises(ValueError, match=r"'default'.*merged.*`unmerge_adapter\(\)`"):
        model(X, lotra_task=1.6)
    assert_equal(model(X), y, 0)
    model.unmerge_adapter()
    adapter_at(model, "new", lam=1.25)
    with pytest.raises(ValueError, match=r"`lam`=1.6.*'default'.*not active.*`set_adapter`"):
        with at_task(model, lam=1.6):
            pass
    model.set_adapter("default")
    with at_task(model, lam=1.6):
        assert_equal(model(X), oracle(base, model, 1.6))


def test_of_two_families_one_may_be_merged():
    base, model = kan()
    model.add_adapter("second", LoTRAConfig(r=2, family={"mu": (0.0, 1.0)}))
    fill(model)
    model.base_model.set_adapter(["default", "second"])
    with at_task(model, lam=1.25), at_task(model, mu=0.5):
        y = model(X)
        model.merge_adapter(["default"])
    with at_task(model, mu=0.5):
        assert_equal(model(X), y)
    with pytest.raises(ValueError, match="'default'.*merged"):
        with at_task(model, lam=1.25):
            pass


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", [["a", "b", "c", "d", "e"], {"lam": (1.0, 2.0)}, {"lam": (1.0, 1.6), "mu": (0, 1)}, LAM]
)
def test_a_task_is_not_for_another_family_of_the_same_name(family, compiled):
    """P may be the same, and may not."""
    base, model = kan()
    net = torch.compile(model, backend="eager") if compiled else model
    with at_task(model, lam=1.25):
        assert_equal(net(X), oracle(base, model, 1.25))
        model.delete_adapter("default")
        model.add_adapter("default", LoTRAConfig(r=2, family=family))
        fill(model)
        model.set_adapter("default")
        if family is LAM:
            assert_equal(net(X), oracle(base, model, 1.25))
        else:
            with pytest.raises(RuntimeError, match=NONE):
                net(X)


def test_a_task_is_not_for_the_same_family_on_other_ranges():
    base, model = kan()
    with at_task(model, lam=1.25):
        y = model(X)
        change_range(model, {"lam": (1.0, 2.0)})
        with pytest.raises(RuntimeError, match=NONE):
            model(X)
        with at_task(model, lam=1.25):
            assert_equal(model(X), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_that_is_no_number_is_refused(value):
    _, model = kan()
    for task in (torch.tensor(value), torch.tensor([1.0, value, 1.2]), torch.tensor([[value]] * 8)):
        with pytest.raises(ValueError, match=re.escape(f"`lam` should be finite but has {value}")):
            with at_task(model, lam=task):
                pass
        with pytest.raises(ValueError, match="`lam` should be finite"):
            model(X, lotra_task={"lam": task})


@pytest.mark.parametrize("degree", ["x", 0, -1, 2.5, True])
@pytest.mark.parametrize("family", [None, LAM])
def test_a_degree_is_checked_with_and_without_a_family(degree, family):
    with pytest.raises(ValueError, match=re.escape(f"`family_degree` should be a positive integer but the value "
                                                   f"passed is {degree!r}")):  # fmt: skip
        LoTRAConfig(r=2, family=family, family_degree=degree)


# Samples of one family -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["ChebyKAN", "convolution"])
def test_a_mixed_batch_whose_samples_all_have_the_same_family(layer):
    """With a task for each sample, in one pass or in several."""
    if layer == "ChebyKAN":
        base, model = kan()
        x, lam = X, torch.tensor([1.0, 1.6, 1.25, 1.0, 1.6, 1.6, 1.1, 1.3], dtype=torch.float64)
    else:
        base = nn.Sequential(nn.Conv1d(3, 4, 2)).double()
        model = get_peft_model(
            nn.Sequential(nn.Conv1d(3, 4, 2)).double(), LoTRAConfig(r=2, family=LAM, target_modules="all-linear")
        )
        model.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
        fill(model)
        x, lam = torch.rand(4, 3, 5, dtype=torch.float64), torch.tensor([1.0, 1.6, 1.0, 1.3], dtype=torch.float64)
    model.eval()
    expected = torch.cat([at(base, model, polynomials(v.item()))(x[k : k + 1]) for k, v in enumerate(lam)])
    assert_different(expected, base(x))
    with at_task(model, lam=lam):
        assert_equal(model(x, adapter_names=["default"] * len(x)), expected)
        names = ["default", "__base__"] * (len(x) // 2)
        y = model(x, adapter_names=names)
    assert_equal(y[::2], expected[::2])
    assert_equal(y[1::2], base(x)[1::2])
    assert_equal(model(x, adapter_names=["default"] * len(x), lotra_task=lam), expected)
    model.add_adapter("other", LoTRAConfig(r=1, **({} if layer == "ChebyKAN" else {"target_modules": "all-linear"})))
    fill(model)
    model.set_adapter("other")
    others = model(x)
    y = model(x, adapter_names=["other", "default"] * (len(x) // 2), lotra_task=lam)
    expected = torch.cat([at(base, model, polynomials(v.item()))(x[k : k + 1]) for k, v in enumerate(lam)])
    model.set_adapter("default")
    with at_task(model, lam=lam):
        assert_equal(y[1::2], model(x)[1::2])
    assert_equal(y[::2], others[::2])


class Around(nn.Module):
    """A KAN beside another model."""

    def __init__(self, other):
        super().__init__()
        self.kan = ChebyKAN([3, 4]).double()
        object.__setattr__(self, "other", other)

    def forward(self, x):
        return self.kan(x) + self.other(x)


def test_names_of_a_call_are_for_its_own_model():
    """Not for layers of another model that the call runs, as an adapter of the same name may be there."""
    base, inner = kan(family=None)
    torch.manual_seed(2)
    outer = get_peft_model(Around(inner.get_base_model()), LoTRAConfig(r=2)).eval()
    fill(outer)
    y = inner(X)
    assert_different(y, base(X))
    alone = outer.base_model.model.kan.layers[0].base_layer(X)
    assert_equal(outer(X, adapter_names=["__base__"] * 8), alone + y)
    assert_different(outer(X), alone + y)
