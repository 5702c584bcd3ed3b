"""`fit_gauss_newton` against dense least squares: its steps, what moves, how it ends, goes on and refuses."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import approx, assert_different, assert_equal, within
from kan_layers import EinsumKANLayer
from layer_table import config, make, randomize
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, jvp

from peft_lotra import fit_gauss_newton
from peft_lotra.training.damped_system import Equation, NormalEquations, ResidualSpace
from peft_lotra.training.gauss_newton import GaussNewtonResult
from peft_lotra.training.problem import Problem

# Steps are compared here, not fits: few points are enough.
pytestmark = pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")

KAN = "o (d i)"


def points(rows, dtype=torch.float64, seed=3):
    return 2 * torch.rand(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype) - 1


def target(x):
    return torch.stack([torch.sin(2 * x[:, 0]) * x[:, 1], x.square().sum(dim=1)], dim=1)


def regression(net, x):
    return net(x) - target(x)


def laplacian(net, x):
    """Σ ∂²u_0/∂x_k² − f, shape (N,)."""

    def along(f, axis):
        def derivative(x):
            direction = torch.zeros_like(x)
            direction[:, axis] = 1
            return jvp(f, (x,), (direction,))[1]

        return derivative

    return sum(along(along(net, axis), axis)(x)[:, 0] for axis in range(3)) - target(x)[:, 0]


def laplacian_by_autograd(net, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[:, 0].sum(), x, create_graph=True)
    seconds = [torch.autograd.grad(gradient[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(3)]
    return sum(seconds) - target(x)[:, 0]


def adapted(dtype=torch.float64, seed=0, core=0.2, **kwargs):
    torch.manual_seed(seed)
    model = get_peft_model(make(KAN, dtype)[0], config(KAN, **kwargs), autocast_adapter_dtype=False)
    randomize(model, std=core)
    return model


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def fit(model, residual_fn=regression, data=None, **kwargs):
    data = points(60) if data is None else data
    return fit_gauss_newton(model, residual_fn, data, progressbar=False, **kwargs)


def oracle_step(model, residual_fn, data, damping):
    """argmin ‖r + Jδ‖² + λ ‖D^½ δ‖², as one dense least-squares problem, with J by `torch.autograd.functional`."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    shapes = [model.get_parameter(name).shape for name in names]

    def residuals(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        rows = residual_fn(lambda x: functional_call(model, values, (x,)), data)
        return rows.flatten() / len(data) ** 0.5

    J = torch.autograd.functional.jacobian(residuals, trained(model)).numpy()
    r = residuals(trained(model)).detach().numpy()
    squares = (J**2).sum(axis=0)
    damped = np.diag(np.sqrt(damping * (squares + 1e-2 * squares.mean())))
    return np.linalg.lstsq(np.vstack([J, damped]), np.concatenate([-r, np.zeros(J.shape[1])]), rcond=None)[0]


@pytest.mark.parametrize("rows", [5, 60])
@pytest.mark.parametrize(
    ("residual_fn", "by_autograd", "damping"),  # with which the first step reduces the loss
    [(regression, regression, 10.0), (laplacian, laplacian_by_autograd, 50.0)],
)
def test_step_equals_dense_least_squares(residual_fn, by_autograd, damping, rows):
    model, data = adapted(), points(rows)
    before = trained(model)
    assert (rows == 60) == (2 * rows > len(before))  # both forms are met
    expected = before.numpy() + oracle_step(model, by_autograd, data, damping=damping)
    result = fit(model, residual_fn, data, damping=damping, iterations=1)
    assert result.losses[1] < 0.9 * result.losses[0]
    assert_different(trained(model), before)
    assert_equal(trained(model), torch.from_numpy(expected), 1e-8)
    with torch.no_grad():
        residuals = residual_fn(model, data)
    assert result.losses[-1] == approx(residuals.square().sum().item() / rows, rel=1e-12)


@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_both_forms_agree(damping):
    J, r = torch.randn(30, 17, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    J[:, 3] = 0  # a factor whose core is zero
    forms = [form(Equation(J.split(7), r, torch.zeros(17))) for form in (NormalEquations, ResidualSpace)]
    steps = [form.step(damping) for form in forms]
    assert_equal(steps[1], steps[0], 1e-8)
    gain = r.square().sum() - (r + J @ steps[0]).square().sum()
    cosines = (J.T @ r).abs() / (J.norm(dim=0) * r.norm())
    for form, step in zip(forms, steps, strict=True):
        assert form.predicted_gain(step, damping).item() == approx(gain.item(), rel=1e-6)
        assert form.cosine(r.square().sum().item()) == approx(cosines.nan_to_num(0.0).max().item())


def test_linear_model_is_solved():
    # One layer of coefficients: least squares has one solution, and numpy finds it.
    layer, x, y = EinsumKANLayer(3, 2).double(), points(80), torch.randn(80, 2, dtype=torch.float64)
    basis = torch.autograd.functional.jacobian(lambda w: functional_call(layer, {"coeffs": w}, (x,)), layer.coeffs)
    solution = np.linalg.lstsq(basis.reshape(160, -1).numpy(), y.flatten().numpy(), rcond=None)[0]
    result = fit(layer, lambda net, batch: net(batch["x"]) - batch["y"], {"x": x, "y": y}, loss_tolerance=1e-14)
    assert result.reason in ("loss", "gradient", "damping")
    assert_equal(layer.coeffs.detach().flatten(), torch.from_numpy(solution), 1e-6)


def test_several_kinds_of_residuals_are_summed_as_means():
    data = {"inside": points(40), "edge": points(9, seed=4)}
    result = fit(adapted(), {"inside": laplacian, "edge": regression}, data, iterations=2)
    model = adapted()
    kinds = ((laplacian, data["inside"]), (regression, data["edge"]))
    means = (kind(model, x).square().sum() / len(x) for kind, x in kinds)
    assert result.losses[0] == approx(sum(means).item(), rel=1e-12)
    assert result.losses[2] < result.losses[1] < result.losses[0]


@pytest.mark.parametrize("rows", [5, 60])
def test_residuals_may_have_further_axes(rows):
    flat, deep = adapted(), adapted()
    fit(flat, data=points(rows), iterations=2)
    fit(deep, lambda net, x: regression(net, x).unflatten(1, (2, 1, 1)), points(rows), iterations=2)
    assert_equal(trained(deep), trained(flat), 0)


@pytest.mark.parametrize("rows", [5, 60])
def test_chunks_do_not_change_the_result(rows):
    models = adapted(), adapted()
    calls = [0, 0]
    for k, max_memory in enumerate((200_000, 2**32)):

        def counted(net, x, k=k):
            calls[k] += 1
            return regression(net, x)

        fit(models[k], counted, points(rows), iterations=4, max_memory=max_memory)
    assert calls[0] > calls[1] or rows == 5
    assert_different(trained(models[0]), trained(adapted()))
    assert_equal(trained(models[0]), trained(models[1]), 1e-7)


def test_fp32_model_is_solved_in_fp64():
    models = adapted(), adapted(torch.float32)
    models[1].load_state_dict(models[0].state_dict())
    start = trained(models[0])
    for model in models:
        fit(model, data=points(60, next(model.parameters()).dtype), iterations=1, damping=1e-3)
    assert trained(models[1]).dtype == torch.float32
    moved, other = (trained(model).double() - start for model in models)
    assert (moved - other).norm() < 0.05 * moved.norm()  # the rounding of J is amplified by the solution


def test_only_the_trainable_adapter_moves():
    model = adapted()
    model.add_adapter("second", config(KAN, r=1))
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_("second" in name)
    randomize(model, "second", std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, iterations=2)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name]) == ("second" not in name), name


