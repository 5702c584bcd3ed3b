"""Adapters are added, replaced and deleted while other threads call the model."""

import copy
import multiprocessing
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_equal
from kan_layers import ChebyKAN
from launching import limited
from layer_table import randomize
from peft import get_peft_model
from scripts import call

from peft_lotra import LoTRAConfig, add_task, remove_task, rename_task
from peft_lotra.calls.exclusion import calling, changing

X = torch.linspace(-0.9, 0.9, 12).reshape(4, 3)
COUNT = 12


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base, the directory of adapters "a0" … that are all different, and their outputs at X by name."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    base = ChebyKAN([3, 6, 2])
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2), adapter_name="a0")
    for k in range(1, COUNT):
        model.add_adapter(f"a{k}", LoTRAConfig(r=2))
    randomize(model)
    model.save_pretrained(folder)
    outputs = {}
    with torch.no_grad():
        for name in model.peft_config:
            model.set_adapter(name)
            outputs[name] = model(X)
    return base, folder, outputs


def serve(adapters, requests, threads=4):
    """What became of the requests of several threads, beside one that loads and deletes."""
    base, folder, outputs = adapters
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2), adapter_name="kept").eval()
    over, found = threading.Event(), Counter()

    def change():
        draw = random.Random(0)
        while not over.is_set():
            name = draw.choice([*outputs])
            if name in model.peft_config:
                model.delete_adapter(name)
            else:
                model.load_adapter(folder / name, name)

    def request(k):
        draw = random.Random(k)
        names = [draw.choice([*outputs]) for _ in X]
        try:
            with torch.no_grad():
                y = model(X, adapter_names=names)
        except ValueError as error:
            return "gone" if any(name in str(error) for name in names) else f"another error: {error}"
        expected = torch.stack([outputs[name][row] for row, name in enumerate(names)])
        return "right" if torch.allclose(y, expected, rtol=1e-12, atol=1e-12) else "wrong"

    changer = threading.Thread(target=change)
    changer.start()
    with ThreadPoolExecutor(threads) as pool:
        for outcome in pool.map(request, range(requests)):
            found[outcome] += 1
    over.set()
    changer.join()
    return found


def test_requests_beside_changes(adapters):
    found = serve(adapters, 400)
    assert {*found} <= {"right", "gone"}
    assert found["right"] > 20
    assert found["gone"] > 20


@pytest.mark.slow
def test_many_requests_beside_changes(adapters):
    assert {*serve(adapters, 4000)} == {"right", "gone"}


def test_the_example(tmp_path):
    out = call("serve", "--requests", 30, "--adapters", 6, "--codes", 6, "--held", 3, "--output-dir", tmp_path).out
    assert "30 requests of 8 samples, 4 threads: 30 right" in out


def test_a_fork_waits_for_no_call_of_another_thread(adapters):
    inner, entered, over = copy.deepcopy(adapters[0]), threading.Event(), threading.Event()

    def call():
        with calling(inner):
            entered.set()
            over.wait()

    thread = threading.Thread(target=call)
    thread.start()
    entered.wait()
    child = multiprocessing.get_context("fork").Process(target=lambda: changing(inner).__enter__())
    child.start()
    with limited("a fork"):
        child.join()
    over.set()
    thread.join()
    assert child.exitcode == 0


def test_a_thread_may_change_adapters_in_a_call_of_its_own(adapters):
    model = get_peft_model(copy.deepcopy(adapters[0]), LoTRAConfig(r=2))
    inner = model.base_model.model
    with calling(inner), changing(inner), calling(inner):
        model.add_adapter("second", LoTRAConfig(r=2))
    assert_equal(model(X), adapters[0](X), 0)


def test_a_change_waits_for_calls_and_calls_for_it(adapters):
    inner, order, entered = copy.deepcopy(adapters[0]), [], threading.Event()

    def change():
        entered.set()
        with changing(inner):
            order.append("change")

    def call():
        with calling(inner):
            order.append("call")

    with calling(inner):
        first = threading.Thread(target=change)
        first.start()
        entered.wait()
        while not inner_waits(inner):
            pass
        second = threading.Thread(target=call)
        second.start()
        order.append("own")
    first.join()
    second.join()
    assert order == ["own", "change", "call"]


def inner_waits(inner):
    from peft_lotra.calls import exclusion

    return exclusion._of(inner)._queue


def test_tasks_come_and_go_beside_requests():
    """Codes of named tasks are added and removed while other threads call the model at others."""
    torch.manual_seed(0)
    config = LoTRAConfig(r=2, family=["kept", "also kept"], family_code=2, init_weights=False)
    model = get_peft_model(ChebyKAN([3, 6, 2]).double(), config).eval()
    x = X.double()
    with torch.no_grad():
        expected = {name: model(x, lotra_task=name) for name in ("kept", "also kept")}
    over, found = threading.Event(), Counter()

    def change():
        while not over.is_set():
            add_task(model, "guest", code=torch.randn(2))
            rename_task(model, "guest", "friend")
            remove_task(model, "friend")

    def request(number):
        name = ("kept", "also kept")[number % 2]
        try:
            with torch.no_grad():
                y = model(x, lotra_task=name)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "right" if torch.equal(y, expected[name]) else "wrong"

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with limited("requests"), ThreadPoolExecutor(4) as pool:
            found.update(pool.map(request, range(300)))
    finally:
        over.set()
        changer.join()
    assert found == {"right": 300}


def test_merges_beside_requests():
    torch.manual_seed(0)
    model = get_peft_model(ChebyKAN([3, 6, 2]).double(), LoTRAConfig(r=2, init_weights=False)).eval()
    x = X.double()
    with torch.no_grad():
        expected = model(x)
    over, wrong = threading.Event(), []

    def change():
        while not over.is_set():
            model.merge_adapter()
            model.unmerge_adapter()

    def request(_):
        with torch.no_grad():
            y = model(x)
        if not torch.allclose(y, expected, rtol=1e-10, atol=1e-12):
            wrong.append((y - expected).abs().max())

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with limited("requests"), ThreadPoolExecutor(4) as pool:
            list(pool.map(request, range(300)))
    finally:
        over.set()
        changer.join()
    assert not wrong
