"""DeepSpeed's ZeRO-3 on two processes: `test_sharding.py` starts this program and reads the report of its checks.

Every check compares with the same model in one process, on the batch of both. Argument: a folder to write to.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from conftest import assert_different
from kan_layers import KAN, ChebyKAN, FastKAN
from peft import PeftModel, get_peft_model
from sharded_by_fsdp import (
    U1,
    UNEQUAL,
    X,
    Y,
    adapted,
    family,
    fresh,
    lotra_layers,
    mean,
    of_three_adapters,
    own,
    trained,
)
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    adapter_at,
    at_task,
    fit_gauss_newton,
    initialize_lotra_weights,
    load_task,
    save_task,
)
from peft_lotra.testing import assert_close

torch.set_default_dtype(torch.float32)  # DeepSpeed takes no fp64, which conftest sets
X, Y = X.float(), Y.float()


def partitioned(model, **zero):
    """The engine of a copy."""
    model = copy.deepcopy(model)
    config = {
        "train_micro_batch_size_per_gpu": len(X) // 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # it is 1 by default
    }
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert all(p.numel() == 0 for p in engine.module.parameters())
    return engine


# Comparisons in fp32, DeepSpeed's own: three steps of Adam move a factor by at most 0.03, hence their rounding is far
# below the tolerance.


def assert_equal(actual, expected, tolerance=1e-4):
    assert_close(actual.detach(), expected.detach(), tolerance)


def trained_by_engine(engine, x, y, steps=3, loss_of=None):
    losses = []
    for _ in range(steps):
        loss = (engine(x) - y).square().mean() if loss_of is None else loss_of(engine, x, y)
        losses.append(loss.detach())
        engine.backward(loss)
        engine.step()
    return torch.stack(losses)


def state_of(engine):
    return engine._zero3_consolidated_16bit_state_dict()  # on the first process


def assert_same_state(engine, single):
    state = state_of(engine)
    if dist.get_rank() == 0:
        for name, expected in single.state_dict().items():
            assert_equal(state[name], expected)


def test_training_and_saving(kan, **zero):
    start = adapted(kan)
    engine, single = partitioned(start, **zero), copy.deepcopy(start)
    assert_equal(mean(trained_by_engine(engine, own(X), own(Y))), trained(single, X, Y))
    assert_same_state(engine, single)
    for layer, before in zip(lotra_layers(single), lotra_layers(start), strict=True):
        for after, at_start in zip(layer.tucker("default").tensors(), before.tucker("default").tensors(), strict=True):
            assert_different(after.detach(), at_start.detach())
    state = state_of(engine)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(FOLDER / kan.__name__, state_dict=state)
        base = adapted(kan).unload()
        y = base(X)
        loaded = PeftModel.from_pretrained(base, FOLDER / kan.__name__)
        assert_different(loaded(X), y)
        assert_equal(loaded(X), single(X))


def test_merging(kan):
    single = adapted(kan)
    engine, expected = partitioned(single), single(X).detach()
    before = state_of(engine)
    merged = copy.deepcopy(single)
    merged.merge_adapter()
    engine.eval()
    with torch.no_grad():
        engine(X)
        engine.module.merge_adapter(safe_merge=True)
        assert all(p.numel() == 0 for p in engine.module.parameters())
        assert_equal(engine(X), expected)
        assert_same_state(engine, merged)
        engine.module.unmerge_adapter()
        after = state_of(engine)
        if dist.get_rank() == 0:
            assert all(torch.equal(after[name], before[name]) for name in after)
        assert_equal(engine(X), expected)
        plain = engine.module.merge_and_unload()
        wanted = merged.unload()
        with deepspeed.zero.GatheredParameters(list(plain.parameters())):
            for (name, parameter), other in zip(plain.named_parameters(), wanted.parameters(), strict=True):
                assert "lotra_" not in name
                assert_equal(parameter.detach(), other.detach())


def test_reading_outside_forward():
    single = adapted(ChebyKAN)
    layer = lotra_layers(partitioned(single).module)[0]
    for read in (lambda: layer.cheby_coeffs, lambda: layer.get_delta_weight("default")):
        with pytest.raises(RuntimeError, match="read outside of forward, where ZeRO-3 keeps a part of them"):
            read()
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(layer.parameters())):
        assert_different(layer.cheby_coeffs, layer.get_base_layer().cheby_coeffs)
        assert_equal(layer.cheby_coeffs, lotra_layers(single)[0].cheby_coeffs.detach())


def test_what_needs_whole_models_is_refused():
    model = partitioned(get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=2))).module
    with pytest.raises(ValueError, match="initialise the adapter before the model is sharded"):
        initialize_lotra_weights(model, lambda: model(X).sum().backward(), progressbar=False)
    with pytest.raises(ValueError, match="`model` is sharded .* fit it before it is sharded"):
        fit_gauss_newton(model, lambda net, batch: net(batch), X, iterations=1, progressbar=False)


def test_different_draws():
    """ZeRO-3 takes the factors of the first process; FSDP2 would take a part of every one's."""
    single, engine = fresh(seed=0), partitioned(fresh(seed=dist.get_rank()))
    if dist.get_rank() == 1:
        assert_different(fresh(seed=1).state_dict()[U1], single.state_dict()[U1])
    assert_equal(mean(trained_by_engine(engine, own(X), own(Y))), trained(single, X, Y))
    assert_same_state(engine, single)