def fresh(iteration):
    return points(50, seed=iteration)


def test_resumed_equals_uninterrupted():
    whole, halves = adapted(), adapted()
    expected = fit(whole, data=fresh, iterations=6)
    first = fit(halves, data=fresh, iterations=3)
    assert (first.reason, first.iterations) == ("iterations", 3)
    stored = GaussNewtonResult(**json.loads(json.dumps(asdict(first))))
    second = fit(halves, data=fresh, iterations=6, resume_from=stored)
    assert second == expected
    assert len(second.losses) == 7
    assert_equal(trained(halves), trained(whole), 0)


def test_fixed_points_resume_too():
    whole, halves = adapted(), adapted()
    expected = fit(whole, iterations=4)
    assert fit(halves, iterations=4, resume_from=fit(halves, iterations=2)) == expected
    assert_equal(trained(halves), trained(whole), 0)


def test_interrupt_keeps_the_last_step():
    def interrupting(result):
        if result.iterations == 2:
            raise KeyboardInterrupt

    model = adapted()
    result = fit(model, callback=interrupting)
    assert (result.reason, result.iterations) == ("interrupted", 2)
    loss = regression(model, points(60)).square().sum().item() / 60
    assert loss == approx(result.losses[2], rel=1e-12)
    assert fit(model, iterations=3, resume_from=result) == fit(adapted(), iterations=3)


