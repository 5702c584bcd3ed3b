"""FSDP2 on two processes: `test_sharding.py` forks for `report`, and starts this program for the `REPEATED` checks.

Every check compares with the same model in one process, on the batch of both. Argument: a folder to write to.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from adapted_layers import First
from conftest import assert_different, assert_equal
from kan_layers import KAN, ChebyKAN, FastKAN
from layer_table import LAYERS
from odd_layers import DegreesKANLayer
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from peft_lotra import (
    LoTRAConfig,
    adapter_at,
    add_task,
    at_task,
    create_lotra_optimizer,
    family_from,
    fit_gauss_newton,
    initialize_lotra_weights,
    load_task,
    save_task,
)
from peft_lotra.adapters.hotswap import hotswap_adapter_from_state_dict
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.placement import sharded as placement

WRAPPED = ("root", "block", "adapted layer", "base layer", "owner", "containers")
U1 = "base_model.model.layers.0.lotra_U1.default"
OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
X = torch.linspace(-0.9, 0.9, 24).reshape(8, 3)[:, torch.tensor([1, 0, 2])]
Y = torch.stack([X.sum(1).sin(), X.prod(1)], dim=1)


def lotra_layers(model):
    return list(adapted_tensors(model).values())


def adapted(kan, widths=(3, 6, 2)):
    """An adapted model, given its class or its base."""
    torch.manual_seed(1)
    base = kan(widths) if isinstance(kan, type) else kan
    torch.manual_seed(2)
    model = get_peft_model(base, LoTRAConfig(r=(2, 3, 2)))
    for layer in lotra_layers(model):
        nn.init.normal_(layer.lotra_core["default"], std=0.3)
    return model


def sharded(model, wrapped="root", **options):
    """A sharded copy; `wrapped` says which modules are groups of their own beside the root."""
    model, options = copy.deepcopy(model), {"mesh": MESH, **options}
    for layer in lotra_layers(model):
        base = layer.get_base_layer()
        groups = {
            "root": [],
            "block": [],
            "adapted layer": [layer],
            "base layer": [base],
            "owner": [base.get_submodule(layer.spec.parameter.rpartition(".")[0])],
            "containers": [layer.lotra_core, layer.lotra_U1, layer.lotra_U2, layer.lotra_U3],
        }
        for module in groups[wrapped]:
            fully_shard(module, **options)
    if wrapped == "block":
        fully_shard(model.get_base_model(), **options)
    return fully_shard(model, **options)


def own(batch):
    """This process's half."""
    return batch.chunk(2)[dist.get_rank()]


