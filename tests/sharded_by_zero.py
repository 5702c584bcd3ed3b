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
from conftest import assert_different, assert_equal
from kan_layers import KAN, ChebyKAN, FastKAN
from peft import PeftModel, get_peft_model
from sharded_by_fsdp import U1, X, Y, adapted, fresh, lotra_layers, mean, own, trained

from peft_lotra import LoTRAConfig, fit_gauss_newton, initialize_lotra_weights


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
# below the tolerance of 1e-5 of the largest value.


def trained_by_engine(engine, x, y, steps=3):
    losses = []
    for _ in range(steps):
        loss = (engine(x) - y).square().mean()
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
            assert_equal(state[name], expected, 1e-5)


def test_training_and_saving(kan, **zero):
    start = adapted(kan)
    engine, single = partitioned(start, **zero), copy.deepcopy(start)
    assert_equal(mean(trained_by_engine(engine, own(X), own(Y))), trained(single, X, Y), 1e-5)
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
        assert_equal(loaded(X), single(X), 1e-5)


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
        assert_equal(engine(X), expected, 1e-5)
        assert_same_state(engine, merged)
        engine.module.unmerge_adapter()
        after = state_of(engine)
        if dist.get_rank() == 0:
            assert all(torch.equal(after[name], before[name]) for name in after)
        assert_equal(engine(X), expected, 1e-5)
        plain = engine.module.merge_and_unload()
        wanted = merged.unload()
        with deepspeed.zero.GatheredParameters(list(plain.parameters())):
            for (name, parameter), other in zip(plain.named_parameters(), wanted.parameters(), strict=True):
                assert "lotra_" not in name
                assert_equal(parameter.detach(), other.detach(), 1e-5)


def test_reading_outside_forward():
    single = adapted(ChebyKAN)
    layer = lotra_layers(partitioned(single).module)[0]
    for read in (lambda: layer.cheby_coeffs, lambda: layer.get_delta_weight("default")):
        with pytest.raises(RuntimeError, match="read outside of forward, where ZeRO-3 keeps a part of them"):
            read()
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(layer.parameters())):
        assert_different(layer.cheby_coeffs, layer.get_base_layer().cheby_coeffs)
        assert_equal(layer.cheby_coeffs, lotra_layers(single)[0].cheby_coeffs.detach(), 1e-5)


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
    assert_equal(mean(trained_by_engine(engine, own(X), own(Y))), trained(single, X, Y), 1e-5)
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


CHECKS = {
    "training and saving, ChebyKAN": (test_training_and_saving, ChebyKAN, {}),
    # DeepSpeed's own `linear` takes tensors only, so that A + Δ is formed, unless it is turned off.
    "training and saving, KAN": (test_training_and_saving, KAN, {}),
    "merging, ChebyKAN": (test_merging, ChebyKAN, {}),
    "merging, KAN": (test_merging, KAN, {}),
    "reading outside of forward": (test_reading_outside_forward, {}),
    "what needs whole models is refused": (test_what_needs_whole_models_is_refused, {}),
    "different draws": (test_different_draws, {}),
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
