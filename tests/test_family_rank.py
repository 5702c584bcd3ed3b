"""Families of named tasks with a trained factor of the tasks, `family_rank`, against the dense sum of einsum."""

import copy
import json
import re

import pytest
import torch
from adapted_layers import First
from conftest import assert_different, assert_equal, within
from family_models import X, fill, kan
from layer_table import LAYERS
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    adapter_at,
    add_task,
    at_task,
    convert_to_lora,
    create_lotra_optimizer,
    extract_adapter,
    family_from,
    fit_gauss_newton,
    hotswap_adapter,
    initialize_lotra_weights,
    load_task,
    lotra_parameter_groups,
    save_task,
)
from peft_lotra.layer import adapted_tensors

TASKS = ["poisson", "heat", "wave"]


def family(r=2, k=2, tasks=TASKS, **kwargs):
    return kan(r=r, family=tasks, family_rank=k, **kwargs)


def einsum_model(base, model, row):
    """A copy of `base` whose coefficients are A + s · Σ_p G[..., p] U5[row, p] ×₁ U1 ×₂ U2 ×₃ U3, by one einsum."""
    oracle = copy.deepcopy(base)
    for name, layer in adapted_tensors(model).items():
        core, U1, U2, U3, U4, U5 = layer.factors("default")
        n, m, n_d, *positions = layer.spec.layout.canonical_shape
        sides = [torch.eye(n).to(core) if U is None else U for U, n in zip((U1, U2, U3), (n, m, n_d), strict=True)]
        if positions:
            core = core.flatten(3, -2) if U4 is None else core
            U4 = torch.eye(core.shape[3]).to(core) if U4 is None else U4
            update = torch.einsum("abcqp,ia,ob,dc,kq,p->iodk", core, *sides, U4, U5[row])
            update = update.reshape(n, m, n_d, *positions)
        else:
            update = torch.einsum("abcp,ia,ob,dc,p->iod", core, *sides, U5[row])
        A = oracle.get_parameter(name)
        A.data += layer.scaling["default"] * layer.spec.stored_update(update, A.shape).detach()
    return oracle


def convolution(r, **kwargs):
    row = LAYERS["convolution"]
    torch.manual_seed(2)
    base = First(row.make().double())
    config = LoTRAConfig(r=r, family=TASKS, family_rank=2, coefficients=row.declared, **kwargs)
    model = get_peft_model(copy.deepcopy(base), config)
    fill(model)
    return base, model, row.sample(torch.float64)


# Passes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, (None, 2, None)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_task_is_the_row_of_its_factor(r, k):
    base, model = family(r, k, alpha=0.7)
    for layer in adapted_tensors(model).values():
        assert layer.lotra_U5["default"].shape == (3, k)
        assert layer.lotra_core["default"].shape[-1] == k
    expected = [einsum_model(base, model, row)(X) for row in range(3)]
    assert_different(expected[0], expected[1])
    for task, y in zip(TASKS, expected, strict=True):
        with at_task(model, task=task):
            assert_equal(model(X), y)
    rows = [0, 2, 1, 1, 0, 2, 2, 0]
    with at_task(model, task=[TASKS[row] for row in rows]):
        y = model(X)
    assert_equal(y, torch.stack([expected[row][k] for k, row in enumerate(rows)]))


@pytest.mark.parametrize("r", [2, (2, 2, None, 3)])
def test_convolutions(r):
    base, model, x = convolution(r)
    expected = [einsum_model(base, model, row)(x) for row in range(3)]
    for task, y in zip(TASKS, expected, strict=True):
        with at_task(model, task=task):
            assert_equal(model(x), y)
    rows = [k % 3 for k in range(len(x))]
    with at_task(model, task=[TASKS[row] for row in rows]):
        y = model(x)
    assert_equal(y, torch.stack([expected[row][k] for k, row in enumerate(rows)]))


