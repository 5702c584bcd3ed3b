"""Learning rates per component: which parameter gets which rate, and that nothing else changes."""

import copy

import pytest
import torch
from conftest import approx, assert_equal, within
from kan_layers import ChebyKAN
from layer_table import config, lotra_layers, make
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, create_lotra_optimizer
from peft_lotra.training.learning_rates import lotra_parameter_groups

OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
RULES = ["LR-1", "LR-2", "LR-3", "LR-4", "adam"]


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan, self.head = ChebyKAN([3, 6, 4], degree=4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.kan(x))


def headed():
    torch.manual_seed(0)
    return get_peft_model(Headed(), LoTRAConfig(r=2, modules_to_save=["head"]))


def rates(optimizer):
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def train(model, optimizer, steps=4):
    x = torch.rand(16, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x[:, :2].cos()).square().mean().backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "optimizer_cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_rates(rule, optimizer_cls):
    model = headed()
    optimizer = create_lotra_optimizer(model, optimizer_cls, lr=0.5, lr_rule=rule)
    rate = rates(optimizer)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(trainable)
    assert set(held) == set(trainable)
    sizes = {"kan.layers.0": (3, 6, 5), "kan.layers.1": (6, 4, 5)}
    for name, layer in lotra_layers(model).items():
        n, m, n_d = sizes[name]
        expected = {
            "LR-1": (1, 1 / n, 1, 1 / n_d),
            "LR-2": (1, 1 / n, 1, 1),
            "LR-3": (1, 1, 1, 1 / n_d),
            "LR-4": (1, 1, 1, 1),
            "adam": (1, 1 / n, m**-0.5, 1 / n_d),
        }[rule]
        components = (layer.lotra_core, layer.lotra_U1, layer.lotra_U2, layer.lotra_U3)
        assert [rate[c["default"]] for c in components] == approx([0.5 * value for value in expected])
    head = model.base_model.model.head.modules_to_save["default"]
    assert rate[head.weight] == rate[head.bias] == 0.5
    assert (
        len({group["name"] for group in optimizer.param_groups})
        == len(optimizer.param_groups)
        == len(set(rate.values()))
    )


def test_a_mapping_of_multipliers():
    model = headed()
    groups = lotra_parameter_groups(model, lr=2.0, lr_rule={"i": 0.25, "core": 3}, weight_decay=0.1)
    assert {group["name"]: group["lr"] for group in groups} == {
        "core: lr · 3": 6.0,
        "i: lr · 0.25": 0.5,
        "o, d, other: lr · 1": 2.0,
    }
    assert {group["weight_decay"] for group in groups} == {0.1}


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
def test_multipliers_of_one_are_the_plain_optimizer(optimizer_cls):
    model, plain = headed(), headed()
    ours = train(model, create_lotra_optimizer(model, optimizer_cls, lr=0.05, lr_rule="LR-4"))
    theirs = train(plain, optimizer_cls([p for p in plain.parameters() if p.requires_grad], lr=0.05))
    assert any((value != headed().state_dict()[key]).any() for key, value in ours.items())
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    scaled = headed()
    other = train(scaled, create_lotra_optimizer(scaled, optimizer_cls, lr=0.05, lr_rule="LR-1"))
    assert not all(torch.equal(value, theirs[key]) for key, value in other.items())


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
def test_orthonormal_factors(optimizer_cls):
    """The first step, which only moves G, changes the model as it does without; later ones differ."""

    def trained(steps, orthonormal):
        model = headed()
        train(model, create_lotra_optimizer(model, optimizer_cls, lr=0.05, orthonormal=orthonormal), steps)
        return model

    def updates(model):
        return [layer.get_delta_weight("default") for layer in lotra_layers(model).values()]

    def skewness(model):
        factors = [U for layer in lotra_layers(model).values() for U in layer.tucker("default").tensors()[1:]]
        return max((U.T @ U - torch.eye(U.shape[1])).abs().max() for U in factors)

    first, plain_first = trained(1, True), trained(1, False)
    assert skewness(plain_first) > 0.1
    assert skewness(first) < within(1e-6)
    for ours, plain in zip(updates(first), updates(plain_first), strict=True):
        assert plain.any()
        assert_equal(ours, plain)
    later, plain_later = trained(4, True), trained(4, False)
    assert skewness(later) < within(1e-6)
    assert not torch.allclose(updates(later)[0], updates(plain_later)[0], rtol=1e-3)


