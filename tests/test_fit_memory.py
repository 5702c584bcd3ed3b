"""`max_memory` of `fit_gauss_newton`: what is held, the form taken for it, and its steps against dense ones."""

import re

import pytest
import torch
from conftest import approx, assert_different, assert_equal
from test_convex_losses import CASES, DAMPING, adapted, fit, labels, oracle_step, pair, points, trained
from torch import nn

from peft_lotra.training import conjugate_gradients, iteration
from peft_lotra.training.conjugate_gradients import ConjugateGradients
from peft_lotra.training.damped_system import Equation, NormalEquations, ResidualSpace
from peft_lotra.training.lower_triangle import LowerTriangle
from peft_lotra.training.memory import LiveBytes

pytestmark = pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")

FP64 = {"dtype": torch.float64}


@pytest.mark.parametrize("size", [5, 256, 700])
def test_lower_triangle_equals_dense(size):
    B, right, shift = torch.randn(40, size, **FP64), torch.randn(size, **FP64), torch.rand(size, **FP64) + 0.5
    triangle = LowerTriangle(size, B)
    for block in B.split(17):
        triangle.add_products(block)
    assert sum(block.numel() for block in triangle.blocks) == LowerTriangle.numbers(size)
    dense = B.T @ B
    assert_equal(
        torch.cat([nn.functional.pad(b, (0, size - b.shape[1])) for b in triangle.blocks]).tril(), dense.tril()
    )
    expected = torch.linalg.solve(dense + torch.diag(shift), right)
    assert_equal(triangle.factor(shift).solved(right), expected)
    assert not triangle.factor(shift).failed
    assert triangle.factor(-10 * dense.diagonal()).failed
    if size > 256:  # positive at first
        shift[-1] = -2 * dense[-1, -1]
        assert triangle.factor(shift).failed


@pytest.mark.parametrize("drawn", [1, 20, 90])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("damping", [1e-5, 1.0])
def test_conjugate_gradients_equal_dense_least_squares(damping, decay, drawn):
    J, r, away = torch.randn(90, 40, **FP64), torch.randn(90, **FP64), torch.randn(40, **FP64)
    J *= 10 ** torch.linspace(0, -2, 40, **FP64)
    J[:, 3] = 0  # a factor whose core is zero
    squares = J.square().sum(dim=0)
    D = squares + decay + 1e-2 * squares.mean()
    rows = torch.cat([J, (damping * D).sqrt().diag(), decay**0.5 * torch.eye(40, **FP64)])
    right = torch.cat([-r, torch.zeros(40, **FP64), -(decay**0.5) * away])
    expected = torch.linalg.lstsq(rows, right).solution
    equation = Equation(J.split(7), r, decay * away, decay)
    system = ConjugateGradients(equation, lambda v: J.T @ (J @ v), drawn, [80, 10])
    exact = NormalEquations(equation)
    assert (system.scale, system.cosine(2.0)) == approx((exact.scale, exact.cosine(2.0)))
    step = system.step(damping)
    matrix = rows.T @ rows
    missing = (expected - step) @ matrix @ (expected - step) / (expected @ matrix @ expected)
    assert missing < (1e-6 if drawn == 90 else 1e-3)  # it is an estimate, and good where J is known well
    # A step that is not exact has a gain that is known exactly.
    change = (r + J @ step).square().sum() + decay * (away + step).square().sum()
    gain = r.square().sum() + decay * away.square().sum() - change
    assert system.predicted_gain(step, damping).item() == approx(gain.item(), rel=1e-8)
    system.tolerance = 1e-12
    assert_equal(system.step(damping), expected, 1e-8)


def bounds(model, data, loss, residual_fn=pair):
    """The two numbers of bytes that the error of `max_memory` names, for any step and for an exact one."""
    with pytest.raises(
        ValueError, match="`max_memory` should be at least .* but the value passed is 1: give"
    ) as raised:
        fit(model, data, loss, residual_fn=residual_fn, max_memory=1)
    return tuple(map(int, re.findall(r"(\d+)(?= bytes| for steps)", str(raised.value))))


