"""`run.py few_samples`: its fits and rivals against formulas, and the command in a short form."""

import few_sample_fits as fits
import few_sample_methods as methods
import few_sample_models as models
import few_sample_tasks as tasks
import pytest
import torch
from conftest import within
from few_sample_fits import deviations, least_squares, prior_of
from jobs import read_lines
from scripts import call

from peft_lotra import fit_task


def toy(count=40, points=30):
    """y = sin(a x₁ + b) and its cosine, of random a and b."""
    torch.manual_seed(0)
    x, a, b = torch.rand(points, 2) * 2 - 1, torch.rand(count, 1), torch.rand(count, 1)
    phase = a * x[:, 0] + b
    names = tuple(map(str, range(count)))
    return tasks.Domain(names, x, torch.stack([phase.sin(), phase.cos()], -1), "0", torch.cat([a, b], 1))


@pytest.fixture
def split():
    return tasks.Split(toy(), 2)


def test_splits_and_samples(split):
    every = [tasks.Split(split.domain, number) for number in range(1, tasks.FOLDS + 1)]
    assert sorted(task for part in every for task in part.unseen) == sorted({*range(40)} - {0, *split.validation})
    for part in every:
        assert part.validation == split.validation
        assert 0 in part.seen
        assert sorted([*part.seen, *part.unseen, *part.validation]) == list(range(40))
    few, more = (split.samples(split.unseen, n, 2) for n in (3, 5))
    assert torch.equal(few.x, more.x[:, :3])
    assert torch.equal(few.y, more.y[:, :3])
    assert not torch.equal(few.x[0], few.x[1])
    exact = split.y[few.tasks]
    assert split.errors(few.tasks, exact).max() == 0
    away = split.errors(few.tasks, exact + 0.1 * split.spread[few.tasks][:, None])
    assert (away - 0.1).abs().max() < within(1e-12)


@pytest.mark.parametrize("K", [3, 20])
def test_least_squares_of_a_linear_model(K, split):
    """u = c + L (I + LᵀAᵀA L / σ²)⁻¹ Lᵀ Aᵀ (y − A c) / σ², with fewer and with more numbers than residuals."""
    A, centre, L = torch.randn(2, 2, K), torch.randn(K), torch.randn(K, K).tril() + 2 * torch.eye(K)
    sigma, samples = torch.tensor([0.1, 0.3]), split.samples(split.unseen[:3], 4, 1)

    def predict(u, x):
        return torch.einsum("ni,iok,k->no", x, A, u)

    u = least_squares(predict, centre, L, sigma, samples, 12, torch.randn(6, K))
    for k in range(3):
        J = torch.einsum("ni,iok->nok", samples.x[k], A)
        weight = (1 / sigma**2).expand(4, 2).flatten()
        r, J = (samples.y[k] - J @ centre).flatten(), J.flatten(0, 1)
        precision = torch.linalg.inv(L @ L.T)
        expected = centre + torch.linalg.solve(J.T @ (weight[:, None] * J) + precision, J.T @ (weight * r))
        assert (u[k] - expected).abs().max() < within(1e-6) * expected.abs().max()
        covariance = torch.linalg.inv(J.T @ (weight[:, None] * J) + precision)
        at = torch.einsum("ni,iok->nok", split.x, A)
        std = (torch.einsum("nok,kl,nol->no", at, covariance, at) + sigma**2).sqrt()
        found = deviations(predict, u, L, sigma, samples, split.x)[k]
        assert (found - std).abs().max() < within(1e-8) * std.max()


@pytest.mark.parametrize("make", [models.GEPS, models.CodeAsInputs, models.LearnedBasis])
def test_one_code_for_all_samples(make):
    model, x, z = make(5, 3, inputs=2, outputs=2), torch.randn(7, 2), torch.randn(3)
    assert (model.at(z, x) - model(x, z.expand(7, 3))).abs().max() < within(1e-12)
    assert not torch.allclose(model.at(z, x), model.at(-z, x))


@pytest.mark.filterwarnings(
    "ignore:the task is unlike", "ignore:the samples say nothing"
)  # the family is hardly trained
def test_own_fit_is_that_of_fit_task(split):
    model = models.family(split, 2, 1e-2, (0.01, 0.0)).double()
    learned, noise, samples = methods.of_family(model), torch.tensor([0.5, 1.0]), split.samples(split.unseen, 3, 1)
    mean, factor = prior_of(learned.codes)
    starts = torch.linalg.solve_triangular(factor, (learned.codes - mean).mT, upper=False).mT
    found = least_squares(learned.predict, mean, factor, noise, samples, 40, torch.cat([0 * starts[:1], starts]))
    precision = torch.linalg.inv(factor @ factor.mT)

    def loss(z, x, y):
        away = z - mean
        return (((learned.predict(z, x) - y) / noise).square().sum() + away @ precision @ away) / 2

    for k, (_, _, x, y) in enumerate(zip(*samples, strict=True)):
        fit = fit_task(model, None, lambda net, part: net(part[0]) - part[1], (x, y), noise=noise, iterations=40)
        assert abs(loss(fit.code, x, y) - fit.loss) < within(1e-8) * fit.loss
        assert loss(found[k], x, y) < 1.02 * fit.loss, "from more or other starts, it may only be lower"


def test_oscillation():
    """u'' + 2 δ u' + u = a cos ω t, by derivatives of the formula."""
    t = torch.linspace(0, 8, 9)
    damping, frequency, drive, position, speed = map(torch.tensor, (0.3, 1.2, 0.7, 0.5, -0.4))

    def u(t):
        return tasks.oscillation(damping, frequency, drive, t, position, speed)

    first, second = torch.func.grad(u), torch.func.grad(torch.func.grad(u))
    left = torch.stack([second(at) + 2 * damping * first(at) + u(at) for at in t])
    assert (left - drive * (frequency * t).cos()).abs().max() < within(1e-12)
    assert abs(u(t[0]) - position) + abs(first(t[0]) - speed) < within(1e-12)


def test_pod_finds_tasks_of_its_span(split, monkeypatch):
    monkeypatch.setattr(tasks, "NOISE", 1e-6)
    monkeypatch.setattr(fits, "NOISE", 1e-6)
    basis, weights = torch.randn(2, 30, 2), torch.randn(40, 2)
    linear = tasks.Domain(split.domain.names, split.x, torch.einsum("tk,kpo->tpo", weights, basis), "0")
    exact = tasks.Split(linear, 1)
    samples = exact.samples(exact.unseen, 5, 1)
    assert exact.errors(samples.tasks, fits.pod(exact, 2, samples)).max() < within(1e-4)
    assert exact.errors(samples.tasks, fits.pod(exact, 1, samples)).median() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("domain", [name for name in tasks.DOMAINS if name != "fluids_20"])
def test_smoke(domain, tmp_path):
    arguments = ("few_samples", "--smoke", "--only", domain, "--outputs", tmp_path)
    call("run", *arguments)
    results = tmp_path / "smoke" / "few_samples.jsonl"
    lines = read_lines(results)
    assert [line["method"] for line in lines] == list(methods.METHODS)[: None if domain == "fluids" else 1]
    for line in lines:
        assert line["version"]
        for part in line.get("samples", {}).values():
            assert len(part["errors"]) == len(line["tasks"])
            assert all(0 < error for error in part["errors"])

    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    assert call("run", *arguments).out.count("Done in") == 1, "only what is missing should run"
    again = [(line["split"], line["method"]) for line in read_lines(results)]
    assert again == [(line["split"], line["method"]) for line in lines]