def test_orthonormal_leaves_other_adapters_alone():
    base, _ = make("ChebyKAN")
    model = get_peft_model(base, config("ChebyKAN"))
    model.add_adapter("other", config("ChebyKAN"))
    before = {
        name: [U.clone() for U in layer.tucker("other").tensors()] for name, layer in lotra_layers(model).items()
    }
    optimizer = create_lotra_optimizer(model, torch.optim.SGD, lr=0.1, orthonormal=True)
    own = [layer.tucker("default").factors["i"].clone() for layer in lotra_layers(model).values()]
    optimizer.step()
    layers = lotra_layers(model)
    assert not all(
        torch.equal(U, layer.tucker("default").factors["i"]) for U, layer in zip(own, layers.values(), strict=True)
    )
    for name, factors in before.items():
        assert all(map(torch.equal, factors, layers[name].tucker("other").tensors()))


def test_schedulers_and_saved_states():
    model = headed()
    optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=0.1, lr_rule="LR-1")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = rates(optimizer)
    train(model, optimizer, 1)
    scheduler.step()
    assert rates(optimizer) == {parameter: rate / 2 for parameter, rate in before.items()}
    again = create_lotra_optimizer(model, torch.optim.AdamW, lr=9.0, lr_rule="LR-1")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert rates(again) == rates(optimizer)


def test_only_what_is_trained():
    """A second adapter that is not active has no place in the optimizer."""
    base, _ = make("ChebyKAN")
    model = get_peft_model(base, config("ChebyKAN"))
    model.add_adapter("other", config("ChebyKAN"))
    held = rates(create_lotra_optimizer(model, torch.optim.SGD, lr=0.1)).keys()
    assert held == {layer["default"] for layer in containers(model) if "default" in layer}
    model.set_adapter("other")
    held = rates(create_lotra_optimizer(model, torch.optim.SGD, lr=0.1)).keys()
    assert held == {layer["other"] for layer in containers(model) if "other" in layer}


def containers(model):
    for layer in lotra_layers(model).values():
        yield from (layer.lotra_core, layer.lotra_U1, layer.lotra_U2, layer.lotra_U3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0}, "`lr` should be a positive number, got 0"),
        ({"lr": "1e-2"}, "`lr` should be a positive number, got '1e-2'"),
        ({"lr": 1.0, "lr_rule": "LR-5"}, "`lr_rule` should be one of .*'adam'.*got 'LR-5'"),
        ({"lr": 1.0, "lr_rule": {"U1": 1}}, "`lr_rule` should map some of .*'d'"),
        ({"lr": 1.0, "lr_rule": {"i": -1}}, "`lr_rule` should give positive multipliers"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_lotra_optimizer(headed(), torch.optim.SGD, **kwargs)


def test_a_model_without_a_trainable_adapter():
    with pytest.raises(ValueError, match="no trainable LoTRA adapter"):
        create_lotra_optimizer(Headed(), torch.optim.SGD, lr=0.1)
    model = headed()
    with model.disable_adapter(), pytest.raises(ValueError, match="no trainable LoTRA adapter"):
        create_lotra_optimizer(model, torch.optim.SGD, lr=0.1)


def test_trainer_and_accelerate(tmp_path):
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Headed()

        def forward(self, x, labels):
            y = self.net(x)
            return {"loss": (y - labels).square().mean(), "logits": y}

    data = [{"x": torch.rand(3), "labels": torch.rand(2)} for _ in range(8)]
    model = get_peft_model(WithLoss(), LoTRAConfig(r=2))
    expected = rates(create_lotra_optimizer(model, torch.optim.AdamW, lr=0.1, lr_rule="LR-1"))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    groups = lotra_parameter_groups(model, lr=0.1, lr_rule="LR-1")
    for how in (
        {"optimizers": (torch.optim.AdamW(groups), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})},
    ):
        trainer = Trainer(model, arguments, train_dataset=data, **how)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        trainer.train()
        assert rates(trainer.optimizer) == expected
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer = Accelerator(cpu=True).prepare(create_lotra_optimizer(model, torch.optim.AdamW, lr=0.1, lr_rule="LR-1"))
    assert rates(optimizer) == expected