def test_adapting_a_partitioned_base(kan):
    """As when a pretrained model is loaded in parts: shapes are known, values are not."""
    torch.manual_seed(1)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        base = kan([3, 6, 2])
    assert all(p.numel() == 0 for p in base.parameters())
    single = get_peft_model(kan([3, 6, 2]), LoTRAConfig(r=(2, 3, 2)))
    model = get_peft_model(base, LoTRAConfig(r=(2, 3, 2)))
    assert model.peft_config["default"].coefficients == single.peft_config["default"].coefficients
    shapes = [factor.shape for layer in lotra_layers(single) for factor in layer.tucker("default").tensors()]
    assert [factor.shape for layer in lotra_layers(model) for factor in layer.tucker("default").tensors()] == shapes


def loss_at(model, x, lam):
    with at_task(model, lam=lam):
        return (model(x).flatten(1).sum(1) - lam).square().mean()


def test_family(kan):
    """One task, and a task for each sample; the tasks of the second process are all the same."""
    start = family(kan).float()
    x = X if kan != "convolution" else torch.rand(8, 4, 7, 6)
    several = torch.tensor([1.0, 1.1, 1.2, 1.3, *[1.6] * 4])
    for lam in (torch.tensor(1.3), several):
        single, engine = copy.deepcopy(start), partitioned(start)
        optimizer, losses = torch.optim.Adam([p for p in single.parameters() if p.requires_grad], lr=1e-2), []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(loss_at(single, x, lam))
            losses[-1].backward()
            optimizer.step()
        found = trained_by_engine(engine, own(x), own(lam) if lam.dim() else lam, loss_of=loss_at)
        assert_equal(mean(found), torch.stack(losses))
        assert_same_state(engine, single)
        with torch.no_grad(), at_task(engine.module, lam=lam), at_task(single, lam=lam):
            assert_equal(engine(x), single(x))
    state = state_of(engine)
    if dist.get_rank() == 0:
        folder = FOLDER / f"family, {kan}"
        engine.module.save_pretrained(folder, state_dict=state)
        loaded = PeftModel.from_pretrained(family(kan).float().unload(), folder)
        with torch.no_grad(), at_task(loaded, lam=several), at_task(single, lam=several):
            assert_equal(loaded(x), single(x))


def test_adapters_of_a_family():
    single = family(ChebyKAN).float()
    engine = partitioned(single)
    gathered = deepspeed.zero.GatheredParameters(list(engine.module.parameters()))
    adapter_at(single, "at", lam=1.3)
    with gathered:
        adapter_at(engine.module, "at", lam=1.3)
        file = FOLDER / f"task of {dist.get_rank()}"
        save_task(file, engine.module, "at")
    load_task(file, single, "again")
    single.set_adapter("at")
    expected = single(X)
    single.set_adapter("again")
    assert_equal(single(X), expected)


def test_codes():
    """A name for each sample: the table, of a first layer, is needed by all layers."""
    torch.manual_seed(2)
    start = get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=(2, 3, 2), family=list("abcde"), family_code=2)).float()
    for layer in lotra_layers(start):
        nn.init.normal_(layer.lotra_core["default"], std=0.3)
    single, engine = copy.deepcopy(start), partitioned(start)
    tasks = torch.tensor([0, 1, 2, 0, 3, 4, 4, 4])

    def loss_of(model, x, part):
        return (model(x, lotra_task={"task": tasks[part]}) - Y[part]).square().mean()

    half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    optimizer, losses = torch.optim.Adam([p for p in single.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss_of(single, X, slice(0, 8)))
        losses[-1].backward()
        optimizer.step()
    assert_equal(mean(trained_by_engine(engine, own(X), half, loss_of=loss_of)), torch.stack(losses))
    assert_same_state(engine, single)
    with pytest.raises(RuntimeError, match="in parts outside of forward: give the task to the call"):
        at_task(engine, task="a").__enter__()


def test_mixed_batches(names):
    """Of another number of adapters in each process, through layers that need a pass for each."""
    start = of_three_adapters(torch.float32)
    single, engine = copy.deepcopy(start).eval(), partitioned(start)
    engine.eval()
    x = torch.rand(4, 4, 7, 6)
    own_names = names[dist.get_rank()]
    given = {} if own_names is None else {"adapter_names": own_names}
    for _ in range(2):
        with torch.no_grad():
            assert_equal(engine(x, **given), single(x, **given))


CHECKS = {
    "training and saving, ChebyKAN": (test_training_and_saving, ChebyKAN, {}),
    # DeepSpeed's own `linear` takes tensors only, so that A + Δ is formed, unless it is turned off.
    "training and saving, KAN": (test_training_and_saving, KAN, {}),
    "merging, ChebyKAN": (test_merging, ChebyKAN, {}),
    "merging, KAN": (test_merging, KAN, {}),
    "reading outside of forward": (test_reading_outside_forward, {}),
    "what needs whole models is refused": (test_what_needs_whole_models_is_refused, {}),
    "different draws": (test_different_draws, {}),
    "family, ChebyKAN": (test_family, ChebyKAN, {}),
    "family, convolution, with a factor of the positions": (test_family, "convolution", {}),
    "adapters of a family": (test_adapters_of_a_family, {}),
    "codes": (test_codes, {}),
    **{f"mixed batches, {name}": (test_mixed_batches, names, {}) for name, names in UNEQUAL.items()},
    "adapting a partitioned base, KAN": (test_adapting_a_partitioned_base, KAN, {}),
    "training and saving, FastKAN": (test_training_and_saving, FastKAN, {"memory_efficient_linear": False}),
}

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    assert dist.get_world_size() == 2
    report = {}
    for name, (check, *args, options) in CHECKS.items():
        if len(sys.argv) > 2 and sys.argv[2] not in name:
            continue
        torch.manual_seed(0)
        try:
            check(*args, **options)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        (FOLDER / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()
    os._exit(0)  # leaving a group whose models are alive can hang