def trained(model, x, y, regularizer=lambda model: 0, steps=3):
    """The losses of Adam's steps."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x).to(y) - y).square().mean() + regularizer(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def mean(values):
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def assert_same_state(model, single, tolerance=1e-9):
    state, expected = get_model_state_dict(model, options=OPTIONS), single.state_dict()
    if dist.get_rank() == 0:
        assert state.keys() == expected.keys()
        for name in expected:
            assert_equal(state[name], expected[name], tolerance)


def test_training(kan, wrapped):
    start = adapted(kan)
    single, model = copy.deepcopy(start), sharded(start, wrapped)
    layers = lotra_layers(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_equal(mean(trained(model, own(X), own(Y))), trained(single, X, Y), 1e-9)
    assert_same_state(model, single)
    for layer, before in zip(lotra_layers(single), lotra_layers(start), strict=True):
        for after, at_start in zip(layer.tucker("default").tensors(), before.tucker("default").tensors(), strict=True):
            assert_different(after.detach(), at_start.detach())
    assert all(p.grad is None for layer in layers for n, p in layer.named_parameters() if "lotra_" not in n)
    with torch.no_grad():
        assert_equal(model(X), single(X), 1e-9)
        with model.disable_adapter():
            assert_equal(model(X), start.unload()(X), 1e-9)


def test_layers_sharded_alone(kan):
    """The base layer is the root of its own sharding, which FSDP2 finds out in its first forward."""
    single = adapted(kan)
    model = copy.deepcopy(single)
    for layer in lotra_layers(model):
        fully_shard(layer.get_base_layer(), mesh=MESH)
    assert_different(single(X).detach(), single.get_base_model()(X * 0).detach())
    assert_equal(model(X), single(X), 1e-9)
    model(X).square().sum().backward()
    single(X).square().sum().backward()
    for layer, expected in zip(lotra_layers(model), lotra_layers(single), strict=True):
        for factor, wanted in zip(
            layer.tucker("default").tensors(), expected.tucker("default").tensors(), strict=True
        ):
            assert_equal(factor.grad, wanted.grad, 1e-9)


def test_saving(kan):
    single = adapted(kan)
    model = sharded(single, "adapted layer")
    trained(single, X, Y)
    trained(model, own(X), own(Y))
    state = get_model_state_dict(model, options=OPTIONS)
    folder = FOLDER / kan.__name__
    if dist.get_rank() == 0:
        saved = get_peft_model_state_dict(model, state_dict=state)
        assert saved.keys() == get_peft_model_state_dict(single).keys()
        model.save_pretrained(folder, state_dict=state)
        torch.manual_seed(1)
        base = kan([3, 6, 2])
        y = base(X)
        loaded = PeftModel.from_pretrained(base, folder)
        assert_different(loaded(X), y)
        assert_equal(loaded(X), single(X), 1e-9)


def test_saving_parts_fails():
    model = sharded(adapted(ChebyKAN), "adapted layer")
    message = "each process has only a part of the factors .*`state = accelerator.get_state_dict.*full_state_dict=True"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # safetensors warns, too
        with pytest.raises(RuntimeError):
            model.save_pretrained(FOLDER / "parts")
    assert any(re.search(message, str(warning.message)) for warning in caught)
    assert not list((FOLDER / "parts").glob("adapter_*"))
    with pytest.warns(UserWarning, match=message):  # as accelerate collects them, to write them by its own means
        parts = get_peft_model_state_dict(model)
    assert len(parts) == sum(len(layer.tucker("default").tensors()) for layer in lotra_layers(model))
    assert all(isinstance(part, DTensor) for part in parts.values())


def test_merging(kan, wrapped):
    single = adapted(kan)
    model, plain = sharded(single, wrapped), adapted(kan).unload()
    expected = single(X).detach()
    before = get_model_state_dict(model, options=OPTIONS)
    with torch.no_grad():
        if wrapped != "containers":
            model(X)  # the root's parameters stay gathered
        model.merge_adapter(safe_merge=True)
        assert_equal(model(X), expected, 1e-9)
        merged = copy.deepcopy(single)
        merged.merge_adapter()
        assert_same_state(model, merged)
        model(X)
        model.unmerge_adapter()
        after = get_model_state_dict(model, options=OPTIONS)
        assert all(torch.equal(after[name], before[name]) for name in after)
        assert_equal(model(X), expected, 1e-9)
        state = get_model_state_dict(model.merge_and_unload(), options=OPTIONS)
    if dist.get_rank() == 0:
        assert_different(plain(X), expected)
        plain.load_state_dict(state)
        assert_equal(plain(X), expected, 1e-9)


def test_reading_outside_forward(mesh_shape):
    """By name, and by the layer's own regulariser: the adapted coefficients, and gradients as in one process."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicated", "sharded")[-len(mesh_shape) :])

    def by_name(model):
        return 0.1 * sum(layer.cheby_coeffs.square().sum() for layer in lotra_layers(model))

    def by_method(model):
        return 0.01 * model.get_base_model().regularization_loss()

    for kan, regularizer in ((ChebyKAN, by_name), (KAN, by_method)):
        start = adapted(kan)
        single, without = copy.deepcopy(start), copy.deepcopy(start)
        model = sharded(start, "adapted layer", mesh=mesh)
        losses = trained(single, X, Y, regularizer)
        assert_different(losses, trained(without, X, Y))
        assert_equal(mean(trained(model, own(X), own(Y), regularizer)), losses, 1e-9)
        assert_same_state(model, single)
        with torch.no_grad():
            model.merge_adapter()
            single.merge_adapter()
        assert_same_state(model, single)


