"""Families of tasks with codes, against the dense sum of einsum; tasks from a few samples."""

import copy
import json
import math
import sys
import warnings

import pytest
import torch
from conftest import assert_different, assert_equal, parts
from family_models import X, fill
from kan_layers import ChebyKAN
from peft import PeftModel, get_peft_model
from sklearn.covariance import LedoitWolf
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    adapter_at,
    add_task,
    at_task,
    change_range,
    family_from,
    fit_gauss_newton,
    fit_task,
    hotswap_adapter,
    load_task,
    normalize_codes,
    remove_task,
    rename_task,
    save_task,
    summary,
    task_noise,
)
from peft_lotra.layers.lotra import adapted_tensors

TASKS = ["water", "ammonia", "a.b", "argon"]


def family(k=2, tasks=TASKS, r=3, **kwargs):
    torch.manual_seed(0)
    base = ChebyKAN([3, 6, 2])
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=r, family=tasks, family_code=k, **kwargs))
    fill(model)
    return base, model


def codes_of(model, adapter="default"):
    """The one table of codes."""
    (table,) = [
        layer.lotra_codes[adapter] for layer in adapted_tensors(model).values() if adapter in layer.lotra_codes
    ]
    return table


def at_weights(base, model, c, adapter="default"):
    """A copy of `base` with A + s · Σ_p c_p G[..., p] ×₁ U1 ×₂ U2 ×₃ U3, by one einsum."""
    oracle = copy.deepcopy(base)
    for name, layer in adapted_tensors(model).items():
        core, *sides, _ = parts(layer.tucker(adapter))
        eyes = [torch.eye(size) for size in layer.spec.layout.canonical_shape]
        sides = [eye if U is None else U for U, eye in zip(sides, eyes, strict=False)]
        update = torch.einsum("abcp,ia,ob,dc,p->iod", core, *sides, c)
        parameter = oracle.get_parameter(name)
        parameter.data += layer.scaling[adapter] * update.detach()  # ChebyKAN keeps (i, o, d)
    return oracle


def linear(z):
    """c of degree 1."""
    return torch.cat([torch.ones(1), z])


# Passes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [3, (None, 2, None), (None, None, None)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_task_is_at_its_code(r, k):
    base, model = family(k, r=r, alpha=0.7)
    codes = codes_of(model)
    assert codes.shape == (4, k)
    expected = [at_weights(base, model, linear(z))(X) for z in codes]
    assert_different(expected[0], expected[1])
    for place, (task, y) in enumerate(zip(TASKS, expected, strict=True)):
        with at_task(model, task=task):
            assert_equal(model(X), y)
        with at_task(model, task=torch.tensor(place)):
            assert_equal(model(X), y)
        with at_task(model, code=codes[place].detach()):
            assert_equal(model(X), y)
        assert_equal(model(X, lotra_task=task), y)
    rows = [0, 2, 1, 1, 0, 3, 2, 0]
    y = torch.stack([expected[row][k] for k, row in enumerate(rows)])
    for given in ([TASKS[row] for row in rows], torch.tensor(rows)):
        with at_task(model, task=given):
            assert_equal(model(X), y)
    with at_task(model, code=codes[rows]):
        assert_equal(model(X), y)


def test_codes_of_degree_2_beside_a_parameter():
    """Products of Chebyshev polynomials of λ, z1 and z2, of total degree 2, written out."""
    base, model = family(2, {"lam": (1.0, 3.0), "fluid": TASKS}, family_degree=2)
    x, (u, v) = 2 * (1.4 - 1) / 2 - 1, codes_of(model)[1].tolist()
    T = [lambda t: 1.0, lambda t: t, lambda t: 2 * t * t - 1]
    pairs = [(total, a, b) for total in range(3) for a in range(total, -1, -1) for b in range(total - a, -1, -1)]
    degrees = [(a, b, total - a - b) for total, a, b in pairs]
    c = torch.tensor([T[a](x) * T[b](u) * T[d](v) for a, b, d in degrees])
    with at_task(model, lam=1.4, fluid="ammonia"):
        assert_equal(model(X), at_weights(base, model, c)(X))
    lam = torch.linspace(1, 3, 8)
    with at_task(model, lam=lam, fluid=TASKS * 2):
        y = model(X)
    for k in range(8):
        with at_task(model, lam=lam[k].item(), fluid=TASKS[k % 4]):
            assert_equal(y[k], model(X)[k])


