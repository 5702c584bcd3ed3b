"""`fit_gauss_newton` under losses other than least squares, against dense formulas and torch's own losses."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import approx, assert_different, assert_equal, within
from layer_table import config, make, randomize
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lotra import OutputLoss, fit_gauss_newton

# Steps are compared here, not fits: few points are enough.
pytestmark = pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")

KAN, CLASSES = "o (d i)", 4
FP64 = {"dtype": torch.float64}
DAMPING = 100.0  # with which the first step reduces each loss


def points(rows, *tokens, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(rows, *tokens, 3, generator=generator, **FP64) - 1


def labels(*shape):
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(5))


class Mixing(nn.Module):
    """A KAN on every token, whose outputs then depend on all tokens of the sample. shape: (N, T, 3) → (N, T, C)"""

    def __init__(self):
        super().__init__()
        self.kan, self.head = make(KAN)[0], nn.Parameter(torch.randn(2, CLASSES, **FP64))

    def forward(self, x):
        y = self.kan(x) @ self.head
        return y + 0.3 * y.roll(1, dims=-2) if y.ndim > 2 else y


def adapted(dtype=torch.float64, core=0.2):
    torch.manual_seed(0)
    model = get_peft_model(Mixing(), config(KAN), autocast_adapter_dtype=False).to(dtype)
    randomize(model, std=core)
    return model


def trained(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def pair(net, batch):
    return net(batch[0]), *batch[1:]


def fit(model, data, loss, residual_fn=pair, **kwargs):
    return fit_gauss_newton(model, residual_fn, data, loss=loss, progressbar=False, **kwargs)


class Quartic:
    """Σ (o − y)⁴, by hand: not among the losses that have a name."""

    def value(self, outputs, targets):
        return (outputs - targets).pow(4).flatten(1).sum(dim=1)

    def gradient(self, outputs, targets):
        return 4 * (outputs - targets).pow(3)

    def factor(self, outputs, targets):
        return torch.diag_embed(12**0.5 * (outputs - targets).abs())


class SquaredError:
    """The example of `OutputLoss`."""

    def value(self, outputs, targets):
        return (outputs - targets).square().sum(dim=1)

    def gradient(self, outputs, targets):
        return 2 * (outputs - targets)

    def factor(self, outputs, targets):
        return 2**0.5 * torch.eye(outputs.shape[1]).double().expand(len(outputs), -1, -1)


class Huber:
    """Linear far away: its gradient is not in the range of H there."""

    def value(self, outputs, targets):
        return F.huber_loss(outputs, targets, reduction="none", delta=0.5).sum(dim=1)

    def gradient(self, outputs, targets):
        return (outputs - targets).clamp(-0.5, 0.5)

    def factor(self, outputs, targets):
        return torch.diag_embed(((outputs - targets).abs() < 0.5).to(outputs))


class FewColumns(Quartic):
    """((o_0 − y_0) + (o_1 − y_1))²: L has one column for four outputs."""

    def _sums(self, outputs, targets):
        return (outputs - targets)[..., :2].sum(dim=-1)

    def value(self, outputs, targets):
        return self._sums(outputs, targets).square()

    def gradient(self, outputs, targets):
        return 2 * self._sums(outputs, targets).unsqueeze(-1) * torch.tensor([1, 1, 0, 0])

    def factor(self, outputs, targets):
        return (2**0.5 * torch.tensor([1.0, 1, 0, 0], **FP64)).expand(len(outputs), -1).unsqueeze(-1)


def reals(rows, *shape):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(6), **FP64)


def soft(*shape):
    return torch.softmax(reals(*shape, CLASSES), dim=-1)


def some_ignored(*shape):
    return labels(*shape).masked_fill(torch.rand(*shape, generator=torch.Generator().manual_seed(8)) < 0.4, -100)


# name: loss, tokens, targets of N samples, and the mean over samples written with torch's functions
CASES = {
    "labels": ("cross_entropy", (), labels, F.cross_entropy),
    "ignored labels": ("cross_entropy", (), some_ignored, F.cross_entropy),
    "soft labels": ("cross_entropy", (), soft, F.cross_entropy),
    "tokens": ("cross_entropy", (3,), lambda n: labels(n, 3), lambda o, y: F.cross_entropy(o.mT, y)),
    "ignored tokens": ("cross_entropy", (3,), lambda n: some_ignored(n, 3), lambda o, y: F.cross_entropy(o.mT, y)),
    "soft tokens": ("cross_entropy", (3,), lambda n: soft(n, 3), lambda o, y: F.cross_entropy(o.mT, y.mT)),
    "poisson": (
        "poisson",
        (),
        lambda n: reals(n, CLASSES).exp().round(),
        lambda o, y: F.poisson_nll_loss(o, y, reduction="sum") / len(o),
    ),
    "bernoulli": (
        "bernoulli",
        (),
        lambda n: (reals(n, CLASSES) > 0).double(),
        lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="sum") / len(o),
    ),
    "bernoulli tokens": (
        "bernoulli",
        (3,),
        lambda n: reals(n, 3, CLASSES).sigmoid(),
        lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="sum") / len(o),
    ),
    "quartic": (Quartic(), (), lambda n: reals(n, CLASSES), lambda o, y: (o - y).pow(4).sum() / len(o)),
    "quartic tokens": (Quartic(), (3,), lambda n: reals(n, 3, CLASSES), lambda o, y: (o - y).pow(4).sum() / len(o)),
    "huber": (
        Huber(),
        (),
        lambda n: reals(n, CLASSES),
        lambda o, y: F.huber_loss(o, y, reduction="sum", delta=0.5) / len(o),
    ),
    "few columns": (
        FewColumns(),
        (),
        lambda n: reals(n, CLASSES),
        lambda o, y: (o[:, 0] + o[:, 1] - y[:, 0] - y[:, 1]).square().mean(),
    ),
}


def oracle_step(model, mean_loss, x, targets, damping, decay=0.0):
    """−(H + λD)⁻¹g with H = JᵀH_oJ, J the Jacobian and H_o the Hessian of all outputs of all samples at once."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    shapes = [model.get_parameter(name).shape for name in names]

    def outputs(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(model, values, (x,))

    theta = trained(model)
    o = outputs(theta).detach()
    J = torch.autograd.functional.jacobian(outputs, theta).reshape(o.numel(), -1)
    in_outputs = lambda flat: mean_loss(flat.view_as(o), targets)  # noqa: E731
    H_o = torch.autograd.functional.hessian(in_outputs, o.flatten())
    g = J.T @ torch.autograd.functional.jacobian(in_outputs, o.flatten())
    H = J.T @ H_o @ J
    D = torch.diag(H.diagonal() + 1e-2 * H.diagonal().mean() + 2 * decay)
    return -torch.linalg.solve(H + 2 * decay * torch.eye(len(H)) + damping * D, g)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_dense_formula(case, rows):
    loss, tokens, targets, mean_loss = CASES[case]
    model, x, y = adapted(), points(rows, *tokens), targets(rows)
    before, first = trained(model), mean_loss(model(x).detach(), y).item()
    expected = before + oracle_step(model, mean_loss, x, y, damping=DAMPING)
    result = fit(model, (x, y), loss, iterations=1, damping=DAMPING, max_memory=400_000)
    assert_different(trained(model), before)
    assert_equal(trained(model), expected, 1e-8)
    assert result.losses == approx((first, mean_loss(model(x).detach(), y).item()), rel=1e-12)
    assert result.losses[1] < result.losses[0]


@pytest.mark.parametrize("case", ["labels", "poisson", "few columns"])
@pytest.mark.parametrize("rows", [5, 40])
def test_step_with_a_prior_equals_the_dense_formula(case, rows):
    loss, tokens, targets, mean_loss = CASES[case]
    model, x, y = adapted(), points(rows, *tokens), targets(rows)
    expected = trained(model) + oracle_step(model, mean_loss, x, y, damping=DAMPING, decay=0.01)
    fit(model, (x, y), loss, iterations=1, damping=DAMPING, weight_decay=0.01)
    assert_equal(trained(model), expected, 1e-8)


def test_weights_equal_repeated_samples():
    x, y = points(12), labels(12)
    repeats = torch.tensor([0, 1, 2, 3] * 3)
    models = adapted(), adapted(), adapted()
    weights = repeats / repeats.double().mean()
    weighted = fit(models[0], (x, y, weights), "cross_entropy", iterations=3)
    repeated = fit(
        models[1], (x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats)), "cross_entropy", iterations=3
    )
    fit(models[2], (x, y), "cross_entropy", iterations=3)
    assert_different(trained(models[0]), trained(models[2]))
    # The mean over 12 samples is that over 18 repetitions.
    assert_equal(trained(models[0]), trained(models[1]), 1e-7)
    assert weighted.losses == approx(repeated.losses, rel=1e-9)