@pytest.fixture
def forms(monkeypatch):
    """The forms that were made."""
    found = []
    for form in (ConjugateGradients, NormalEquations, ResidualSpace):

        def make(*args, form=form):
            found.append(form)
            return form(*args)

        monkeypatch.setattr(iteration, form.__name__, make)
    return found


@pytest.mark.parametrize(
    ("case", "weight_decay"),
    [
        ("ignored labels", 0.0),
        ("soft tokens", 0.01),
        ("poisson", 0.0),
        ("bernoulli tokens", 0.0),
        ("quartic", 0.01),
        ("huber", 0.0),
        ("few columns", 0.01),
    ],
)
def test_conjugate_gradients_under_every_loss(case, weight_decay, forms, monkeypatch):
    monkeypatch.setattr(conjugate_gradients, "_TOLERANCE", 1e-12)
    loss, tokens, targets, mean_loss = CASES[case]
    x, y = points(24, *tokens), targets(24)
    model = adapted()
    before = trained(model)
    expected = before + oracle_step(model, mean_loss, x, y, damping=DAMPING, decay=weight_decay)
    _, exact = bounds(model, (x, y), loss)
    arguments = {"iterations": 1, "damping": DAMPING, "weight_decay": weight_decay}
    fit(model, (x, y), loss, **arguments, max_memory=exact - 1)
    assert_different(trained(model), before)
    assert_equal(trained(model), expected, 1e-7)
    fit(adapted(), (x, y), loss, **arguments, max_memory=exact)
    assert forms == [ConjugateGradients, NormalEquations]


def regression(net, x):
    return net(x)[:, :2] - x[:, :2].sin()


def test_a_fit_by_conjugate_gradients(forms):
    """Of several kinds, to the tolerance that is built in: as good as exact steps."""
    kinds = {"inside": regression, "edge": lambda net, x: 10 * regression(net, x)}
    data = {"inside": points(100).float(), "edge": points(6, seed=4).float()}
    models, results = [adapted(torch.float32) for _ in range(2)], []
    _, exact = bounds(models[0], data, "least_squares", kinds)
    for model, max_memory in zip(models, (exact - 1, exact), strict=True):
        results.append(fit(model, data, "least_squares", kinds, max_memory=max_memory, iterations=4))
    assert forms == [ConjugateGradients] * 4 + [NormalEquations] * 4
    assert results[1].losses[-1] < 0.1 * results[1].losses[0]
    assert results[0].losses[-1] < 1.2 * results[1].losses[-1]


def test_fewer_residuals_than_numbers(forms):
    model, data = adapted(), (points(5), labels(5))
    least, exact = bounds(model, data, "cross_entropy")
    for max_memory in (least, exact, 2**32):
        fit(model, data, "cross_entropy", iterations=1, damping=DAMPING, max_memory=max_memory)
    assert forms == [ConjugateGradients, ResidualSpace, ResidualSpace]


@pytest.mark.parametrize("rows", [50, 1600])
@pytest.mark.parametrize("max_memory", [3_000_000, 6_000_000, 100_000_000])
def test_no_more_memory_is_held(max_memory, rows):
    """The tensors of a fit, with P = 1,000; the Jacobian of 1,600 rows would be 6.4 MB."""
    model = nn.Sequential(nn.Linear(3, 166), nn.Tanh(), nn.Linear(166, 2), nn.Tanh(), nn.Linear(2, 1, bias=False))
    model.float()
    assert sum(p.numel() for p in model.parameters()) == 1000
    x = points(rows).float()
    with LiveBytes() as live:
        fit(model, x, "least_squares", lambda net, x: net(x) - x[:, :1], iterations=2, max_memory=max_memory)
    assert live.peak < max_memory


class NoForwardDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def test_layers_without_a_forward_derivative(forms):
    model = adapted()

    def residual(net, x):
        return NoForwardDerivative.apply(net(x)) - 1

    _, exact = bounds(model, points(40), "least_squares", residual)
    before = trained(model)
    with pytest.raises(ValueError, match=rf"no forward derivative for them \(.*\): give {exact} bytes"):
        fit(model, points(40), "least_squares", residual, max_memory=exact - 1)
    assert_equal(trained(model), before, 0)
    fit(model, points(40), "least_squares", residual, max_memory=exact, iterations=2)
    assert forms == [ConjugateGradients, NormalEquations, NormalEquations]
