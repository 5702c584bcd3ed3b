"""Bases that are sharded over processes, or placed on the CPU and on disk by accelerate."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import assert_different, assert_equal
from kan_layers import KAN, ChebyKAN, FastKAN
from launching import fork, has_fsdp2, launch
from peft import PeftModel, get_peft_model_state_dict
from sharded_by_fsdp import CHECKS, REPEATED, X, Y, adapted, lotra_layers, report, trained
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_lotra import LoTRAConfig, LoTRALayer

# Sharded: the checks themselves are in the programs ------------------------------------------------------------------


def assert_none_failed(reports, checks):
    """By what two processes say of so many checks."""
    assert [len(report) for report in reports] == [checks, checks]
    failed = [f"process {rank}: {name}\n{how}" for rank in range(2) for name, how in reports[rank].items() if how]
    assert not failed, "\n".join(failed)


def launched(program, folder, **options):
    launch(Path(__file__).with_name(program), folder, **options)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.processes
@has_fsdp2
@pytest.mark.slow
def test_fsdp(tmp_path):
    names = [name for name in CHECKS if name not in REPEATED]
    assert_none_failed(fork(report, tmp_path, names), len(names))


@pytest.mark.slow
@pytest.mark.processes
@has_fsdp2
def test_fsdp_in_processes_of_torchrun(tmp_path):
    assert_none_failed(launched("sharded_by_fsdp.py", tmp_path), len(REPEATED))


def test_draws_are_remembered_where_there_are_several_processes_only(monkeypatch):
    """Until they are sharded: a pass of one process alone changes nothing that another one relies on."""
    assert not any(layer._drawn for layer in lotra_layers(adapted(ChebyKAN)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = adapted(ChebyKAN)
    model.add_adapter("second", LoTRAConfig(r=(1, 2, 1)))
    expected = model(X).detach()
    copied = copy.deepcopy(model)
    copied.delete_adapter("second")
    assert_equal(copied(X).detach(), expected, 0)
    for layer, other in zip(lotra_layers(model), lotra_layers(copied), strict=True):
        assert list(layer._drawn) == ["default", "second"]
        assert [len(rows) for rows in layer._drawn["second"]] == [1, *map(len, layer.tucker("second").tensors()[1:])]
        assert list(other._drawn) == ["default"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")  # FSDP1's
def test_the_adapter_of_a_model_that_fsdp1_wraps_is_all_there():
    """Its modules have other names than what is in its state dict."""
    model = adapted(ChebyKAN([2, 4, 1]))
    expected = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert any("_fsdp_wrapped_module" in name for name, _ in wrapped.named_modules())
        state = get_peft_model_state_dict(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert len(expected) == 6  # two modes are whole
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_zero_3(tmp_path):
    assert_none_failed(launched("sharded_by_zero.py", tmp_path, env={"DS_ACCELERATOR": "cpu"}), 16)


# Wrapped -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kan", [ChebyKAN, KAN, FastKAN])
def test_activation_checkpointing(kan):
    """Around the adapted layer; inside, the wrapper would keep the adapter from the layer, and did so in silence."""
    single = adapted(kan)
    for around in (LoTRALayer, type(single.get_base_model().layers[0].get_base_layer())):
        model = copy.deepcopy(single)
        apply_activation_checkpointing(model, check_fn=lambda module, around=around: isinstance(module, around))
        if around is not LoTRALayer:
            with pytest.raises(RuntimeError, match="CheckpointWrapper stands between.*wrap the LoTRALayer instead"):
                model(X)
            continue
        assert_equal(model(X), single(X), 0)
        model(X).square().sum().backward()
        single.zero_grad()
        single(X).square().sum().backward()
        for layer, expected in zip(lotra_layers(model), lotra_layers(single), strict=True):
            for factor, wanted in zip(
                layer.tucker("default").tensors(), expected.tucker("default").tensors(), strict=True
            ):
                assert wanted.grad.any()
                assert_equal(factor.grad, wanted.grad)


# Placed --------------------------------------------------------------------------------------------------------------

PLACES = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "a device map": lambda model, folder: dispatch_model(
        model, {"layers.0": "disk", "layers.1": "cpu", "layers.2": "disk"}, offload_dir=folder
    ),
}


def away(model):
    return {name for name, p in model.named_parameters() if p.is_meta}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kan", [ChebyKAN, KAN, FastKAN])
def test_training_with_an_offloaded_base(kan, place, tmp_path):
    single = adapted(kan, widths=[3, 6, 5, 2])
    model = adapted(PLACES[place](adapted(kan, widths=[3, 6, 5, 2]).unload(), tmp_path / "base"))
    offloaded = away(model)
    assert offloaded
    assert not any("lotra_" in name for name in offloaded)
    losses = trained(single, X, Y)
    assert_different(losses[2:], losses[:1])
    assert_equal(trained(model, X, Y), losses)
    for layer, expected in zip(lotra_layers(model), lotra_layers(single), strict=True):
        for factor, wanted in zip(
            layer.tucker("default").tensors(), expected.tucker("default").tensors(), strict=True
        ):
            assert_equal(factor.grad, wanted.grad)
            assert_equal(factor.detach(), wanted.detach())
    expected = single(X).detach()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(adapted(kan, widths=[3, 6, 5, 2]).unload(), tmp_path / "adapter")
    assert_equal(loaded(X).detach(), expected)
    with torch.no_grad(), single.disable_adapter():
        assert_different(single(X), expected)
    model.merge_adapter(safe_merge=True)
    assert away(model) == offloaded
    assert_equal(model(X).detach(), expected)
    model.unmerge_adapter()
    assert_equal(model(X).detach(), expected)
    with model.disable_adapter(), single.disable_adapter():
        assert_equal(model(X), single(X), 0)
    for layer in lotra_layers(model):
        layer.merge()
    assert away(model) == offloaded
    assert all(layer.merged for layer in lotra_layers(model))
    assert_equal(model(X).detach(), expected)
    for layer in lotra_layers(model):
        layer.unmerge()
    assert_equal(model.merge_and_unload()(X).detach(), expected)


@pytest.mark.parametrize("place", PLACES)
def test_offloaded_adapters_are_not_trained_in_silence(place, tmp_path):
    model = adapted(FastKAN, widths=[3, 6, 5, 2])
    expected = model(X).detach()
    PLACES[place](model.get_base_model(), tmp_path)
    assert any("lotra_" in name for name in away(model))
    with torch.no_grad():
        assert_equal(model(X), expected)
    with pytest.raises(RuntimeError, match="has offloaded the trainable .*Offload the base before it gets adapters"):
        model(X)
    model.eval()
    assert_equal(model(X).detach(), expected)
    assert_equal(model.merge_and_unload(safe_merge=True)(X).detach(), expected)