def test_weights_of_a_given_loss():
    x, y = points(12), reals(12, CLASSES)
    models = adapted(), adapted()
    weights = torch.tensor([0.0, 2.0] * 6)
    fit(models[0], (x, y, weights), Huber(), iterations=2)
    fit(models[1], (x[1::2], y[1::2]), Huber(), iterations=2)
    assert_equal(trained(models[0]), trained(models[1]), 1e-7)


def test_squared_errors_equal_least_squares():
    models, x, y = (adapted(), adapted()), points(40), reals(40, CLASSES)
    least = fit_gauss_newton(
        models[0], lambda net, b: net(b[0]) - b[1], (x, y), iterations=6, gradient_tolerance=0.3, progressbar=False
    )
    given = fit(models[1], (x, y), SquaredError(), iterations=6, gradient_tolerance=0.3)
    assert given.losses == approx(least.losses, rel=1e-9)
    assert (given.damping, given.iterations, given.reason) == (least.damping, least.iterations, least.reason)
    assert_equal(trained(models[1]), trained(models[0]), 1e-7)


def test_one_hot_equals_labels():
    models, x, y = (adapted(), adapted()), points(30), labels(30)
    results = [
        fit(model, (x, targets), "cross_entropy", iterations=4)
        for model, targets in zip(models, (y, F.one_hot(y, CLASSES).double()), strict=True)
    ]
    assert results[0].losses[-1] < 0.95 * results[0].losses[0]
    assert_equal(trained(models[0]), trained(models[1]), 1e-9)


