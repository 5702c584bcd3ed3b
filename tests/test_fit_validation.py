"""What keeps `fit_gauss_newton` from learning its points by heart: validation, a prior, and a warning."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from conftest import approx, assert_different, assert_equal
from layer_table import config, make, randomize
from peft import get_peft_model
from torch import nn

from peft_lotra import fit_gauss_newton
from peft_lotra.training.damped_system import Equation, NormalEquations, ResidualSpace
from peft_lotra.training.gauss_newton import GaussNewtonResult

KAN, FP64 = "o (d i)", {"dtype": torch.float64}


def noisy(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(rows, 3, generator=generator, **FP64) - 1
    y = torch.stack([torch.sin(2 * x[:, 0]) * x[:, 1], x.square().sum(dim=1)], dim=1)
    return x, y + 0.3 * torch.randn(rows, 2, generator=generator, **FP64)


def adapted(dtype=torch.float64):
    torch.manual_seed(0)
    model = get_peft_model(make(KAN, dtype)[0], config(KAN), autocast_adapter_dtype=False)
    randomize(model, std=0.2)
    return model


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def difference(net, batch):
    return net(batch[0]) - batch[1]


def mean_square(model, data):
    with torch.no_grad():
        return difference(model, data).square().sum().item() / len(data[0])


def fit(model, data, **kwargs):
    return fit_gauss_newton(model, difference, data, **{"progressbar": False, "loss_tolerance": 0, **kwargs})


FEW, OTHERS = noisy(40, seed=1), noisy(200, seed=2)


def test_the_best_parameters_are_kept():
    model, courses = adapted(), []
    result = fit(
        model,
        FEW,
        validation=OTHERS,
        iterations=25,
        callback=lambda now: courses.append((mean_square(model, OTHERS), now.validation_losses[-1])),
    )
    assert len(result.validation_losses) == 26 == len(result.losses)
    assert all(measured == approx(expected, rel=1e-12) for measured, expected in courses)
    best = min(result.validation_losses)
    assert best < 0.9 * result.validation_losses[-1]  # it is overfitted
    assert best < 0.9 * result.validation_losses[0]
    assert mean_square(model, OTHERS) == approx(best, rel=1e-12)


def test_patience_ends_the_fit():
    model = adapted()
    result = fit(model, FEW, validation=OTHERS, iterations=50, patience=3)
    losses = result.validation_losses
    assert result.reason == "validation"
    assert losses.index(min(losses)) == len(losses) - 1 - 3 == result.iterations - 3
    whole = fit(adapted(), FEW, validation=OTHERS, iterations=result.iterations)
    assert (whole.losses, whole.validation_losses) == (result.losses, losses)


def test_a_metric_of_the_model():
    model, other = adapted(), adapted()
    result = fit(model, FEW, validation=lambda model: -100 * mean_square(model, OTHERS), iterations=9)
    expected = fit(other, FEW, validation=OTHERS, iterations=9)
    assert result.validation_losses == approx([-100 * loss for loss in expected.validation_losses], rel=1e-12)
    assert result.losses == expected.losses
    assert_different(trained(model), trained(other))  # the largest loss, and the least
    tensor = fit(adapted(), FEW, validation=lambda model: torch.tensor([2.0]), iterations=2, patience=1)
    assert (tensor.reason, tensor.iterations, tensor.validation_losses) == ("validation", 1, (2.0, 2.0))


def test_validation_of_several_kinds_and_another_loss():
    def pair(net, batch):
        return net(batch[0]), batch[1]

    data, other = ({"a": (x, y.exp()), "b": (x, y)} for x, y in (FEW, OTHERS))
    model = adapted()
    losses = {"a": "poisson", "b": "least_squares"}
    result = fit_gauss_newton(
        model,
        {"a": pair, "b": difference},
        data,
        loss=losses,
        validation=other,
        iterations=5,
        weight_decay=0.1,
        progressbar=False,
    )
    x, y = OTHERS
    o = model(x).detach()
    expected = (o.exp() - y.exp() * o).sum() / len(x) + mean_square(model, OTHERS)  # without the prior
    assert min(result.validation_losses) == approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"validation": True}, torch.float32),
        ({"weight_decay": 0.01}, torch.float64),
        ({"validation": True, "weight_decay": 1e-3}, torch.float64),
    ],
)
def test_resumed_equals_uninterrupted(arguments, dtype):
    data, other = (tuple(part.to(dtype) for part in pair) for pair in (FEW, OTHERS))
    if "validation" in arguments:
        arguments = arguments | {"validation": other}
    whole, halves, unlike = adapted(dtype), adapted(dtype), adapted(dtype)
    expected = fit(whole, data, iterations=23, **arguments)
    first = fit(halves, data, iterations=20, **arguments)
    if "validation" in arguments:
        assert first.validation_losses[-1] > min(first.validation_losses)  # the model does not hold the last θ
    stored = GaussNewtonResult(**json.loads(json.dumps(asdict(first))))
    second = fit(halves, data, iterations=23, resume_from=stored, **arguments)
    assert second == expected
    assert_equal(trained(halves), trained(whole), 0)
    fit(unlike, data, iterations=20, validation=lambda model: 1.0)
    assert_different(trained(whole), trained(unlike))


def test_resumed_from_a_callback():
    whole, halves, results = adapted(), adapted(), []
    expected = fit(whole, FEW, iterations=10, validation=OTHERS)
    fit(halves, FEW, iterations=9, validation=OTHERS, callback=results.append)
    assert fit(halves, FEW, iterations=10, validation=OTHERS, resume_from=results[6]) == expected
    assert_equal(trained(halves), trained(whole), 0)


def test_an_interrupt_and_an_error_keep_the_best():
    def failing(error):
        def callback(result):
            if result.iterations == 18:
                raise error

        return callback

    model = adapted()
    result = fit(model, FEW, validation=OTHERS, callback=failing(KeyboardInterrupt()))
    assert (result.reason, result.iterations) == ("interrupted", 18)
    assert mean_square(model, OTHERS) == approx(min(result.validation_losses), rel=1e-12)
    other = adapted()
    with pytest.raises(RuntimeError, match="no luck"):
        fit(other, FEW, validation=OTHERS, callback=failing(RuntimeError("no luck")))
    assert_equal(trained(other), trained(model), 0)


@pytest.mark.parametrize("damping", [1e-6, 1.0])
@pytest.mark.parametrize("rows", [11, 30])
def test_both_forms_agree_with_a_prior(damping, rows):
    J, r, away = torch.randn(rows, 17, **FP64), torch.randn(rows, **FP64), torch.randn(17, **FP64)
    J[:, 3] = 0
    decay = 0.3
    squares = J.square().sum(dim=0)
    D = squares + decay + 1e-2 * squares.mean()
    matrix = J.T @ J + decay * torch.eye(17, **FP64) + damping * torch.diag(D)
    expected = -torch.linalg.solve(matrix, J.T @ r + decay * away)
    change = (r + J @ expected).square().sum() + decay * (away + expected).square().sum()
    gain = r.square().sum() + decay * away.square().sum() - change
    for form in (NormalEquations, ResidualSpace):
        system = form(Equation(J.split(7), r, decay * away, decay))
        assert_equal(system.step(damping), expected, 1e-8)
        assert system.predicted_gain(expected, damping).item() == approx(gain.item(), rel=1e-6)


@pytest.mark.parametrize("rows", [4, 50])
def test_a_linear_model_with_a_prior_is_ridge_regression(rows):
    model, x, y = nn.Linear(3, 2, bias=False, **FP64), torch.randn(rows, 3, **FP64), torch.randn(rows, 2, **FP64)
    start = model.weight.detach().clone()
    result = fit(model, (x, y), weight_decay=0.2, gradient_tolerance=1e-12)
    moved = torch.linalg.solve(x.T @ x / rows + 0.2 * torch.eye(3), x.T @ (y - x @ start.T) / rows).T
    assert_different(model.weight.detach(), start)
    assert_equal(model.weight.detach(), start + moved, 1e-7)
    penalty = 0.2 * (model.weight.detach() - start).square().sum().item()
    assert result.losses[-1] == approx(mean_square(model, (x, y)) + penalty, rel=1e-10)


def test_few_points_are_warned_of():
    with pytest.warns(
        UserWarning, match="`data` give 80 residuals or labels for 74 trained numbers.*by heart.*`validation`"
    ) as got:
        fit(adapted(), FEW, iterations=1)
    assert got[0].filename == __file__
    with pytest.warns(UserWarning, match="by heart"):
        fit_gauss_newton(adapted(), lambda net, b: (net(b[0]), b[1].exp()), FEW, loss="poisson", iterations=1)
    x, y = noisy(160, seed=1)  # 320 outputs, but 120 labels
    labels = (y[:, 0] > 0).long().masked_fill(torch.arange(160) < 40, -100)
    with pytest.warns(UserWarning, match="`data` give 120 residuals or labels for 74"):
        fit_gauss_newton(adapted(), lambda net, b: (net(b[0]), b[1]), (x, labels), loss="cross_entropy", iterations=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(adapted(), noisy(74, seed=1), iterations=1)
        fit(adapted(), lambda iteration: FEW, iterations=1)
        fit(adapted(), FEW, validation=OTHERS, iterations=1)
        fit(adapted(), FEW, weight_decay=0.1, iterations=1)


KEPT = GaussNewtonResult((1.0,), 0.1, 1, "iterations", (), {"start": (0.0,) * 74})
BAD = [
    ({"patience": 2}, ValueError, "`patience` is 2, but there is no `validation` to wait for"),
    ({"validation": OTHERS, "patience": 0}, ValueError, "`patience` should be a whole number of at least 1 .* is 0"),
    ({"validation": 3}, TypeError, "`validation` should be made of tensors"),
    ({"validation": lambda: 1.0}, TypeError, "`validation` should be data, or a function of one model"),
    ({"validation": lambda model: "low"}, TypeError, "`validation` should return one .* gave 'low'"),
    ({"validation": lambda model: float("nan")}, ValueError, "finite at the start but it gave nan"),
    ({"validation": lambda iteration: FEW}, TypeError, "`validation` should return one number"),
    ({"validation": (FEW[0], FEW[1][:3])}, ValueError, r"`validation` should have one number of rows"),
    ({"validation": (FEW[0] * float("nan"), FEW[1])}, ValueError, "finite residuals, .* on `validation`"),
    ({"weight_decay": -1}, ValueError, "`weight_decay` should be a finite number of at least 0 .* is -1"),
    ({"weight_decay": None}, ValueError, "`weight_decay`.*None"),
    ({"resume_from": KEPT}, ValueError, r"`resume_from` .* parameters \{\}, but this result holds \{'start': 74\}"),
    ({"weight_decay": 0.1, "resume_from": GaussNewtonResult((1.0,), 0.1, 1, "iterations")}, ValueError, "'start': 74"),
    ({"validation": OTHERS, "resume_from": KEPT}, ValueError, "'last': 74, 'best': 74"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_errors_come_before_any_change(arguments, error, message):
    model = adapted()
    before = trained(model)
    with pytest.raises(error, match=message):
        fit(model, noisy(74, seed=1), **arguments)
    assert_equal(trained(model), before, 0)
