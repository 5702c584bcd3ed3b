"""What `test_fake_device.py` runs in a process of its own: everything on a device that is not the CPU."""

import copy

import fake_device
import pytest
import torch
from adapted_layers import adapted
from conftest import assert_different, assert_equal
from fake_device import recorded, waits
from family_models import LAM, X, fill, kan
from kan_layers import ChebyKAN, FastKAN
from layer_table import LAYERS
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._pytree import tree_map_only

from peft_lotra import (
    GaussNewton,
    LoTRAConfig,
    adapter_at,
    at_task,
    extract_adapter,
    fit_gauss_newton,
    fit_task,
    hotswap_adapter,
    infer_coefficients,
    initialize_lotra_weights,
    load_task,
    save_task,
    task_noise,
    verify_coefficients,
)
from peft_lotra.training import iteration

fake_device.register()


def there(tree):
    """Tensors on the device, also in lists, tuples and dicts."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().to("fake"), tree)


def assert_same(elsewhere, here):
    assert elsewhere.device.type == "fake"
    assert_equal(elsewhere.detach().cpu(), here.detach())


def passed(model, x, **kwargs):
    """A model's output and gradients, and what its second such pass makes of waits and copies."""
    for _ in range(2):
        model.zero_grad()
        with recorded() as events:
            y = model(x, **kwargs)
            y.square().mean().backward()
    return [y, *[p.grad for p in model.parameters() if p.grad is not None]], events


def assert_passes(here, elsewhere, x, task=None, **kwargs):
    """Values and gradients on the device are those of the CPU, and nothing waits or is copied."""
    found, events = passed(elsewhere, there(x), **kwargs, **({} if task is None else {"lotra_task": task}))
    task = tree_map_only(torch.Tensor, torch.Tensor.cpu, task)
    expected, _ = passed(here, x, **kwargs, **({} if task is None else {"lotra_task": task}))
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert not events


def test_the_device():
    x = torch.rand(4, 3).to("fake")
    one = torch.ones(())
    for mixed in (lambda: x + torch.ones(4, 3), lambda: x @ torch.ones(3), lambda: torch.stack([x[0, 0], one])):
        with pytest.raises(RuntimeError, match="device"):
            mixed()
    with recorded() as events:
        _ = x * 2 + one, x[1:, 0].sum(), torch.where(x > 0, x, 0), torch.full((2,), 1.0, device="fake")
        torch.func.vmap(torch.func.grad(lambda row: row.square().sum()))(x)
    assert not events
    for wait in (
        lambda: x[0, 0].item(), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x.nonzero(), lambda: x[x > 0],
        lambda: torch.equal(x, x), lambda: x.cpu(), lambda: x.unique(), lambda: torch.linalg.cholesky(x.T @ x),
    ):  # fmt: skip
        with recorded() as events:
            wait()
        assert waits(events)
    for copied in (lambda: torch.tensor([1.0], device="fake"), lambda: one.to("fake"), lambda: x[[0, 1]]):
        with recorded() as events:
            copied()
        assert [event[:4] for event in events] == ["copy"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    base, model, x = adapted(name, adapters=2)
    other = copy.deepcopy(model).to("fake")
    assert_passes(model, other, x)
    model.base_model.set_adapter("default"), other.base_model.set_adapter("default")
    assert_passes(model, other, x)
    names = [("default", "__base__", "adapter 1")[k % 3] for k in range(len(x))]
    assert_passes(model.eval(), other.eval(), x, adapter_names=names)
    y, x = other(there(x)), there(x)
    other.merge_adapter()
    assert_same(other(x), y.cpu())
    other.unmerge_adapter()
    plain = other.merge_and_unload(safe_merge=True)
    assert_same(plain(x), y.cpu())


EACH = torch.linspace(1, 1.6, 8)
TWO = {"family": {**LAM, "mu": (0.0, 1.0)}}
NAMED = {"family": ["a", "b", "c", "d"]}
FAMILIES = {
    "a number": (LAM, {"lam": 1.3}),
    "a tensor": (LAM, {"lam": EACH[2]}),
    "each": (LAM, {"lam": EACH}),
    "two": (TWO["family"], {"lam": EACH, "mu": 0.3}),
    "a name": (NAMED["family"], {"task": "b"}),
    "names": (NAMED["family"], {"task": ["a", "b", "c", "a"] * 2}),
    "places": (NAMED["family"], {"task": torch.arange(8) % 4}),
}


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind, code):
    family, task = FAMILIES[kind]
    if code and isinstance(family, dict):
        family, task = {**family, "name": ["a", "b", "c"]}, {**task, "name": ["a", "c"] * 4}
    _, model = kan(family=family, **({"family_code": code} if code else {}))
    other = copy.deepcopy(model).to("fake")
    assert_passes(model, other, X, there(task))
    with at_task(other, **there(task)):
        _, events = passed(other, there(X))
    assert not events


def test_codes_and_single_tasks(tmp_path):
    _, model = kan(**NAMED, family_code=2)
    other, x = copy.deepcopy(model).to("fake"), there(X)
    for code in (torch.randn(2), torch.randn(8, 2)):
        assert_passes(model, other, X, {"code": there(code)})
    with at_task(other, task="b"):
        y = other(x)
        other.merge_adapter()
        assert_same(other(x), y.cpu())
        other.unmerge_adapter()
    save_task(tmp_path / "b", other, "b")
    load_task(tmp_path / "b", other, "again")
    adapter_at(other, "alone", task="again")
    other.set_adapter("alone")
    assert_same(other(x), y.cpu())