def test_ignored_labels_equal_samples_left_out():
    models, x, y = (adapted(), adapted()), points(30), some_ignored(30)
    fit(models[0], (x, y), "cross_entropy", iterations=4)
    fit(models[1], (x[y >= 0], y[y >= 0]), "cross_entropy", iterations=4)
    assert_equal(trained(models[0]), trained(models[1]), 1e-7)


def test_two_classes_are_bernoulli():
    x, y = points(40), labels(40) % 2
    models = [nn.Linear(3, 1, **FP64), nn.Linear(3, 1, **FP64)]
    models[1].load_state_dict(models[0].state_dict())
    fit(models[0], (x, y.double()[:, None]), "bernoulli", iterations=3)
    two = lambda net, batch: (torch.cat([torch.zeros_like(net(batch[0])), net(batch[0])], dim=1), batch[1])  # noqa: E731
    fit(models[1], (x, y), "cross_entropy", residual_fn=two, iterations=3)
    assert_equal(models[0].weight, models[1].weight, 1e-8)


def test_outputs_without_an_axis_of_their_own():
    x, y = points(40), reals(40).exp().round()
    models = [nn.Linear(3, 1, **FP64), nn.Linear(3, 1, **FP64)]
    models[1].load_state_dict(models[0].state_dict())
    flat = lambda net, batch: (net(batch[0])[:, 0], batch[1])  # noqa: E731
    fit(models[0], (x, y), "poisson", residual_fn=flat, iterations=3)
    fit(models[1], (x, y[:, None]), "poisson", iterations=3)
    assert_equal(models[0].weight, models[1].weight, 1e-12)


