"""The whole way on real pykan: pre-train, adapt to a new function, save, load, merge, go on without this package."""

import copy

import torch
from conftest import assert_different, assert_equal
from kan import KAN
from layer_table import lotra_layers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig


def fit(model, target, steps, lr):
    x = torch.rand(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def build(seed):
    kan = KAN(width=[2, 5, 1], grid=5, k=3, auto_save=False, symbolic_enabled=False, save_act=False, seed=seed)
    return nn.Module.double(kan)


def source(x):
    return torch.sin(2 * x[:, :1]) + x[:, 1:] ** 2


def target(x):
    return torch.sin(2.6 * x[:, :1]) + 1.5 * x[:, 1:] ** 2


def test_pykan_is_adapted_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(3)
    kan = build(seed=3)
    frozen = {name for name, parameter in kan.named_parameters() if not parameter.requires_grad}
    fit(kan, source, 150, 2e-2)
    x = torch.rand(64, 2, dtype=torch.float64) * 2 - 1
    zero_shot = (kan(x) - target(x)).square().mean().item()

    model = get_peft_model(copy.deepcopy(kan), LoTRAConfig(r=3))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable < total / 3
    with torch.no_grad():
        assert_equal(model(x), kan(x), 0)
    fit(model, target, 200, 2e-2)
    y = model(x).detach()
    assert_different(y, kan(x))
    assert (y - target(x)).square().mean() < zero_shot / 20
    # what pykan keeps frozen (grids, masks, symbolic parts) and everything else of the base is as it was
    base = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()}
    for key, value in kan.state_dict().items():
        assert_equal(base[key], value, 0)

    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(4)
    loaded = PeftModel.from_pretrained(copy.deepcopy(kan), tmp_path / "adapter")
    with torch.no_grad():
        assert_equal(loaded(x), y, 0)
    merged = loaded.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        assert_equal(merged(x), y)
    assert type(merged) is KAN
    assert not lotra_layers(merged)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in kan.named_parameters()}
    assert frozen <= {name for name, parameter in merged.named_parameters() if not parameter.requires_grad}

    # a plain KAN again: its coefficients can be saved and loaded by pykan alone, and its grids updated
    torch.save(merged.state_dict(), tmp_path / "kan.pt")
    plain = build(seed=9)
    plain.load_state_dict(torch.load(tmp_path / "kan.pt"))
    with torch.no_grad():
        assert_equal(plain(x), y)
    merged.save_act = True
    merged.get_act(x)
    merged.update_grid_from_samples(x)