def test_linear_layers():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    config = LoTRAConfig(r=2, target_modules="all-linear", family=TASKS, family_rank=2)
    model = get_peft_model(copy.deepcopy(base), config)
    fill(model)
    expected = [einsum_model(base, model, row)(X) for row in range(3)]
    for task, y in zip(TASKS, expected, strict=True):
        assert_equal(model(X, lotra_task=task), y)
    y = model(X, lotra_task=[TASKS[k % 3] for k in range(8)])
    assert_equal(y, torch.stack([expected[k % 3][k] for k in range(8)]))


def test_gradients_of_a_task_per_sample_are_those_of_single_tasks():
    _, model = family()
    trained = [p for p in model.parameters() if p.requires_grad]
    factors = [layer.lotra_U5["default"] for layer in adapted_tensors(model).values()]
    assert all(any(p is U5 for p in trained) for U5 in factors)
    names = [TASKS[k % 3] for k in range(8)]
    with at_task(model, task=names):
        actual = torch.autograd.grad(model(X).square().sum(), trained)
    total = 0
    for k, name in enumerate(names):
        with at_task(model, task=name):
            total = total + model(X[k : k + 1]).square().sum()
    for a, e in zip(actual, torch.autograd.grad(total, trained), strict=True):
        assert e.any()
        assert_equal(a, e)


def test_a_mixed_batch_and_a_compiled_model():
    base, model = family()
    model.add_adapter("other", LoTRAConfig(r=2))
    fill(model)
    model.eval()
    with at_task(model, task="heat"):
        y = model(X, adapter_names=["default", "__base__"] * 4)
        other = ["default", "other", "default", "__base__"] * 2
        mixed = model(X, adapter_names=other, lotra_task=[TASKS[k % 3] for k in range(8)])
        assert_equal(torch.compile(model, backend="eager")(X), einsum_model(base, model, 1)(X))
    assert_equal(y[::2], einsum_model(base, model, 1)(X)[::2])
    assert_equal(y[1::2], base(X)[1::2])
    for k in (0, 2, 4, 6):
        assert_equal(mixed[k], einsum_model(base, model, k % 3)(X)[k])


# Training ------------------------------------------------------------------------------------------------------------


def test_a_fresh_family_changes_nothing_and_its_factor_is_orthonormal():
    base, _ = family()
    fresh = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, family=TASKS, family_rank=2))
    with at_task(fresh, task=[TASKS[k % 3] for k in range(8)]):
        assert_equal(fresh(X), base(X), 0)
    for layer in adapted_tensors(fresh).values():
        U5 = layer.lotra_U5["default"].detach()
        assert_equal(U5.T @ U5, torch.eye(2, dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in fresh.named_parameters() if "lotra_" in name}

    def train_step():
        fresh(X, lotra_task="heat").square().mean().backward()

    initialize_lotra_weights(fresh, train_step, method="gradient_hosvd", progressbar=False)
    for name, p in fresh.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]) == ("lotra_core" in name or "lotra_U5" in name)


def test_frozen_factors_leave_the_core_alone():
    _, model = family(freeze_factors=True)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lotra_core"}


def test_budgets_count_the_core_and_the_factor():
    _, model = family(widths=(8, 16, 8), r=None, k=1, compression_ratio=0.5)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers == model.get_nb_trainable_parameters()[0] <= 0.5 * 2 * 8 * 16 * 4
    one_hot = kan(r=None, family=TASKS, compression_ratio=0.5, widths=(8, 16, 8))[1]
    ranks = [next(iter(adapted_tensors(net).values())).lotra_core["default"].shape[0] for net in (model, one_hot)]
    assert ranks[0] > ranks[1]  # k = 1 leaves room for higher ranks