def test_derivatives_are_those_of_the_dense_sum():
    _, model = family()
    names = [TASKS[k % 4] for k in range(8)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p is codes_of(model) for p in trained)
    with at_task(model, task=names):
        actual = torch.autograd.grad(model(X).square().sum(), trained)
    total = 0
    for k, name in enumerate(names):
        with at_task(model, task=name):
            total = total + model(X[k : k + 1]).square().sum()
    for a, e in zip(actual, torch.autograd.grad(total, trained), strict=True):
        assert e.any()
        assert_equal(a, e)


def test_codes_are_read_in_every_pass():
    base, model = family()
    with at_task(model, task="water"):
        before = model(X)
        with torch.no_grad():
            codes_of(model).mul_(-2)
        assert_different(model(X), before)
        assert_equal(model(X), at_weights(base, model, linear(codes_of(model)[0]))(X))


@pytest.mark.slow
def test_compiled():
    _, model = family()
    compiled = torch.compile(model, backend="eager")
    for task in ("water", [*TASKS] * 2, torch.tensor([0, 1, 2, 3] * 2), {"code": torch.randn(8, 2)}):
        assert_equal(compiled(X, lotra_task=task), model(X, lotra_task=task))
    with torch.no_grad():
        codes_of(model).mul_(2)
    assert_equal(compiled(X, lotra_task="water"), model(X, lotra_task="water"))
    slopes = [torch.autograd.grad(net(X, lotra_task=TASKS * 2).sum(), codes_of(model)) for net in (compiled, model)]
    assert_equal(slopes[0][0], slopes[1][0])


def test_thousands_of_tasks():
    names = [f"task {k}" for k in range(5000)]
    base, model = family(3, names)
    with at_task(model, task=names[4990:4998]):
        y = model(X)
    z = codes_of(model)[4997]
    assert_equal(y[7], at_weights(base, model, linear(z))(X)[7])


# Fits ----------------------------------------------------------------------------------------------------------------


def samples(count=30):
    """y = sin(a x1) + a x2 for tasks that differ in a; the last two are not among the family's."""
    torch.manual_seed(1)
    a = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.8, 1.7])
    x = torch.rand(count, 3) * 2 - 1
    y = torch.stack([torch.sin(x[:, :2] * s) + s * x[:, 1:] for s in a])
    return x, y


@pytest.fixture(scope="module")
def fitted():
    torch.set_default_dtype(torch.float64)
    base, model = family(1, r=(None, None, None))
    x, y = samples()
    data = {"x": x.repeat(4, 1), "task": torch.arange(4).repeat_interleave(len(x)), "y": y[:4].flatten(0, 1)}

    def residual(net, batch):
        with at_task(model, task=batch["task"]):
            return net(batch["x"]) - batch["y"]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fitted by heart", UserWarning)
        result = fit_gauss_newton(model, residual, data, iterations=40, progressbar=False)
    assert result.losses[-1] < 1e-3 * result.losses[0]
    return model


def difference(net, batch):
    return net(batch[0]) - batch[1]


def test_a_new_task_from_a_few_samples(fitted):
    model = copy.deepcopy(fitted)
    x, y = samples()
    fit = fit_task(model, "new", difference, (x[:5], y[4, :5]), noise=0.02)
    mean, std = fit.predict(x)
    before = [((model(x, lotra_task=name) - y[4]).square().mean()).sqrt() for name in TASKS]
    assert (mean - y[4]).square().mean().sqrt() < min(before) / 3
    assert mean.shape == std.shape == y[4].shape
    assert (std >= 0.02).all()
    assert model.peft_config["default"].family == [*TASKS, "new"]
    assert_equal(codes_of(model)[4], fit.code)
    with at_task(model, task="new"):
        assert_equal(model(x), mean)


