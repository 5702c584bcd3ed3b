"""`GaussNewton`: its steps are those of `fit_gauss_newton`, and loops of others take it."""

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_equal
from layer_table import config, make, randomize
from peft import get_peft_model
from safetensors.torch import load_file
from scripts import call
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from peft_lotra import GaussNewton, fit_gauss_newton

X = 2 * torch.rand(240, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 1
Y = torch.stack([torch.sin(2 * X[:, 0]) * X[:, 1], X.square().sum(dim=1)], dim=1)
LABELS = (Y[:, 0] > Y[:, 1]).long()
PARTS = list(zip(X.split(80), Y.split(80), strict=True))


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(make("o (d i)", torch.float64)[0], config("o (d i)"), autocast_adapter_dtype=False)
    randomize(model, std=0.2)
    return model


def difference(net, batch):
    return net(batch[0]) - batch[1]


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("residual_fn", "targets", "options"),
    [
        pytest.param(difference, Y, {}, id="least squares"),
        pytest.param(difference, Y, {"weight_decay": 1e-3, "damping": 1e-3}, id="prior"),
        pytest.param(
            lambda net, batch: (net(batch[0]), batch[1]), LABELS, {"loss": "cross_entropy"}, id="cross entropy"
        ),
    ],
)
def test_steps_are_iterations_of_the_fit(residual_fn, targets, options):
    batches = [(X[part], targets[part]) for part in torch.arange(240).split(80)]
    fitted, stepped = adapted(), adapted()
    result = fit_gauss_newton(
        fitted, residual_fn, lambda k: batches[k % 3], iterations=5, loss_tolerance=0, progressbar=False, **options
    )
    optimizer = GaussNewton(stepped, residual_fn, **options)
    losses = [optimizer.step(batches[k % 3]) for k in range(5)]
    assert_equal(values(stepped), values(fitted))
    assert losses[0] == result.losses[0]
    assert optimizer.param_groups[0]["damping"] == result.damping


def test_the_rate_is_a_factor_on_the_step_and_schedulers_lower_it():
    whole, half = adapted(), adapted()
    start = values(whole)
    GaussNewton(whole, difference, damping=10.0).step((X, Y))
    optimizer = GaussNewton(half, difference, lr=0.5, damping=10.0)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step((X, Y))
    assert_equal(values(half) - start, (values(whole) - start) / 2)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-2}], ids=["plain", "prior"])
def test_a_rate_of_zero_evaluates_once_and_changes_nothing(options):
    calls = []

    def counted(net, batch):
        calls.append(batch)
        return difference(net, batch)

    model = adapted()
    optimizer = GaussNewton(model, counted, **options)
    optimizer.step((X, Y))  # makes the checks
    start, damping = values(model), optimizer.param_groups[0]["damping"]
    optimizer.param_groups[0]["lr"] = 0.0
    calls.clear()
    loss = optimizer.step((X, Y))
    once = len(calls)
    assert torch.equal(values(model), start)
    assert optimizer.param_groups[0]["damping"] == damping
    optimizer.param_groups[0]["lr"] = 1.0
    calls.clear()
    assert optimizer.step((X, Y)) == loss
    assert once < len(calls)


def test_a_gain_as_predicted_lowers_the_damping_at_any_rate():
    for rate in (1.0, 0.3):
        optimizer = GaussNewton(adapted(), difference, lr=rate, damping=10.0)  # steps are small: nearly linear
        optimizer.step((X, Y))
        assert optimizer.param_groups[0]["damping"] == 2.5


@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-2}], ids=["plain", "prior"])
def test_a_state_dict_goes_on_bit_for_bit(options, tmp_path):
    model = adapted()
    optimizer = GaussNewton(model, difference, **options)
    for batch in PARTS[:2]:
        optimizer.step(batch)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    for batch in PARTS:
        optimizer.step(batch)

    other = adapted()
    state, of_optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state)
    resumed = GaussNewton(other, difference, **options)
    resumed.load_state_dict(of_optimizer)
    for batch in PARTS:
        resumed.step(batch)
    assert_equal(values(other), values(model))


def test_the_loop_of_accelerate_takes_it():
    plain, model = adapted(), adapted()
    optimizer = GaussNewton(plain, difference)
    expected = [optimizer.step(batch) for batch in PARTS]

    accelerator = Accelerator(cpu=True)
    loader = DataLoader(TensorDataset(X, Y), batch_size=80)
    optimizer = GaussNewton(model, difference)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        optimizer.step(tuple(batch))
    assert len(expected) == 3
    assert_equal(values(model), values(plain))


def test_where_nothing_is_left_to_gain_the_parameters_stay():
    model = adapted()
    before = values(model)
    with torch.no_grad():
        targets = model(X)
    optimizer = GaussNewton(model, difference)
    assert optimizer.step((X, targets)) == 0
    assert_equal(values(model), before)


def test_refusals():
    model = adapted()
    for wrong in (0, -1.0, 2.0, "a"):
        with pytest.raises(ValueError, match="`lr` should be"):
            GaussNewton(model, difference, lr=wrong)
    with pytest.raises(ValueError, match="`damping` should be a finite number above 0"):
        GaussNewton(model, difference, damping=0)
    optimizer = GaussNewton(model, difference)
    with pytest.raises(ValueError, match="GaussNewton has one group of parameters"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(TypeError, match="`data` should be made of tensors with a batch axis"):
        optimizer.step(None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="`model` has no trainable parameters"):
        GaussNewton(model, difference)


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # transformers before 5.6
@pytest.mark.slow
def test_trainer_takes_it_and_resumes_it(tmp_path):
    def run(folder, epochs):
        done = call("gauss_newton_trainer", "--epochs", epochs, "--output-dir", tmp_path / folder)
        assert "Adapter: " in done.out

    run("stopped", 1)
    run("stopped", 2)
    run("straight", 2)
    (stopped,), (straight,) = (
        [load_file(path) for path in (tmp_path / folder).rglob("adapter_model.safetensors")]
        for folder in ("stopped", "straight")
    )
    assert stopped.keys() == straight.keys()
    for name in straight:
        assert_equal(stopped[name], straight[name], 0)