@pytest.mark.parametrize("orthonormal", [False, True])
def test_the_optimizer_trains_the_factor_at_the_rate_of_the_core(orthonormal):
    _, model = family()
    (named,) = [g["name"] for g in lotra_parameter_groups(model, lr=1e-2, lr_rule="LR-1") if "U5" in g["name"]]
    assert named == "core, U2, U5: lr · 1"
    (group,) = [g for g in lotra_parameter_groups(model, lr=1.0, lr_rule={"U5": 0.5}) if g["name"].startswith("U5")]
    assert group["lr"] == 0.5
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, orthonormal=orthonormal)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with at_task(model, task=[TASKS[k % 3] for k in range(8)]):
            loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    U5 = next(iter(adapted_tensors(model).values())).lotra_U5["default"].detach()
    assert torch.allclose(U5.T @ U5, torch.eye(2, dtype=torch.float64)) == orthonormal


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # few points
def test_gauss_newton_trains_the_factor():
    _, model = family()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lotra_U5" in name}

    def residual(task, wave):
        def of(net, x):
            with at_task(model, task=task):
                return net(x) - torch.sin(wave * x.sum(-1, keepdim=True))

        return of

    kinds = {task: residual(task, 1 + k) for k, task in enumerate(TASKS)}
    result = fit_gauss_newton(model, kinds, dict.fromkeys(TASKS, X), iterations=5, progressbar=False)
    assert result.losses[-1] < 0.6 * result.losses[0]
    for name, p in model.named_parameters():
        if name in before:
            assert_different(p.detach(), before[name])


# Single tasks, further tasks, other adapters -------------------------------------------------------------------------


def test_an_adapter_at_a_task_has_the_core_times_the_row(tmp_path):
    base, model = family(alpha=0.7)
    model.save_pretrained(tmp_path / "family")
    adapter_at(model, "heat", task="heat")
    assert_equal(model(X), einsum_model(base, model, 1)(X))
    for layer in adapted_tensors(model).values():
        expected = torch.einsum("abcp,p->abc", layer.lotra_core["default"], layer.lotra_U5["default"][1])
        assert_equal(layer.lotra_core["heat"], expected)
        assert "heat" not in layer.lotra_U5
    save_task(tmp_path / "task.safetensors", model, "heat")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "family")
    load_task(tmp_path / "task.safetensors", loaded, "again")
    assert_equal(loaded(X), model(X), 0)
    adapter_at(model, "mean")
    layer = next(iter(adapted_tensors(model).values()))
    core, U5 = layer.lotra_core["default"], layer.lotra_U5["default"]
    assert_equal(layer.lotra_core["mean"], (core @ U5.T).mean(-1))


@pytest.mark.parametrize("r", [2, (2, 2, None, 3)])
def test_convolutions_at_a_task(r):
    base, model, x = convolution(r)
    expected = einsum_model(base, model, 2)(x)
    adapter_at(model, "wave", task="wave")
    assert_equal(model(x), expected)