def test_the_minimum_and_the_covariance_are_those_of_a_dense_formula(fitted):
    """The gradient of ½ Σ (r/σ)² + ½ |z − μ|²_Σ⁻¹ is zero, and C is the inverse of JᵀJ/σ² + Σ⁻¹, by differences."""
    x, y = samples()
    fit = fit_task(fitted, None, difference, (x[:4], y[5, :4]), noise=0.05, iterations=50)
    codes = codes_of(fitted).detach()

    def r(z):
        with torch.no_grad(), at_task(fitted, code=z):
            return ((fitted(x[:4]) - y[5, :4]) / 0.05).flatten()

    h = 1e-5
    J = (r(fit.code + h) - r(fit.code - h)) / (2 * h)
    precision = torch.as_tensor(LedoitWolf().fit(codes.numpy()).precision_)
    slope = J @ r(fit.code) + precision @ (fit.code - codes.mean(0))
    assert slope.abs().max() < 1e-3 * (J.abs() @ r(fit.code).abs())
    assert_equal(fit.covariance, torch.linalg.inv(J @ J + precision), 1e-5)


def test_a_prior_of_ones_own(fitted):
    """A narrow one decides; with one like that of the tasks, the result is the same."""
    x, y = samples()
    narrow = torch.tensor([0.3]), torch.tensor([[1e-12]])
    with pytest.warns(UserWarning, match="the samples say nothing"):
        fit = fit_task(fitted, None, difference, (x, y[4]), noise=1.0, prior=narrow)
    assert_equal(fit.code, narrow[0], 1e-6)
    codes = codes_of(fitted).detach()
    same = codes.mean(0), torch.as_tensor(LedoitWolf().fit(codes.numpy()).covariance_)
    fits = [fit_task(fitted, None, difference, (x[:4], y[4, :4]), noise=0.05, prior=p) for p in (None, same)]
    assert_equal(fits[0].code, fits[1].code, 1e-6)


def test_parameters_from_sensors():
    """An inverse problem: λ of a family, from values at five points."""
    torch.manual_seed(0)
    base = ChebyKAN([3, 6, 2])
    model = get_peft_model(base, LoTRAConfig(r=3, family={"lam": (1.0, 3.0)}, family_degree=2))
    fill(model)
    with torch.no_grad(), at_task(model, lam=1.7):
        y = model(X[:5])
    fit = fit_task(model, None, difference, (X[:5], y), noise=1e-3)
    assert fit.task["lam"] == pytest.approx(1.7, abs=1e-2)
    assert 0 < fit.deviations["lam"] < 1e-2
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with at_task(model, lam=3.4):
            y = model(X[:5])
    with pytest.warns(UserWarning, match="`lam` is outside of the family's range"):
        fit = fit_task(model, None, difference, (X[:5], y), noise=1e-3)
    assert fit.task["lam"] == pytest.approx(3.4, abs=5e-2)


def test_noise_that_nobody_knows_is_estimated(fitted):
    x, y = samples(400)
    noisy = y[4] + torch.tensor([0.1, 0.3]) * torch.randn(400, 2)
    fit = fit_task(fitted, None, difference, (x, noisy))
    assert (fit.noise[0] / torch.tensor([0.1, 0.3]) - 1).abs().max() < 6 / math.sqrt(2 * 400) + 0.1