def test_interrupt_amid_writing(monkeypatch):
    write = Problem.write

    def interrupted_write(self, theta):
        monkeypatch.setattr(Problem, "write", write)
        next(iter(self.trained.values())).data.fill_(7.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Problem, "write", interrupted_write)
    model, expected = adapted(), adapted()
    result = fit(model)
    assert (result.reason, result.iterations) == ("interrupted", 1)
    fit(expected, iterations=1)
    assert_equal(trained(model), trained(expected), 0)


def test_callback_meets_the_new_parameters():
    model, losses = adapted(), []
    result = fit(model, iterations=3, callback=lambda _: losses.append(regression(model, points(60)).square().sum()))
    assert [loss.item() / 60 for loss in losses] == approx(result.losses[1:], rel=1e-12)


@pytest.mark.parametrize(("start", "factor"), [(0.5, 1 / 4), (1.35, 1), (1.45, 5), (3.0, 5**3 / 4)])
def test_damping_follows_the_gain(start, factor):
    # Steps overshoot: from 1.35 the first gains a tenth of what is predicted, from further out it loses. By hand.
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, start)
    one = torch.ones(4, 1, dtype=torch.float64)
    result = fit(model, lambda net, x: net(x).atan(), one, iterations=1, damping=0.02)
    assert result.damping == approx(0.02 * factor)


def test_scale_of_the_residuals_does_not_matter():
    models = adapted(), adapted()
    results = [
        fit(model, lambda net, x, c=c: c * regression(net, x), loss_tolerance=0.05)
        for model, c in zip(models, (1.0, 1e-4), strict=True)
    ]
    assert results[0].iterations == results[1].iterations > 2
    assert results[0].reason == results[1].reason == "loss"
    assert_equal(trained(models[1]), trained(models[0]), 1e-6)


def test_rounding_errors_of_a_fitted_model_are_not_taken_for_mixing():
    model, x = adapted(), points(60)
    y = model(x).detach()
    fit(model, lambda net, batch: net(batch[0]) - batch[1] + 1e-9 * len(batch[0]), (x, y))


def test_an_error_keeps_the_last_step():
    model, done = adapted(), []

    def failing(net, x):
        if len(done) == 2:
            raise RuntimeError("out of luck")
        return regression(net, x)

    before = trained(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(model, failing, callback=done.append)
    assert_different(trained(model), before)
    assert regression(model, points(60)).square().sum() < regression(adapted(), points(60)).square().sum()


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("iterations", {"iterations": 2}),
        ("gradient", {"gradient_tolerance": 0.5}),
        ("loss", {"loss_tolerance": 0.5, "iterations": 50}),
        ("seconds", {"max_seconds": 1e-9}),
        ("callback", {"callback": lambda result: result.reason == "running"}),
        ("damping", {"loss_tolerance": 0, "gradient_tolerance": 0, "data": points(3), "iterations": 400}),
    ],
)
def test_reasons(reason, arguments):
    assert fit(adapted(core=0.5), **arguments).reason == reason