def test_a_task_is_one_row_more(tmp_path):
    base, model = family(freeze_factors=True)
    with at_task(model, task="heat"):
        expected = model(X)
    means = [layer.lotra_U5["default"].mean(0) for layer in adapted_tensors(model).values()]
    add_task(model, "mean")
    add_task(model, "plasma", core_from="heat")
    for layer, mean in zip(adapted_tensors(model).values(), means, strict=True):
        assert layer.lotra_U5["default"].shape == (5, 2)
        assert not layer.lotra_U5["default"].requires_grad
        assert_equal(layer.lotra_U5["default"][3], mean)
    for task in ("heat", "plasma"):
        with at_task(model, task=task):
            assert_equal(model(X), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with at_task(loaded, task="plasma"):
        assert_equal(loaded(X), expected, 0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_family_is_found_again_in_its_members(k):
    base, model = family(k=k, alpha=0.7)
    for task in TASKS:
        adapter_at(model, f"{task} alone", task=task)
    members = {f"{task} alone": task for task in TASKS}
    config = LoTRAConfig(r=2, family=TASKS, family_rank=k, alpha=-2.0)
    assert max(family_from(model, members, "again", config).values()) < within(1e-8)
    for row, task in enumerate(TASKS):
        with at_task(model, task=task):
            assert_equal(model(X), einsum_model(base, model, row)(X), 1e-7)
    if k == 3:
        errors = family_from(model, members, "small", LoTRAConfig(r=2, family=TASKS, family_rank=1))
        assert min(errors.values()) > 1e-2


def test_merging_takes_the_row_of_the_task():
    base, model = family()
    expected = einsum_model(base, model, 2)(X)
    with at_task(model, task="wave"):
        merged = model.merge_and_unload()
    assert_equal(merged(X), expected)


@pytest.mark.parametrize(("new", "slot"), [(1, 2), (2, 2), (2, 3), (3, None), (2, None), (None, 3), (None, None)])
def test_a_family_is_swapped_into_a_slot_of_its_rank_or_above(new, slot, tmp_path):
    _, given = family(k=new, r=2)
    given.save_pretrained(tmp_path)
    _, model = family(k=slot, r=3)
    hotswap_adapter(model, tmp_path)
    for task in TASKS:
        with at_task(model, task=task), at_task(given, task=task):
            assert_equal(model(X), given(X))


@pytest.mark.parametrize("r", [2, (2, 2, None, 3)])
def test_a_family_of_convolutions_is_swapped_into_a_slot_of_a_core_for_each_task(r, tmp_path):
    _, given, x = convolution(r)
    given.save_pretrained(tmp_path)
    row = LAYERS["convolution"]
    config = LoTRAConfig(r=(2, 2, None), family=TASKS, coefficients=row.declared)
    torch.manual_seed(2)
    model = get_peft_model(First(row.make().double()), config)
    hotswap_adapter(model, tmp_path)
    with at_task(model, task="wave"), at_task(given, task="wave"):
        assert_equal(model(x), given(x))


# Files and errors ----------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    base, model = family()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["family_rank"], config["family"]) == (2, TASKS)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with at_task(model, task="heat"), at_task(loaded, task="heat"):
        assert_equal(loaded(X), model(X), 0)
        assert_different(loaded(X), base(X))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"family_rank": 1}))
    with pytest.raises(ValueError, match=re.escape("shape (2, 2, 2, 2), expected (2, 2, 2, 1)")):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_convolutions_saved_and_loaded(tmp_path):
    base, model, x = convolution((2, 2, None, 3))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with at_task(model, task="heat"), at_task(loaded, task="heat"):
        assert_equal(loaded(x), model(x), 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"family_rank": 2}, "`family_rank` 2 without `family`: list tasks in `family`"),
        (
            {"family_rank": 2, "family": {"lam": (1, 2)}},
            "`family_rank` 2 with `family` {'lam': [1.0, 2.0]}: only named",
        ),
        *[
            (
                {"family_rank": rank, "family": TASKS},
                f"`family_rank` should be a positive integer up to the number of tasks, 3, or None to give each task "
                f"its own core, but the value passed is {rank!r}",
            )
            for rank in (0, 4, True, 1.0, "2")
        ],
    ],
)
def test_errors_of_settings(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoTRAConfig(r=2, **kwargs)


def test_what_refuses(tmp_path):
    base, model = family()
    with pytest.raises(ValueError, match="combine those of `adapter_at`"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    with pytest.raises(ValueError, match="cannot be converted to LoRA: it is for a family"):
        convert_to_lora(model)
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=re.escape(f"`config` has `family` {TASKS}, and the update is of one task")):
        extract_adapter(base, copy.deepcopy(base), LoTRAConfig(r=2, family=TASKS, family_rank=2))
    assert list(base.state_dict()) == before
    family(k=3)[1].save_pretrained(tmp_path)
    kept = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the new adapter has `family_rank` 3, above the 2 of 'default'"):
        hotswap_adapter(model, tmp_path)
    for p, was in zip(model.parameters(), kept, strict=True):
        assert_equal(p.detach(), was, 0)