def test_combining():
    single = adapted(ChebyKAN)
    model, before = sharded(single, "adapted layer"), single(X).detach()
    for each in (model, single):
        each.add_weighted_adapter(["default"], [2.0], "twice", "cat")
        each.set_adapter("twice")
    assert_different(single(X), before)
    assert_equal(model(X).detach(), single(X).detach(), 1e-9)


def test_gradient_of_what_differs_between_processes():
    single = adapted(ChebyKAN)
    model = sharded(single)
    numbers = torch.tensor([1.0, 3.0])
    weight = torch.randn(6, 2, 4)
    (numbers.mean() * (lotra_layers(single)[1].cheby_coeffs * weight).sum()).backward()
    (own(numbers) * (lotra_layers(model)[1].cheby_coeffs * weight).sum()).sum().backward()
    for factor, wanted in zip(
        lotra_layers(model)[1].tucker("default").tensors(),
        lotra_layers(single)[1].tucker("default").tensors(),
        strict=True,
    ):
        assert_equal(factor.grad.full_tensor(), wanted.grad, 1e-9)


def test_sixteen_bit_forward(kan, wrapped):
    start = adapted(kan)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(start, wrapped, mp_policy=policy)
    losses = mean(trained(model, own(X), own(Y)))
    expected = trained(copy.deepcopy(start), X, Y)
    assert not torch.equal(losses, expected)  # rounded
    assert_equal(losses, expected, 3e-2)
    assert all(p.dtype == torch.float64 and p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_needs_whole_models_is_refused():
    for wrapped, run in (("base layer", False), ("root", False), ("root", True)):
        torch.manual_seed(1)
        model = sharded(get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=2)), wrapped)
        if run:
            model(X)
        with pytest.raises(ValueError, match="initialise the adapter before the model is sharded"):
            initialize_lotra_weights(model, lambda model=model: model(X).sum().backward(), progressbar=False)
        with pytest.raises(ValueError, match="`model` is sharded .* fit it before it is sharded"):
            fit_gauss_newton(model, lambda net, batch: net(batch), X, iterations=1, progressbar=False)
        with pytest.raises(ValueError, match="`orthonormal`=True needs whole factors .* leave it out, or use DDP"):
            create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, orthonormal=True)


def test_adapters_on_a_sharded_base():
    """First the base is sharded, then it is adapted; the root takes the factors."""
    torch.manual_seed(1)
    base = ChebyKAN([3, 6, 2])
    for layer in base.layers:
        fully_shard(layer, mesh=MESH)
    torch.manual_seed(2)
    model = get_peft_model(base, LoTRAConfig(r=(2, 3, 2)))
    torch.manual_seed(1)
    plain = ChebyKAN([3, 6, 2])
    torch.manual_seed(2)
    single = get_peft_model(plain, LoTRAConfig(r=(2, 3, 2)))
    fully_shard(model, mesh=MESH)
    assert_equal(mean(trained(model, own(X), own(Y))), trained(single, X, Y), 1e-9)
    assert_same_state(model, single)


def fresh(seed):
    """An adapted model with factors drawn by a seed."""
    torch.manual_seed(1)
    base = ChebyKAN([3, 6, 2])
    torch.manual_seed(seed)
    return get_peft_model(base, LoTRAConfig(r=(2, 3, 2)))