@pytest.mark.parametrize("callback", [[].append, bool, lambda *results: None, lambda result, more=0: None])
def test_callbacks_of_every_form_that_takes_one_result(callback):
    assert fit(adapted(), iterations=1, callback=callback).iterations == 1


def test_points_learnt_by_heart_end_without_a_step():
    model = adapted()
    result = fit(model, lambda net, x: net(x) - net(x).detach())
    assert (result.reason, result.iterations, result.losses) == ("gradient", 0, (0.0,))


def test_the_first_loss_is_known_where_the_first_iteration_ends_the_fit():
    def uphill(net, x):  # whatever the step, r grows, while its derivative is not zero
        y = net(x)
        return 1 + torch.where(y >= 0, y, -2 * y)

    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    result = fit(model, uphill, torch.ones(4, 1, dtype=torch.float64))
    assert (result.reason, result.iterations, result.losses) == ("damping", 0, (1.0,))
    assert model.weight.item() == 0


def test_the_first_loss_is_known_where_the_first_step_is_interrupted(monkeypatch):
    def interrupted(self, point):
        raise KeyboardInterrupt

    monkeypatch.setattr(Problem, "rows", interrupted)
    model = adapted()
    result = fit(model)
    loss = regression(model, points(60)).square().sum().item() / 60
    assert (result.reason, result.iterations, result.losses) == ("interrupted", 0, (approx(loss, rel=1e-12),))


