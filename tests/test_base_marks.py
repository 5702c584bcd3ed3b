"""What an adapter's file says of its base: a base fitted with it is saved beside it, and another one is noticed."""

import copy
import json

import pytest
import torch
from conftest import assert_equal
from kan_layers import ChebyKANLayer
from layer_table import randomize
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import GaussNewton, LoTRAConfig, base_state_dict, fit_gauss_newton


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = ChebyKANLayer(2, 6, 4), nn.Linear(6, 6), ChebyKANLayer(6, 1, 4)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def made(**kwargs):
    torch.manual_seed(0)
    return get_peft_model(Net().double(), LoTRAConfig(r=2, **kwargs)).double()


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double()


def residual(net, x):
    return net(x) - x.prod(1, keepdim=True)


def by_fit(model):
    fit_gauss_newton(model, residual, X, iterations=4, progressbar=False)


def by_optimizer(model):
    optimizer = GaussNewton(model, residual)
    for _ in range(4):
        optimizer.step(X)


def by_adam(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for _ in range(20):
        optimizer.zero_grad()
        residual(model, X).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*fitted by heart")
@pytest.mark.parametrize("trained_by", [by_fit, by_optimizer, by_adam])
def test_a_joint_fit_is_saved_in_two_files(trained_by, tmp_path):
    model = made(modules_to_save=["middle"])
    model.requires_grad_(True)
    model.base_model.model.middle.original_module.requires_grad_(False)
    before = {name: value.clone() for name, value in base_state_dict(model).items()}
    loss = residual(model, X).square().mean()
    trained_by(model)
    assert residual(model, X).square().mean() < loss
    with pytest.warns(UserWarning, match="coefficients are trainable, too.*base_state_dict"):
        model.save_pretrained(tmp_path / "early")
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "family")
    torch.save(base_state_dict(model), tmp_path / "base.pt")

    base, other = Net().double(), Net().double()
    assert base_state_dict(model).keys() == base.state_dict().keys()
    base.load_state_dict(torch.load(tmp_path / "base.pt"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "family")
    assert_equal(loaded(X), model(X), 0)
    other.load_state_dict(before)
    with pytest.warns(
        UserWarning, match=r"'default' was trained on other coefficients than the model has in \['first\..*'last\."
    ):
        PeftModel.from_pretrained(other, tmp_path / "family")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_base_in_another_dtype_is_the_same_base(dtype, tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload().to(dtype)
    PeftModel.from_pretrained(base, tmp_path)


def test_one_layer_of_another_sign_is_noticed(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    base = model.unload()
    with torch.no_grad():
        base.last.cheby_coeffs.neg_()
    with pytest.warns(UserWarning, match=r"in \['last\.cheby_coeffs'\]"):
        PeftModel.from_pretrained(base, tmp_path)


def test_merged_adapters():
    model = made()
    randomize(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="has merged adapters.*unmerge"):
        base_state_dict(model)
    with pytest.raises(TypeError, match="PeftModel with LoTRA adapters"):
        base_state_dict(nn.Linear(1, 1))


@pytest.mark.parametrize("marks", [3, {"first.cheby_coeffs": "x"}, {"first.cheby_coeffs": [1.0]}])
def test_wrong_marks_are_named(marks, tmp_path):
    with pytest.raises(TypeError, match="`base_marks"):
        LoTRAConfig(base_marks=marks)
    model = made()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_marks": marks}))
    with pytest.raises(TypeError, match="`base_marks"):
        PeftModel.from_pretrained(Net().double(), tmp_path)