def test_different_draws(wrapped, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicated", "sharded")[-len(mesh_shape) :])
    model = sharded(fresh(seed=dist.get_rank()), wrapped, mesh=mesh)
    with torch.no_grad():
        model(X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="factors .* were drawn differently in the processes.*set_seed"):
            model(own(X))
    state = get_model_state_dict(model, options=OPTIONS)
    single = adapted(ChebyKAN)
    if dist.get_rank() == 0:
        assert_different(state[U1], single.state_dict()[U1])
    set_model_state_dict(model, single.state_dict(), options=OPTIONS)  # as a checkpoint is loaded
    assert_equal(mean(trained(model, own(X), own(Y))), trained(single, X, Y), 1e-9)
    assert not any(layer._drawn for layer in lotra_layers(model))


class Slopes(nn.Module):
    """∂ Σ y² / ∂x, inside of what is sharded."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.func.grad(lambda x: self.net(x).square().sum())(x)


def test_first_pass_under_torch_func():
    """Draws are compared there too, and the factors are whole afterwards."""
    model, single = fully_shard(Slopes(fresh(seed=3)), mesh=MESH), Slopes(fresh(seed=3))
    assert all(layer._drawn for layer in lotra_layers(model.net))
    assert_equal(mean(trained(model, own(X), own(X))), trained(single, X, X), 1e-9)
    assert not any(layer._drawn for layer in lotra_layers(model.net))
    model = fully_shard(Slopes(fresh(seed=dist.get_rank())), mesh=MESH)
    with pytest.raises(RuntimeError, match="factors .* were drawn differently in the processes"):
        model(own(X))


def test_what_makes_different_draws_the_same():
    """Seeds of their own, and then a saved adapter, the first process's factors, or the gradient's."""
    single = adapted(ChebyKAN)
    folder = FOLDER / f"saved by {dist.get_rank()}"
    single.save_pretrained(folder)

    def load(model):
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))

    def broadcast(model):
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)

    def align(model):
        initialize_lotra_weights(model, lambda: (model(X) - Y).square().mean().backward(), progressbar=False)

    for then in (load, broadcast, align):
        model = fresh(seed=dist.get_rank())
        drawn = model.state_dict()[U1]
        assert_different(drawn, mean(drawn))
        then(model)
        model = sharded(model, "adapted layer")
        trained(model, own(X), own(Y))
        assert not any(layer._drawn for layer in lotra_layers(model))
    loaded = PeftModel.from_pretrained(single.unload(), folder, is_trainable=True)
    assert all(layer._drawn for layer in lotra_layers(loaded))
    model = sharded(loaded)
    trained(model, own(X), own(Y))
    model = fresh(seed=3)
    model.add_adapter("second", LoTRAConfig(r=(1, 2, 1)))
    model.base_model.set_adapter(["default", "second"])
    model = sharded(model)
    trained(model, own(X), own(Y))
    assert not any(layer._drawn for layer in lotra_layers(model))


def test_by_accelerate(class_name):
    """On the CPU accelerate would take DDP instead, hence the private state."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[class_name],
        cpu_ram_efficient_loading=False,
    )
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    single = adapted(ChebyKAN)
    model = copy.deepcopy(single)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert [type(m).__name__ for m in model.modules()].count(f"FSDP{class_name}") == 2
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(own(X)) - own(Y)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    assert_equal(mean(torch.stack(losses)), trained(single, X, Y), 1e-9)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(FOLDER / class_name, state_dict=state)
        loaded = PeftModel.from_pretrained(adapted(ChebyKAN).unload(), FOLDER / class_name)
        assert_different(loaded(X), adapted(ChebyKAN)(X).detach())
        assert_equal(loaded(X), single(X).detach(), 1e-9)


def family(kan, widths=(3, 6, 2)):
    """A model with a family of tasks, given its class, or "convolution" for layers that run once for each task."""
    torch.manual_seed(1)
    declared = LAYERS[kan].declared if kan == "convolution" else {}
    base = First(LAYERS[kan].make().to(X.dtype)) if kan == "convolution" else kan(widths)
    torch.manual_seed(2)
    ranks = (2, 2, None, 3) if kan == "convolution" else (2, 3, 2)
    model = get_peft_model(base, LoTRAConfig(r=ranks, family={"lam": (1.0, 1.6)}, coefficients=declared))
    for layer in lotra_layers(model):
        nn.init.normal_(layer.lotra_core["default"], std=0.3)
    return model