@pytest.mark.parametrize(("loss", "targets"), [("cross_entropy", labels), ("poisson", lambda n: labels(n, CLASSES))])
def test_linear_model_converges_to_the_minimum(loss, targets):
    model, other, x, y = nn.Linear(3, CLASSES, **FP64), nn.Linear(3, CLASSES, **FP64), points(60), targets(60)
    other.load_state_dict(model.state_dict())
    mean = CASES["labels" if loss == "cross_entropy" else "poisson"][3]
    result = fit(model, (x, y), loss, loss_tolerance=0, gradient_tolerance=1e-12)
    lbfgs = torch.optim.LBFGS(
        other.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        lbfgs.zero_grad()
        value = mean(other(x), y)
        value.backward()
        return value

    lbfgs.step(closure)
    assert result.reason in ("gradient", "damping", "loss")
    assert result.iterations < 30
    assert result.losses[-1] == approx(closure().item(), rel=1e-12)
    # A fit sees no step that changes the loss by less than its rounding: δᵀHδ / 2, where softmax leaves H singular.
    theta, delta = trained(other), trained(model) - trained(other)
    H = torch.func.hessian(lambda v: mean(x @ v[: 3 * CLASSES].view(CLASSES, 3).T + v[3 * CLASSES :], y))(theta)
    assert delta @ H @ delta / 2 <= within(1e-12) * result.losses[-1]


def test_kinds_with_losses_of_their_own_sum_up():
    functions = {"counts": pair, "values": lambda net, batch: net(batch[0]) - batch[1], "given": pair}
    losses = {"counts": "poisson", "values": "least_squares", "given": Quartic()}
    x, y = points(20), reals(20, CLASSES)
    data = {"counts": (x, y.exp().round()), "values": (x[:9], y[:9]), "given": (x[:7], y[:7])}
    model = adapted()
    before = trained(model)

    def total(o, _):
        squares = (o[:9] - y[:9]).square().sum() / 9
        return CASES["poisson"][3](o, data["counts"][1]) + squares + (o[:7] - y[:7]).pow(4).sum() / 7

    expected = before + oracle_step(model, total, x, None, damping=DAMPING)
    fit(model, data, losses, residual_fn=functions, iterations=1, damping=DAMPING)
    assert_equal(trained(model), expected, 1e-8)


def test_losses_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"`loss` should have the keys \['a', 'b'\], but it has the keys \['a'\]"):
        fit(adapted(), {"a": (X, ONES), "b": (X, ONES)}, {"a": "poisson"}, residual_fn={"a": pair, "b": pair})


def test_a_sample_that_is_confidently_wrong_does_not_end_the_fit():
    # p of its label is 1e-35: its residual is huge, its gradient is not.
    model = nn.Linear(2, 2, bias=False, **FP64)
    model.weight.data.copy_(torch.tensor([[80.0, 0.1], [0.0, -0.1]]))
    x = torch.tensor([[1.0, 0.3], [0.1, 1.0], [-0.2, 1.0], [0.01, -1.0]], **FP64)
    y = torch.tensor([1, 0, 1, 0])
    result = fit(model, (x, y), "cross_entropy")
    assert result.losses[0] > 19
    assert result.losses[-1] < 1


def test_fp32_model():
    models, x, y = (adapted(), adapted(torch.float32)), points(40), labels(40)
    models[1].load_state_dict(models[0].state_dict())
    start = trained(models[0])
    for model, dtype in zip(models, (torch.float64, torch.float32), strict=True):
        fit(model, (x.to(dtype), y), "cross_entropy", iterations=2)
    assert trained(models[1]).dtype == torch.float32
    moved, other = trained(models[0]) - start, trained(models[1]).double() - start
    assert (moved - other).norm() < 0.05 * moved.norm()  # the rounding of J is amplified by the solution