def test_a_layer_that_takes_equal_tasks_together_waits_for_them_once():
    base, model, x = adapted("FourierKAN")
    model = get_peft_model(base, LoTRAConfig(r=2, family=LAM, coefficients=LAYERS["FourierKAN"].declared))
    fill(model)
    other, task = copy.deepcopy(model).to("fake"), {"lam": torch.tensor([1.1, 1.5, 1.1] * 3)}
    found, events = passed(other, there(x), lotra_task=there(task))
    assert_same(found[0], model(x, lotra_task=task))
    assert len(events) == waits(events) == 1


def test_attached_saved_swapped_and_combined(tmp_path):
    base, x = ChebyKAN([3, 5, 2]), there(X)
    model = get_peft_model(copy.deepcopy(base).to("fake"), LoTRAConfig(r=2, freeze_factors=True))
    fill(model)
    y = model(x)
    model.save_pretrained(tmp_path)
    for device in ("fake", "cpu"):  # safetensors does not know this device
        loaded = PeftModel.from_pretrained(copy.deepcopy(base).to(device), tmp_path, torch_device="cpu")
        assert_equal(loaded(X.to(device)).cpu(), y.cpu())
    nn.init.ones_(model.base_model.model.layers[0].lotra_core["default"])
    assert_different(model(x).cpu(), y.cpu())
    hotswap_adapter(model, tmp_path)
    assert_same(model(x), y.cpu())
    model.load_adapter(tmp_path, "again", torch_device="cpu")
    model.add_weighted_adapter(["default", "again"], [0.5, 0.5], "both")
    model.set_adapter("both")
    assert_same(model(x), y.cpu())
    assert {p.device.type for p in model.parameters()} == {"fake"}


def test_inference():
    model, sample = FastKAN([3, 4, 2]).to("fake"), there(X)
    found = infer_coefficients(model, sample)
    assert found
    verify_coefficients(model, sample)


def residual(net, batch):
    return net(batch[0]) - batch[1]


# Of the numbers of a fit, 2 in an iteration: the gradient's, and the loss's with the predicted one for each λ.
SYSTEMS = {"NormalEquations": (96, 2**32), "ResidualSpace": (8, 2**32), "ConjugateGradients": (24, 60_000)}


@pytest.mark.parametrize(
    ("system", "weight_decay"), [*[(system, 0.0) for system in SYSTEMS], ("NormalEquations", 1e-3)]
)
@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")
def test_fits(system, weight_decay, monkeypatch):
    rows, memory = SYSTEMS[system]
    x = torch.rand(rows, 3)
    data = x, torch.cat([x.square().sum(1, keepdim=True), x.prod(1, keepdim=True)], 1)
    base = get_peft_model(ChebyKAN([3, 5, 2]), LoTRAConfig(r=2))
    fill(base)
    made, of_step = [], []
    build, evaluate = iteration.damped_system, iteration.Problem.evaluate
    monkeypatch.setattr(iteration, "damped_system", lambda *args: made.append(build(*args)) or made[-1])

    def counted(self, *args, **kwargs):
        of_step.append(1)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(iteration.Problem, "evaluate", counted)
    losses, counts = [], []
    for device, iterations in (("cpu", 1), ("fake", 1), ("fake", 2)):
        model, batch = copy.deepcopy(base).to(device), [part.to(device) for part in data]
        made.clear(), of_step.clear()
        with recorded() as events:
            fit = fit_gauss_newton(
                model, residual, batch, iterations=iterations, progressbar=False, max_memory=memory,
                weight_decay=weight_decay, loss_tolerance=0.0,
            )  # fmt: skip
        assert {type(one).__name__ for one in made} == {system}
        assert fit.iterations == iterations
        losses.append(torch.tensor(fit.losses[:2]))
        counts.append(
            (waits(events), sum(of_step), sum("conjugate" in event.split()[-1] for event in events if waits([event])))
        )
    assert_equal(losses[1], losses[0], 1e-6)
    (before, tried_before, products_before), (after, tried, products) = counts[1:]
    # A prior has θ₀ in the result on the host.
    assert after - before == 1 + (tried - tried_before) + (products - products_before) + bool(weight_decay)
    assert (products > products_before) == (system == "ConjugateGradients")


def test_other_fits():
    base, x = ChebyKAN([3, 5, 2]).to("fake"), torch.rand(60, 3, device="fake")
    finetuned = copy.deepcopy(base)
    for p in finetuned.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model, _ = extract_adapter(copy.deepcopy(base), finetuned, LoTRAConfig(r=2), inputs=x, progressbar=False)
    data = x, finetuned(x).detach()
    optimizer = GaussNewton(model, residual)
    assert optimizer.step(data) >= optimizer.step(data)
    model = get_peft_model(base, LoTRAConfig(r=2))
    initialize_lotra_weights(model, lambda: residual(model, data).square().mean().backward(), progressbar=False)


def test_a_task_from_few_samples():
    _, model = kan(**NAMED, family_code=1)
    model, x = model.to("fake"), there(X)
    samples = {}
    for name in "abcd":
        with torch.no_grad(), at_task(model, task=name):
            samples[name] = x, model(x) + 0.01 * torch.randn(8, 4, device="fake")
    found = fit_task(model, "new", residual, samples["a"], starts=1)
    assert {part.device.type for part in found.predict(x)} == {"fake"}
    assert len(found.suggest(x, 2)) == 2
    noise = task_noise(model, residual, samples, progressbar=False)
    fit_task(model, "own core", residual, samples["a"], noise=noise, train="core", starts=1)