def trained_family(model, x, lam, steps=3):
    """The losses of Adam's steps."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with at_task(model, lam=lam):
            loss = (model(x).flatten(1).sum(1) - lam).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_family(kan, wrapped):
    """One task, and a task for each sample; the tasks of the second process are all the same."""
    start = family(kan)
    x = X if kan != "convolution" else torch.rand(8, 4, 7, 6)
    several = torch.tensor([1.0, 1.1, 1.2, 1.3, *[1.6] * 4])
    for lam in (torch.tensor(1.3), several):
        single, model = copy.deepcopy(start), sharded(start, wrapped)
        losses = trained_family(single, x, lam)
        assert_different(losses, trained_family(copy.deepcopy(start), x, torch.tensor(1.5)))
        assert_equal(mean(trained_family(model, own(x), own(lam) if lam.dim() else lam)), losses, 1e-9)
        assert_same_state(model, single)
        with torch.no_grad(), at_task(model, lam=lam), at_task(single, lam=lam):
            assert_equal(model(x), single(x), 1e-9)
    state = get_model_state_dict(model, options=OPTIONS)
    if dist.get_rank() == 0:
        folder = FOLDER / f"family, {kan}, {wrapped}"
        model.save_pretrained(folder, state_dict=state)
        loaded = PeftModel.from_pretrained(family(kan).unload(), folder)
        with torch.no_grad(), at_task(loaded, lam=several), at_task(single, lam=several):
            assert_equal(loaded(x), single(x), 1e-9)
    again = sharded(start, wrapped)
    set_model_state_dict(again, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    with torch.no_grad(), at_task(again, lam=several), at_task(single, lam=several):
        assert_equal(again(x), single(x), 1e-9)
    with torch.no_grad(), at_task(again, lam=1.3), at_task(single, lam=1.3):
        again.merge_adapter()
        single.merge_adapter()
    assert_same_state(again, single)


def test_adapters_of_a_family():
    single = family(ChebyKAN)
    model = sharded(single, "adapted layer")
    for each in (model, single):
        adapter_at(each, "at", lam=1.3)
    single.set_adapter("default")
    with at_task(single, lam=1.3):
        assert_equal(model(X).detach(), single(X).detach(), 1e-9)
    single.set_adapter("at")
    file = FOLDER / f"task of {dist.get_rank()}"
    save_task(file, model, "at")
    load_task(file, single, "again")
    assert_equal(model(X).detach(), single(X).detach(), 1e-9)
    config = LoTRAConfig(r=(2, 3, 2), family={"lam": (1.0, 1.6)}, family_degree=1)
    for each in (model, single):
        adapter_at(each, "low", lam=1.0)
        family_from(each, {"low": 1.0, "at": 1.3}, "another", config)
    with at_task(model, lam=1.1), at_task(single, lam=1.1):
        assert_equal(model(X).detach(), single(X).detach(), 1e-9)
    named = get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=2, family=["a", "b"]))
    with pytest.raises(ValueError, match="`model` is sharded .* add the task before it is sharded"):
        add_task(sharded(named), "c")


def test_codes(wrapped):
    """A name for each sample, another set in each process: the table, of a first layer, is needed by all layers."""
    torch.manual_seed(2)
    start = get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=(2, 3, 2), family=list("abcde"), family_code=2))
    for layer in lotra_layers(start):
        nn.init.normal_(layer.lotra_core["default"], std=0.3)
    single, model = copy.deepcopy(start), sharded(start, wrapped)
    tasks = torch.tensor([0, 1, 2, 0, 3, 4, 4, 4])
    for names in (["a"] * 8, [*"abcadeee"], tasks):
        losses = trained_codes(single, X, Y, names)
        half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        assert_equal(mean(trained_codes(model, own(X), own(Y), names[half])), losses, 1e-9)
        assert_same_state(model, single)
    state = get_model_state_dict(model, options=OPTIONS)
    if dist.get_rank() == 0:
        folder = FOLDER / f"codes, {wrapped}"
        model.save_pretrained(folder, state_dict=state)
        torch.manual_seed(2)
        loaded = PeftModel.from_pretrained(ChebyKAN([3, 6, 2]), folder)
        with torch.no_grad(), at_task(loaded, task=tasks), at_task(single, task=tasks):
            assert_equal(loaded(X), single(X), 1e-9)


def trained_codes(model, x, y, names, steps=2):
    """The losses of Adam's steps."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with at_task(model, task=names):
            loss = (model(x) - y).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_unequal_batches_of_tasks():
    """Five samples at five tasks in one process, three in the other."""
    x = torch.rand(5 if dist.get_rank() == 0 else 3, 4, 7, 6)
    model = sharded(family("convolution"), "base layer")
    message = "5 updates in one process and a batch of 3 in another, a sharded .* cannot make equally many passes"
    with at_task(model, lam=torch.linspace(1, 1.6, len(x))), pytest.raises(ValueError, match=message):
        model(x)
    model, single = sharded(family("convolution"), "adapted layer"), family("convolution")
    with at_task(model, lam=torch.linspace(1, 1.6, len(x))), at_task(single, lam=torch.linspace(1, 1.6, len(x))):
        assert_equal(model(x), single(x), 1e-9)