class Looks(TorchDispatchMode):
    """How often the host looks at a value, and would wait for an accelerator."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, tolist = 0, torch.Tensor.tolist

        def noted(tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", noted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("case", ["least squares", "ignored labels", "poisson", "huber"])
def test_an_iteration_looks_at_values_twice(case, rows, monkeypatch):
    loss, _, targets, _ = CASES.get(case, ("least_squares", (), lambda n: reals(n, CLASSES), None))
    function = pair if case in CASES else lambda net, batch: net(batch[0]) - batch[1]
    seen = []
    with Looks(monkeypatch) as looks:
        data, arguments = (points(rows), targets(rows)), {"iterations": 4, "damping": 1e4, "loss_tolerance": 0}
        fit(adapted(), data, loss, function, callback=lambda _: seen.append(looks.count), **arguments)
    # Each iteration takes the first λ that it tries.
    assert [after - before for before, after in pairwise(seen)] == [2, 2, 2]


X, Y = points(8), labels(8)
ONES = torch.ones(8, CLASSES, **FP64)
BAD = [
    ("entropy", {}, ValueError, r"`loss` should be one of \['least_squares', 'cross_entropy', .* passed is 'entropy'"),
    (3, {}, TypeError, "`loss` should be one of .* methods `value`, `gradient` and `factor` .* passed is 3"),
    (Quartic, {}, TypeError, "`loss` .*class"),
    ({"a": "poisson"}, {}, ValueError, r"`loss` should be one loss, .* but it has the keys \['a'\]"),
    (
        "poisson",
        {"residual_fn": lambda net, b: net(b[0])},
        TypeError,
        r"a pair, \(outputs, targets\).*of shape \(8, 4\)",
    ),
    ("poisson", {"residual_fn": lambda net, b: (net(b[0]).int(), b[1])}, TypeError, r"gave one of torch\.int32"),
    ("poisson", {"residual_fn": lambda net, b: (net(b[0]).sum(), b[1])}, ValueError, r"outputs of 8 samples, .*\(\)"),
    (
        "poisson",
        {"data": (X, Y)},
        ValueError,
        r"targets of the outputs' shape, \(8, 4\), but they are of shape \(8,\)",
    ),
    ("poisson", {"data": (X, -ONES)}, ValueError, "targets of at least 0, as counts are, but they go from -1.0"),
    ("bernoulli", {"data": (X, 2 * ONES)}, ValueError, "targets from 0 to 1, but they go from 2.0 to 2.0"),
    (
        "cross_entropy",
        {"data": (X, Y[:, None])},
        ValueError,
        r"labels of shape \(8,\) or probabilities of .* \(8, 1\)",
    ),
    ("cross_entropy", {"data": (X, Y.double())}, ValueError, "whole numbers as labels, but they are .*float64"),
    ("cross_entropy", {"data": (X, ONES.int())}, ValueError, "probabilities in floating point, but they are .*int32"),
    ("cross_entropy", {"data": (X, Y + 1)}, ValueError, "labels from 0 to 3, or -100, but they go from 1 to 4"),
    ("cross_entropy", {"data": (X, Y - 101)}, ValueError, "labels from 0 to 3, or -100"),
    ("cross_entropy", {"data": (X, -ONES)}, ValueError, "probabilities of at least 0 but they go from -1.0"),
    ("cross_entropy", {"data": (X, 0 * Y - 100)}, ValueError, "every label in `data` is ignored"),
    (
        "cross_entropy",
        {"residual_fn": lambda net, b: (net(b[0])[:, 0], b[1])},
        ValueError,
        r"outputs of shape \(N, C\)",
    ),
    ("cross_entropy", {"data": (X, Y, ONES)}, ValueError, r"weights of shape \(8,\), one for each .* \(8, 4\)"),
    ("cross_entropy", {"data": (X, Y, -ONES[:, 0])}, ValueError, "weights of at least 0, but they go from -1.0"),
    ("poisson", {"residual_fn": lambda net, b: (net(b[0]) + 800, ONES)}, ValueError, "finite"),
    (
        "cross_entropy",
        {"residual_fn": lambda net, b: (net(b[0]) - net(b[0]).mean(0), b[1])},
        ValueError,
        "the outputs of",
    ),
]


@pytest.mark.parametrize(("loss", "arguments", "error", "message"), BAD)
def test_errors_come_before_any_change(loss, arguments, error, message):
    model = adapted()
    before = trained(model)
    with pytest.raises(error, match=message):
        fit(model, **{"data": (X, Y), "loss": loss, **arguments})
    assert_equal(trained(model), before, 0)


def test_a_loss_without_curvature_is_refused_unless_there_is_a_prior():
    model, x, y = adapted(), points(8), reals(8, CLASSES) + 100
    before = trained(model)
    with pytest.raises(ValueError, match="`loss` has no curvature at any sample.*`weight_decay`"):
        fit(model, (x, y), Huber())
    assert_equal(trained(model), before, 0)
    result = fit(model, (x, y), Huber(), weight_decay=1.0, iterations=3)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("value", lambda o, y: (o - y).sum(), r"`loss.value` should give a tensor of shape \(8,\) .* of shape \(\)"),
        ("gradient", lambda o, y: 3, r"`loss.gradient` should give a tensor of shape \(4, 4\) .* gave a int"),
        ("factor", lambda o, y: o, r"`loss.factor` should give a tensor of shape \(8, 4, m\) .* of shape \(8, 4\)"),
    ],
)
def test_answers_of_a_given_loss_are_checked(method, answer, message):
    loss, model = Quartic(), adapted()
    assert isinstance(loss, OutputLoss)
    setattr(loss, method, answer)
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        fit(model, (X, ONES), loss)
    assert_equal(trained(model), before, 0)