def test_the_next_sample_is_the_one_that_lowers_the_variance_most(fitted):
    x, y = samples()
    fit = fit_task(fitted, None, difference, (x[:2], y[4, :2]), noise=0.05)
    chosen = fit.suggest(x, 2)
    _, J = fit._with_jacobian((x,), {})

    def variance(rows):
        precision = torch.linalg.inv(fit.covariance)
        for row in rows:
            precision = precision + J[row].T @ J[row] / 0.05**2
        return torch.einsum("nok,kl,nol->", J, torch.linalg.inv(precision), J)

    first = min(range(len(x)), key=lambda row: variance([row]))
    second = min((row for row in range(len(x)) if row != first), key=lambda row: variance([first, row]))
    assert chosen == [first, second]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "water"}, "`name` should be a new name"),
        ({"name": 3}, "`name` should be a new name"),
        ({"prior": (torch.zeros(1), -torch.eye(1))}, "`prior` should be a mean of the shape"),
        ({"prior": (torch.zeros(2), torch.eye(2))}, r"`prior` should be a mean of the shape \(1,\)"),
        ({"train": "all"}, "`train` should be 'code' or 'core'"),
        ({"train": "core", "noise": 0.1}, "give what `task_noise` returns"),
        ({"starts": 0}, "`starts` should be a positive integer"),
        ({"iterations": True}, "`iterations` should be a positive integer"),
        ({"noise": -1.0}, "`noise` should be a positive number"),
        ({"noise": torch.ones(3)}, "or one for each of 2 outputs"),
        ({"data": (X[:0], torch.zeros(0, 2))}, "with at least one row"),
        ({"data": (X[:2], torch.full((2, 2), torch.nan))}, "returns NaN or infinity"),
        ({"residual": lambda net, data: 1.0}, "`residual` should return tensors"),
    ],
)
def test_bad_input_changes_nothing(kwargs, message, fitted):
    given = {"name": "new", "residual": difference, "data": (X[:2], torch.zeros(2, 2)), **kwargs}
    before = {key: value.clone() for key, value in fitted.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        fit_task(fitted, **given)
    assert fitted.peft_config["default"].family == TASKS
    assert all(torch.equal(value, before[key]) for key, value in fitted.state_dict().items())


def test_a_missing_package_is_named(fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.covariance", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        fit_task(fitted, "new", difference, (X[:2], torch.zeros(2, 2)))
    assert fitted.peft_config["default"].family == TASKS


def test_what_the_samples_do_not_say_is_told(fitted):
    with pytest.warns(UserWarning, match="the samples say nothing of the task"):
        fit_task(fitted, None, lambda net, data: net(data[0]) * 0 + 1, (X,), noise=1.0)
    x, _ = samples()
    codes = codes_of(fitted).detach()
    far = codes.mean(0) + 30 * codes.std(0)
    with torch.no_grad(), at_task(fitted, code=far):
        y = fitted(x)
    with pytest.warns(UserWarning, match="the task is unlike those of the family: its code is .* standard deviations"):
        fit_task(fitted, None, difference, (x, y), noise=1e-3)


@pytest.mark.parametrize(
    ("tasks", "degree", "at"), [(TASKS, 1, {}), (TASKS, 3, {}), ({"lam": (1.0, 3.0), "task": TASKS}, 2, {"lam": 1.3})]
)
def test_normalized_codes_change_nothing(tasks, degree, at):
    _, model = family(2, tasks, family_degree=degree, alpha=0.7)
    expected = [model(X, lotra_task={**at, "task": name}) for name in TASKS]
    before = codes_of(model).detach().clone()
    normalize_codes(model)
    codes = codes_of(model)
    assert codes.requires_grad
    assert_different(codes, before)
    assert codes.mean(0).abs().max() < 1e-9
    assert_equal(torch.cov(codes.T), torch.eye(2), 1e-9)
    for name, y in zip(TASKS, expected, strict=True):
        assert_equal(model(X, lotra_task={**at, "task": name}), y, 1e-9)
    once = codes.detach().clone()
    normalize_codes(model)
    assert_equal(codes_of(model), once, 1e-7)


def test_the_first_number_of_a_normalized_code_acts_most():
    _, model = family(2)
    normalize_codes(model)
    gram = sum(
        torch.einsum("...j,...l->jl", layer.lotra_core["default"][..., 1:], layer.lotra_core["default"][..., 1:])
        for layer in adapted_tensors(model).values()
    )
    assert gram[0, 0] > gram[1, 1]
    assert abs(gram[0, 1]) < 1e-9 * gram[0, 0]


def test_codes_that_cannot_be_normalized():
    _, model = family(4)
    with pytest.raises(ValueError, match="there should be more tasks than numbers"):
        normalize_codes(model)
    with pytest.raises(ValueError, match="has no codes"):
        normalize_codes(get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=2, family=TASKS)))


def crooked(seed=3, noise=0.0, count=40):
    """Samples of tasks of the fixture's kind whose function has one more term, of its own."""
    generator = torch.Generator().manual_seed(seed)
    a = 0.5 + 1.5 * torch.rand(len(TASKS) + 1, generator=generator)
    own = 0.05 * torch.randn(len(TASKS) + 1, generator=generator)
    x = torch.rand(count, 3, generator=generator) * 2 - 1
    y = [torch.sin(x[:, :2] * s) + s * x[:, 1:] + b * x[:, :1] ** 2 for s, b in zip(a, own, strict=True)]
    return x, [part + noise * torch.randn(part.shape, generator=generator) for part in y]