def test_swapping_is_refused():
    model = sharded(adapted(ChebyKAN))
    other = adapted(ChebyKAN)
    message = "'default' is sharded .* before `fully_shard`"
    with pytest.raises(ValueError, match=message):
        hotswap_adapter_from_state_dict(
            model, get_peft_model_state_dict(other), "default", other.peft_config["default"]
        )


def test_a_process_that_gathers_alone_says_so():
    """The other process comes when it has heard the warning."""
    store, layer = dist.distributed_c10d._get_default_store(), lotra_layers(sharded(adapted(ChebyKAN)))[0]
    if dist.get_rank() == 1:
        store.wait(["has warned"])
        layer.get_delta_weight("default")
        return
    patience, show, told = placement.PATIENCE, warnings.showwarning, []

    def heard(message, *_):
        told.append(str(message))
        store.set("has warned", "1")

    placement.PATIENCE, warnings.showwarning = 0.2, heard
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = heard
            layer.get_delta_weight("default")
    finally:
        placement.PATIENCE, warnings.showwarning = patience, show
    assert "process 0 has waited" in told[0]
    assert "`merge_and_unload`" in told[0]


def test_stack(wrapped):
    """One parameter for each basis function."""
    torch.manual_seed(1)
    base = nn.Sequential(DegreesKANLayer(3, 6), DegreesKANLayer(6, 2)).to(X.dtype)
    start = get_peft_model(base, LoTRAConfig(r=2, coefficients={"c.*": "d | o i"}, init_weights=False))
    single, model = copy.deepcopy(start), sharded(start, wrapped)
    assert_equal(mean(trained(model, own(X), own(Y))), trained(single, X, Y), 1e-9)
    assert_same_state(model, single)
    model.merge_adapter()
    single.merge_adapter()
    with torch.no_grad():
        assert_equal(model(X), single(X), 1e-9)


def of_three_adapters(dtype=torch.float64):
    """A layer that needs a pass for each adapter of a mixed batch."""
    row = LAYERS["convolution"]
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(row.make()).to(dtype), LoTRAConfig(r=2, coefficients=row.declared))
    for name in ("one", "two"):
        model.add_adapter(name, LoTRAConfig(r=2, coefficients=row.declared))
    for layer in lotra_layers(model):
        for core in layer.lotra_core.values():
            nn.init.normal_(core, std=0.3)
    return model


def test_unequal_adapters(wrapped, names):
    """Mixed batches, of another number of adapters in each process, through layers that need a pass for each."""
    start = of_three_adapters()
    single, model = copy.deepcopy(start).eval(), sharded(start, wrapped).eval()
    x = torch.rand(4, 4, 7, 6)
    own_names = names[dist.get_rank()]
    given = {} if own_names is None else {"adapter_names": own_names}
    for _ in range(2):
        with torch.no_grad():
            assert_equal(model(x, **given), single(x, **given), 1e-12)


UNEQUAL = {
    "three and one": (["default", "one", "two", "__base__"], ["one"] * 4),
    "none and two": (None, ["default", "one", "default", "one"]),
    "two and four": (["one", "two", "two", "one"], ["default", "one", "two", "__base__"]),
}