X = points(8)
BAD = [
    ({"data": X[:0]}, ValueError, r"`data` should have one number of rows, above zero, .*\(0, 3\)"),
    ({"data": (X, X[:3])}, ValueError, r"one number of rows.*\(8, 3\), \(3, 3\)"),
    ({"data": (X, 3.0)}, TypeError, r"`data` should be made of tensors.*3\.0"),
    ({"residual_fn": {"a": regression}, "data": X}, ValueError, r"keys of `residual_fn`, \['a'\]"),
    ({"residual_fn": {"a": regression}, "data": {"b": X}}, ValueError, r"\['a'\], but it has the keys \['b'\]"),
    ({"residual_fn": {"a": regression}, "data": {"a": X[:0]}}, ValueError, r"`data\['a'\]`"),
    ({"residual_fn": None}, TypeError, "`residual_fn` should be a function"),
    ({"residual_fn": {}}, TypeError, "`residual_fn` should be a function"),
    ({"residual_fn": lambda net, x: regression(net, x).square().mean()}, ValueError, r"not their mean.*of shape \(\)"),
    ({"residual_fn": lambda net, x: None}, TypeError, "made by torch from what `net` returns, but it gave a NoneType"),
    ({"residual_fn": lambda net, x: regression(net, x).detach().numpy()}, TypeError, "it gave a ndarray"),
    ({"residual_fn": lambda net, x: 0.0}, TypeError, "it gave a float"),
    ({"residual_fn": lambda net, x: regression(net, x) > 0}, TypeError, r"it gave one of torch\.bool"),
    ({"residual_fn": lambda net, x: regression(net, x).int()}, TypeError, r"it gave one of torch\.int32"),
    ({"residual_fn": lambda net, x: regression(net, x) + 0j}, TypeError, r"it gave one of torch\.complex128"),
    ({"residual_fn": {"a": lambda net, x: 3}, "data": {"a": X}}, TypeError, r"`residual_fn\['a'\]` should give a"),
    ({"callback": 3}, TypeError, "`callback` should be a function of one GaussNewtonResult but the value passed is 3"),
    ({"callback": lambda: None}, TypeError, "`callback` should be a function of one GaussNewtonResult"),
    ({"callback": lambda result, *, more: None}, TypeError, "`callback` should be a function of one"),
    ({"callback": []}, TypeError, r"`callback` .*\[\]"),
    ({"residual_fn": lambda net, x: net(x) * float("nan")}, ValueError, "finite residuals, but 16 of 16"),
    (
        {"residual_fn": lambda net, x: net(x) * 0 + (x.sum(1, True) * 0).sqrt() * net(x)},
        ValueError,
        "every derivative",
    ),
    ({"residual_fn": lambda net, x: (net(x) - net(x).detach()).abs().sqrt()}, ValueError, "derivatives .* not finite"),
    ({"residual_fn": lambda net, x: target(x)}, ValueError, "does not depend on the trainable parameters"),
    ({"residual_fn": lambda net, x: net(x) - net(x).mean(0)}, ValueError, "from this sample alone"),
    ({"residual_fn": laplacian_by_autograd}, ValueError, "with `torch.func`"),
    ({"damping": 0}, ValueError, "`damping` should be a finite number above 0 but the value passed is 0"),
    ({"damping": float("nan")}, ValueError, "`damping`.*nan"),
    ({"iterations": 0}, ValueError, "`iterations` should be a whole number of at least 1"),
    ({"iterations": 2.5}, ValueError, "`iterations`.*2.5"),
    ({"gradient_tolerance": -1}, ValueError, "`gradient_tolerance` should be a finite number of at least 0"),
    ({"loss_tolerance": "x"}, ValueError, "`loss_tolerance`.*'x'"),
    ({"max_seconds": 0}, ValueError, "`max_seconds`"),
    ({"max_memory": True}, ValueError, "`max_memory`"),
    ({"resume_from": 3}, TypeError, "`resume_from`"),
    ({"data": X.numpy()}, TypeError, r"`data` should be made of tensors.*'ndarray'.*torch\.as_tensor"),
    ({"data": X.float()}, ValueError, r"`data` has tensors of torch.float32 beside a model of torch.float64: convert"),
    (
        {"residual_fn": lambda net, x: net(x)[:, :1] - target(x)[:, 0]},
        ValueError,
        r"\(4, 4\) for 4 .*\(1, 1\) for one",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_errors_come_before_any_change(arguments, error, message):
    model = adapted()
    before = trained(model)
    with pytest.raises(error, match=message):
        fit(model, **{"data": X, **arguments})
    assert_equal(trained(model), before, 0)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="`model` has no trainable parameters.*set_adapter"):
        fit(adapted().requires_grad_(False))


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(2)])
def test_layers_that_do_not_repeat_are_refused_before_they_run(layer):
    model = nn.Sequential(nn.Linear(3, 2), layer).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} in train mode, 1, .*call `model.eval\(\)`"):
        fit(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    fit(model.eval(), iterations=1)


@pytest.mark.parametrize("raises", [False, True])
def test_data_that_are_not_finite_end_a_fit_at_its_last_good_state(raises):
    def data(iteration):
        return {"good": points(60), "bad": points(60) * (float("nan") if iteration == 2 else 1)}

    model, expected = adapted(), adapted()
    functions = {"good": regression, "bad": regression}
    good = fit_gauss_newton(expected, functions, lambda _: data(0), iterations=2, progressbar=False)
    message = r"the residuals of `data\['bad'\]` are not finite in iteration 3"
    with pytest.raises(ValueError, match=message) if raises else pytest.warns(UserWarning, match=message):
        result = fit_gauss_newton(model, functions, data, iterations=5, raise_on_nan=raises, progressbar=False)
        assert (result.reason, result.iterations, result.losses) == ("not finite", 2, good.losses)
    assert_equal(trained(model), trained(expected), 0)


def test_steps_that_are_not_finite_are_told_from_steps_that_do_not_help():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.0)

    def residual(net, x):  # finite at zero only
        return (net(x) - 1) / (net(x) == 0)

    with pytest.warns(UserWarning, match="the residuals of `data` are not finite in iteration 1"):
        result = fit_gauss_newton(model, residual, torch.ones(3, 1).double(), iterations=3, progressbar=False)
    assert (result.reason, model.weight.item()) == ("not finite", 0.0)


def test_rounding_errors_of_a_fitted_base_are_no_batch_mean():
    """A fresh adapter on a base that solves the task: its residuals are rounding errors, which depend on the batch."""
    model = adapted(core=0.0)
    with torch.no_grad():
        y = model(X)

    def residual(net, batch):
        x, y = batch
        return net(x) - y + 1e-9 * len(x)

    result = fit_gauss_newton(model, residual, (X, y), iterations=1, progressbar=False)
    assert result.losses[0] < within(1e-12)