def test_noise_of_a_family(fitted):
    """Some 95 % of the residuals lie within 1.96 σ, or more; a part of σ is the core's, where tasks differ by more."""
    x, y = crooked()
    data = {name: (x, part) for name, part in zip(TASKS, y, strict=False)}
    noise = task_noise(fitted, difference, data, progressbar=False)
    assert 0 < noise.spread
    assert (noise.rest[0] <= noise.total[0]).all()
    fits = [fit_task(fitted, None, difference, part, noise=noise) for part in data.values()]
    left = torch.cat([fit.predict(x)[0] - part for fit, part in zip(fits, y, strict=False)])
    below = (left.abs() < 1.96 * noise.total[0]).double().mean(0)
    assert (below > 0.9).all()
    # Not much wider than that either: the correction for few tasks makes them wider, not narrower.
    assert (noise.total[0] < 2 * left.abs().quantile(0.95, 0) / 1.96).all()
    ratios = noise.rest[0] / noise.total[0]
    assert_equal(ratios, ratios[:1].expand(2))
    assert ratios[0] < 1


def test_a_core_from_a_few_samples(fitted):
    """Against the posterior mean of the linear model by a dense formula in the space of samples."""
    model = copy.deepcopy(fitted)
    x, y = crooked()
    noise = task_noise(model, difference, {name: (x, part) for name, part in zip(TASKS, y, strict=False)})
    code = fit_task(model, None, difference, (x[:20], y[4][:20]), noise=noise)
    fit = fit_task(model, "new", difference, (x[:20], y[4][:20]), noise=noise, train="core")
    assert model.peft_config["default"].family == TASKS
    assert model.active_adapter == "default"
    mean, std = fit.predict(x)
    error, before = ((found - y[4]).square().mean().sqrt() for found in (mean, code.predict(x)[0]))
    assert error < before
    assert ((mean - y[4]).abs() < 3 * std).double().mean() > 0.9
    model.set_adapter("new")
    assert_equal(model(x), mean)

    # at the minimum u: u = C0 Jᵀ (J C0 Jᵀ + σ²)⁻¹ (J u − r), for the prior N(0, C0) of u − μ
    problem, u = fit._problem, fit._found.unknown
    model.set_adapter("default")
    problem.data = x[:20], y[4][:20]
    r, J = (part[0] for part in problem.linearised(u[None]))
    codes = codes_of(model).detach()
    C0 = torch.block_diag(torch.as_tensor(LedoitWolf().fit(codes.numpy()).covariance_), torch.eye(len(u) - 1))
    away = u - torch.cat([codes.mean(0), torch.zeros(len(u) - 1)])
    K = J @ C0 @ J.T + torch.diag(fit.noise[0].square().repeat(20))
    gain = torch.linalg.solve(K, J @ C0).T
    assert_equal(gain @ (J @ away - r), away, 1e-3)
    assert_equal(fit.covariance, (C0 - gain @ J @ C0)[:1, :1], 1e-6)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([(X, torch.zeros(8, 2))], TypeError, "`samples` should map names of tasks to their data but is a list"),
        ({}, ValueError, "`samples` is empty"),
    ],
)
def test_bad_samples_of_a_family(samples, error, message, fitted):
    with pytest.raises(error, match=message):
        task_noise(fitted, difference, samples)


# Names, files, other functions ---------------------------------------------------------------------------------------


def test_tasks_come_and_go():
    _, model = family()
    codes = codes_of(model).detach().clone()
    with at_task(model, task="argon"):
        argon = model(X)
    add_task(model, "new", core_from="argon")
    add_task(model, "mean")
    assert_equal(codes_of(model).detach(), torch.cat([codes, codes[3:], torch.cat([codes, codes[3:]]).mean(0)[None]]))
    remove_task(model, "water")
    rename_task(model, "argon", "Ar")
    assert model.peft_config["default"].family == ["ammonia", "a.b", "Ar", "new", "mean"]
    for name in ("Ar", "new"):
        with at_task(model, task=name):
            assert_equal(model(X), argon)
    for call in (remove_task, lambda model, name: rename_task(model, name, "other")):
        with pytest.raises(ValueError, match="`task` 'water' is not one of the family's tasks"):
            call(model, "water")
    with pytest.raises(ValueError, match="`name` should be a new name"):
        rename_task(model, "Ar", "new")
    for name in ("mean", "new", "Ar"):
        remove_task(model, name)
    with pytest.raises(ValueError, match="`task` 'a.b' is needed"):
        remove_task(model, "a.b")