# Every kind of group with one layer, and for the others those in which the parameter's group is not the layer's.
_COMBINATIONS = [(ChebyKAN, wrapped) for wrapped in WRAPPED]
_COMBINATIONS += [(KAN, "base layer"), (KAN, "block"), (FastKAN, "owner")]
CHECKS = {
    **{f"training, {kan.__name__}, {wrapped}": (test_training, kan, wrapped) for kan, wrapped in _COMBINATIONS},
    **{f"merging, {kan.__name__}, {wrapped}": (test_merging, kan, wrapped) for kan, wrapped in _COMBINATIONS},
    "16-bit forward, ChebyKAN": (test_sixteen_bit_forward, ChebyKAN, "root"),
    "16-bit forward, FastKAN": (test_sixteen_bit_forward, FastKAN, "base layer"),
    "layers sharded alone, ChebyKAN": (test_layers_sharded_alone, ChebyKAN),
    "layers sharded alone, KAN": (test_layers_sharded_alone, KAN),
    "saving, ChebyKAN": (test_saving, ChebyKAN),
    "saving, KAN": (test_saving, KAN),
    "saving parts is refused": (test_saving_parts_fails,),
    "reading outside of forward": (test_reading_outside_forward, (2,)),
    "reading outside of forward, replicated and sharded": (test_reading_outside_forward, (1, 2)),
    "gradient of what differs between processes": (test_gradient_of_what_differs_between_processes,),
    "combining": (test_combining,),
    "what needs whole models is refused": (test_what_needs_whole_models_is_refused,),
    "adapters on a sharded base": (test_adapters_on_a_sharded_base,),
    **{f"different draws, {wrapped}": (test_different_draws, wrapped, (2,)) for wrapped in WRAPPED},
    "different draws, replicated and sharded": (test_different_draws, "root", (2, 1)),
    "first pass under torch.func": (test_first_pass_under_torch_func,),
    "what makes different draws the same": (test_what_makes_different_draws_the_same,),
    **{f"family, {wrapped}": (test_family, ChebyKAN, wrapped) for wrapped in WRAPPED},
    **{f"family, convolution, {wrapped}": (test_family, "convolution", wrapped) for wrapped in WRAPPED},
    **{f"codes, {wrapped}": (test_codes, wrapped) for wrapped in WRAPPED},
    "family, unequal batches": (test_unequal_batches_of_tasks,),
    **{f"unequal adapters, {name}": (test_unequal_adapters, "base layer", names) for name, names in UNEQUAL.items()},
    **{f"stack, {wrapped}": (test_stack, wrapped) for wrapped in ("root", "adapted layer", "base layer")},
    "swapping is refused": (test_swapping_is_refused,),
    "a process that gathers alone says so": (test_a_process_that_gathers_alone_says_so,),
    "unequal adapters, adapted layer": (test_unequal_adapters, "adapted layer", UNEQUAL["three and one"]),
    "adapters of a family": (test_adapters_of_a_family,),
    "by accelerate, LoTRALayer": (test_by_accelerate, "LoTRALayer"),
    "by accelerate, ChebyKANLayer": (test_by_accelerate, "ChebyKANLayer"),
}

# Kinds of groups that meet the same code again: for the second tier.
REPEATED = {f"different draws, {wrapped}" for wrapped in ("block", "adapted layer", "owner")}
REPEATED |= {f"family, {wrapped}" for wrapped in ("root", "block", "adapted layer", "owner")}
REPEATED |= {f"family, convolution, {wrapped}" for wrapped in ("block", "adapted layer", "owner", "containers")}
REPEATED |= {"merging, KAN, block", "reading outside of forward"}


def report(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What is wrong, by the names of checks; "" for nothing. Changes global settings of the process."""
    global FOLDER, MESH, X, Y
    FOLDER, MESH = folder, init_device_mesh("cpu", (2,))
    # Two processes add up in another order than one, and training amplifies rounding.
    torch.set_default_dtype(torch.float64)
    X, Y = X.double(), Y.double()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # ChebyKAN returns one
    found = {}
    for name in names:
        check, *args = CHECKS[name]
        torch.manual_seed(0)
        try:
            check(*args)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    found = report(Path(sys.argv[1]), sorted(REPEATED))
    (FOLDER / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # leaving a group whose models are alive can hang
