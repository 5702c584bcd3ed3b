"""`fit_gauss_newton` on everything that can be trainable: it fits, or refuses in one sentence that names the layer."""

import copy

import pytest
import torch
from conftest import assert_equal
from layer_table import MODELS, config, make
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, at_task, fit_gauss_newton

FP64 = {"dtype": torch.float64}
X = 1.6 * torch.rand(120, 3, generator=torch.Generator().manual_seed(1), **FP64) - 0.8
Y = torch.stack([torch.sin(2 * X[:, 0]) * X[:, 1], X.square().sum(dim=1)], dim=1)

# Whether it fits is of interest here, not how well.
pytestmark = pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(2, **FP64) + 0.1)

    def forward(self, x):
        return x @ self.matrix


class Mixed(nn.Module):
    """A KAN, a linear layer, and a parameter of a module of its own."""

    def __init__(self, kan="ChebyKAN"):
        super().__init__()
        self.kan, self.head, self.scale = make(kan)[0], nn.Linear(2, 2, **FP64), Scale()

    def forward(self, x):
        return self.scale(self.head(self.kan(x)))


def wrapped(peft_config, base=None):
    torch.manual_seed(0)
    return get_peft_model(base or Mixed(), peft_config, autocast_adapter_dtype=False)


def difference(net, batch):
    return net(batch[0]) - batch[1]


def fits(model, trained):
    """The loss falls, and these parameters move, all others stay."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit_gauss_newton(model, difference, (X, Y), iterations=6, progressbar=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert result.losses[-1] < 0.98 * result.losses[0]
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {part for part in trained if any(part in name for name in moved)} == set(trained)
    return result


def test_everything_beside_the_coefficients():
    kan = "ChebyKAN"
    fits(wrapped(config(kan, modules_to_save=["head"])), ["lotra_core", "head.modules_to_save.default.weight"])
    fits(wrapped(config(kan, bias="all")), ["lotra_core", "head.bias"])
    fits(wrapped(LoTRAConfig(r=2, target_modules="all-linear")), ["kan.layers.0.lotra_core", "head.lotra_core"])


@pytest.mark.parametrize("kan", MODELS)
def test_plain_kans(kan):
    torch.manual_seed(0)
    model = make(kan)[0]
    model.save_act = False  # pykan's: it would store standard deviations, also of single samples, with a warning
    for name, parameter in model.named_parameters():
        if "symbolic" in name:  # pykan's too, in no pass
            parameter.requires_grad_(False)
        if "node_" in name:  # pykan's `affine_trainable`: read in lists, not by name
            parameter.requires_grad_(True)
    fits(model, ["node_bias_0"] if kan == "pykan" else [])
    assert all(isinstance(entry, nn.Parameter) for entry in getattr(model, "node_bias", []))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "all"}])
def test_lora_of_a_linear_layer(options):
    model = wrapped(LoraConfig(r=2, target_modules=["head"], modules_to_save=["scale"], **options))
    fits(model, ["head.lora_A", "head.lora_B", "scale.modules_to_save"])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_beside_lotra():
    """PEFT wraps a wrapped model: the KAN has LoTRA, the linear layer LoRA."""
    base = wrapped(config("ChebyKAN")).base_model.model
    model = wrapped(LoraConfig(r=2, target_modules=["head"]), base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lotra" in name or "lora" in name)
    fits(model, ["lotra_core", "head.lora_A"])


def test_tokens():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(7, 3, **FP64), nn.Linear(3, 2, **FP64)

        def forward(self, x):
            return self.head(self.tokens((4 * x[:, 0] + 3).long()))

    fits(wrapped(TrainableTokensConfig(token_indices=[1, 3, 4], target_modules=["tokens"]), Embedding()), ["delta"])


def test_families_and_their_cores():
    torch.manual_seed(0)
    model = wrapped(config("ChebyKAN", family={"lam": (1.0, 2.0)}))
    lam = torch.linspace(1, 2, len(X), **FP64)

    def residual(net, batch):
        x, y, value = batch
        with at_task(model, lam=value):
            return net(x) - value[..., None] * y

    result = fit_gauss_newton(model, residual, (X, Y, lam), iterations=6, progressbar=False)
    assert result.losses[-1] < 0.9 * result.losses[0]
    adapter_at(model, "new", lam=1.3)
    fits(model, ["lotra_core.new"])


def with_parameter(**options):
    return LoraConfig(r=2, target_parameters=["scale.matrix"], **{"target_modules": ["head"], **options})


def test_lora_of_a_parameter_is_refused():
    model = wrapped(with_parameter())
    before = copy.deepcopy(model.state_dict())
    message = (
        "`model` has LoRA on the parameter 'matrix' of the layer base_model.model.scale .*`target_parameters`.* "
        "name the layer in `target_modules` .* `LoTRAConfig\\(r=\\(None, r, None\\)\\)`.* merge"
    )
    with pytest.raises(ValueError, match=message):
        fit_gauss_newton(model, difference, (X, Y), progressbar=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_ways_out_of_that():
    frozen = wrapped(with_parameter())
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("head.lora" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = frozen(X).detach()
    frozen.base_model.model.scale.merge()
    assert_equal(frozen(X), expected)
    fits(frozen, ["head.lora_A"])
    # LoRA of the flattened coefficients, as `target_parameters` has it, by LoTRA
    fits(wrapped(config("ChebyKAN", r=(None, 2, None))), ["lotra_core", "lotra_U2"])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, **FP64)

    def forward(self, x):
        return self.linear(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("loss", "residual_fn", "labels"),
    [
        ("least_squares", lambda net, batch: net(batch[0]) - batch[1], Y),
        ("cross_entropy", lambda net, batch: (net(batch[0]), batch[1]), (Y[:, 0] > 0).long()),
    ],
)
def test_forward_that_branches_on_values_is_refused(loss, residual_fn, labels):
    model = Branching()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="does not branch on values of tensors.*set_attn_implementation"):
        fit_gauss_newton(model, residual_fn, (X.abs(), labels), loss=loss, iterations=2, progressbar=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