def test_named_tasks_without_codes_come_and_go():
    torch.manual_seed(0)
    model = get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=2, family=TASKS))
    fill(model)
    with at_task(model, task="argon"):
        y = model(X)
    remove_task(model, "water")
    rename_task(model, "argon", "Ar")
    with at_task(model, task="Ar"):
        assert_equal(model(X), y)


def test_a_saved_family_is_the_same(tmp_path):
    base, model = family()
    with at_task(model, task=TASKS * 2):
        y = model(X)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["family"], config["family_code"], config["family_degree"]) == (TASKS, 2, 1)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with at_task(loaded, task=TASKS * 2):
        assert_equal(loaded(X), y, 0)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"family_code": 1}))
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_a_swap_brings_the_codes(tmp_path):
    base, model = family()
    _, other = family()
    with torch.no_grad():
        codes_of(other).mul_(-1.5)
    with at_task(other, task=TASKS * 2):
        y = other(X)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    assert_equal(codes_of(model), codes_of(other), 0)
    with at_task(model, task=TASKS * 2):
        assert_equal(model(X), y, 0)
    wider = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=3, family=TASKS, family_code=3))
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="the new adapter has `family_code` 3, 'default' has 2"):
        hotswap_adapter(model, tmp_path / "wider", "default")


def test_a_task_is_not_for_other_codes_of_the_same_name():
    _, model = family(2)
    with at_task(model, task="water"):
        model(X)
        model.delete_adapter("default")
        model.add_adapter("default", LoTRAConfig(r=3, family=TASKS, family_code=3))
        model.set_adapter("default")
        with pytest.raises(RuntimeError, match="this pass is at none of them"):
            model(X)


def test_what_takes_no_codes_says_so():
    _, model = family(2, {"lam": (1.0, 3.0), "fluid": TASKS})
    for ranges in ({"lam": (0.5, 4.0)}, {"fluid": (0.0, 1.0)}):
        with pytest.raises(ValueError, match="is not a family of continuous parameters"):
            change_range(model, ranges)
    model.add_adapter("one", LoTRAConfig(r=2))
    with pytest.raises(ValueError, match="`config` has `family_code` 2: no codes are known of these adapters"):
        family_from(model, {"one": "water"}, "new", LoTRAConfig(r=2, family=TASKS, family_code=2))
    with pytest.raises(ValueError, match="`config` has an `alpha` of 0"):
        family_from(model, {"one": "water"}, "new", LoTRAConfig(r=2, family=TASKS, alpha=0))
    assert list(model.peft_config) == ["default", "one"]


def test_a_task_file_of_a_family_with_codes_and_parameters(tmp_path):
    _, model = family(2, {"lam": (1.0, 3.0), "fluid": TASKS})
    with at_task(model, lam=1.5, fluid="argon"):
        y = model(X)
    adapter_at(model, "one", lam=1.5, fluid="argon")
    save_task(tmp_path / "task", model, "one")
    load_task(tmp_path / "task", model, "again")
    assert_equal(model(X), y)


def test_a_task_file_with_a_code(tmp_path, fitted):
    model, other = copy.deepcopy(fitted), copy.deepcopy(fitted)
    x, y = samples()
    fit = fit_task(model, "new", difference, (x[:5], y[4, :5]), noise=0.02)
    save_task(tmp_path / "task", model, "new", covariance=fit.covariance)
    assert (tmp_path / "task").stat().st_size < 1000
    assert_equal(load_task(tmp_path / "task", other, "mine"), fit.covariance, 0)
    assert other.peft_config["default"].family == [*TASKS, "mine"]
    assert_equal(other(x, lotra_task="mine"), model(x, lotra_task="new"), 0)
    save_task(tmp_path / "plain", model, "water")
    assert load_task(tmp_path / "plain", other, "again") is None
    with pytest.raises(ValueError, match="`task` should be a new name"):
        load_task(tmp_path / "task", other, "mine")
    with pytest.raises(ValueError, match=r"`covariance` should have the shape \(1, 1\)"):
        save_task(tmp_path / "bad", model, "new", covariance=torch.eye(2))
    adapter_at(model, "one", task="new")
    with pytest.raises(ValueError, match="`covariance` is for the code of a task"):
        save_task(tmp_path / "bad", model, "one", covariance=torch.eye(1))
    assert not (tmp_path / "bad").exists()
    with torch.no_grad():
        next(iter(adapted_tensors(other).values())).lotra_core["default"][0] += 1
    with pytest.raises(ValueError, match="is for another state of 'default', or another family"):
        load_task(tmp_path / "task", other, "more")


@pytest.mark.usefixtures("fp32")
def test_a_fit_in_single_precision():
    """It stops at the rounding of its loss, and finds what it finds in double precision."""
    torch.manual_seed(0)
    model = get_peft_model(ChebyKAN([3, 6, 2]), LoTRAConfig(r=3, family={"lam": (1.0, 3.0)}, family_degree=2))
    fill(model)
    x = X[:5].float()
    with torch.no_grad():
        y = model(x, lotra_task={"lam": 1.7})
    calls = []

    def residual(net, data):
        calls.append(net.task)
        return net(data[0]) - data[1]

    fit = fit_task(model, None, residual, (x, y), noise=1e-2, starts=1)
    assert fit.task["lam"] == pytest.approx(1.7, abs=1e-2)
    assert len(calls) < 20
    assert calls[0].keys() == {"lam"}
    double = fit_task(model.double(), None, difference, (x.double(), y.double()), noise=1e-2)
    assert fit.deviations["lam"] == pytest.approx(double.deviations["lam"], rel=0.05)


def test_an_adapter_at_a_task(tmp_path):
    base, model = family()
    with at_task(model, task="ammonia"):
        y = model(X)
    adapter_at(model, "one", task="ammonia")
    assert_equal(model(X), y)
    assert model.peft_config["one"].family_code is None
    save_task(tmp_path / "task", model, "one")
    load_task(tmp_path / "task", model, "again")
    assert_equal(model(X), y)
    model.set_adapter("one")
    assert_equal(model.merge_and_unload()(X), y)


def test_trained_numbers():
    _, model = family()
    assert str(summary(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary(model).totals["default"][0] == trained


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"family_code": 2}, "`family_code` 2 without `family`"),
        ({"family": TASKS, "family_code": 5}, "`family_code` 5 is above the number of tasks, 4"),
        ({"family": TASKS, "family_code": 0}, "`family_code` should be a positive integer or None"),
        ({"family": TASKS, "family_code": True}, "`family_code` should be a positive integer or None"),
        ({"family": {"lam": (1, 2)}, "family_code": 1}, "codes are for one list of names of tasks"),
        ({"family": ["a", "a"], "family_code": 1}, "`family` names a task twice"),
        ({"family": {"lam": (1, 2), "fluid": TASKS}}, "`family` should map names of parameters to ranges"),
        ({"family": {"batch_axis": TASKS}, "family_code": 1}, "which cannot be an argument of `at_task`"),
        ({"family": TASKS, "family_code": 4, "family_degree": 40}, "polynomials, more than 100,000"),
    ],
)
def test_bad_configs(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LoTRAConfig(r=2, **kwargs)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "oil"}, "`task` 'oil' is not one of the family's tasks"),
        ({"task": ["water", 3]}, "`task` 3 is not one of the family's tasks"),
        ({"task": torch.tensor([0, 4])}, "`task` has places outside of the family's 4 tasks"),
        ({"code": torch.zeros(3)}, "`code` should be a tensor of 2 numbers"),
        ({"code": 1.0}, "`code` should be a tensor of 2 numbers"),
        ({"lam": 1.0}, r"a task of this family is given by \['task'\]"),
        ({"code": torch.zeros(2), "task": "water"}, "beside `code`, a task of this family has"),
    ],
)
def test_bad_tasks(task, message):
    _, model = family()
    with pytest.raises((TypeError, ValueError), match=message), at_task(model, **task):
        pass


def test_linear_layers_have_codes():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    config = LoTRAConfig(r=2, target_modules="all-linear", family=TASKS, family_code=2)
    model = get_peft_model(copy.deepcopy(base), config)
    fill(model)
    with at_task(model, task=TASKS * 2):
        y = model(X)
    for k, name in enumerate(TASKS):
        with at_task(model, task=name):
            assert_equal(model(X)[k], y[k])
