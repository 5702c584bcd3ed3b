"""`fit_gauss_newton` of several processes, each with a part of the data: equal to one process with all of it."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from conftest import approx, assert_different, assert_equal
from launching import fork
from test_convex_losses import CASES, Huber, adapted, pair, points, reals, trained

from peft_lotra import fit_gauss_newton

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning"),
]
LOSSES = {
    "least_squares": (lambda net, batch: net(batch[0]) - batch[1], lambda n: reals(n, 4)),
    "cross_entropy": (pair, CASES["ignored labels"][2]),
    "huber": (pair, lambda n: reals(n, 4)),
}


def part(tensors, rank, parts=(17, 43)):
    """Parts of different size."""
    return tuple(tensor.split(parts)[rank] for tensor in tensors)


def fit(rank, loss="least_squares", seed=None, joint=False, **arguments):
    """With a rank: of a part of the data in this process. What the model holds then, and the result or the error.

    Arguments that are functions are called with the rank.
    """
    function, targets = LOSSES[loss]
    data = (points(60), targets(60))
    if rank is not None:
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        rank = accelerator.process_index
        data = part(data, rank)
        arguments.setdefault("across_processes", True)
    model = adapted()
    if joint:
        model.requires_grad_(True)
    if seed is not None and rank:
        with torch.no_grad():
            model.get_parameter("base_model.model.head").add_(seed)
    loss = Huber() if loss == "huber" else loss
    arguments = {name: value(rank) if callable(value) else value for name, value in arguments.items()}
    if arguments.get("validation") is True:
        others = (points(9, seed=7), targets(9))
        arguments["validation"] = others if rank is None else part(others, rank, (5, 4))
    try:
        result = fit_gauss_newton(model, function, data, loss=loss, progressbar=False, **arguments)
    except (ValueError, RuntimeError) as error:
        return trained(model), error
    return trained(model), result


def assert_same_fit(together, alone, tolerance=1e-8):
    (theta, result), (expected, expected_result) = together, alone
    assert_equal(theta, expected, tolerance)
    assert result.losses == approx(expected_result.losses, rel=tolerance)
    assert result.validation_losses == approx(expected_result.validation_losses, rel=tolerance)
    assert (result.iterations, result.reason) == (expected_result.iterations, expected_result.reason)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        ("least_squares", {}),
        ("least_squares", {"joint": True}),
        ("cross_entropy", {"weight_decay": 0.01}),
        ("huber", {"validation": True, "damping": 10.0}),
    ],
)
def test_parts_equal_the_whole(loss, arguments):
    alone = fit(None, loss, iterations=4, **arguments)
    if "joint" not in arguments:
        assert_different(alone[0], trained(adapted()))
    first, second = fork(fit, 0, loss, iterations=4, **arguments)
    assert_equal(first[0], second[0], 0)
    assert first[1] == second[1]
    assert_same_fit(first, alone)


def test_residuals_fewer_than_numbers_and_conjugate_gradients():
    """Where one process would take residual space, and where it has no room for P² numbers."""
    alone = fit(None, iterations=1, damping=100.0, across_processes=True)  # of one process
    for max_memory in (2**32, 130_000):
        first, second = fork(fit, 0, iterations=1, damping=100.0, max_memory=max_memory)
        assert_equal(first[0], second[0], 0)
        assert first[1] == second[1]
        assert_same_fit(first, alone, 1e-8 if max_memory > 1e6 else 1e-2)


def stopping(rank):
    return lambda result: rank == 1 and result.iterations == 2


def interrupting(rank):
    def callback(result):
        if rank == 1 and result.iterations == 2:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def short(rank):
    return 1e-9 if rank == 1 else 1e9


@pytest.mark.parametrize(
    ("reason", "iterations", "arguments"),
    [
        ("callback", 2, {"callback": stopping}),
        ("interrupted", 2, {"callback": interrupting}),
        ("seconds", 1, {"max_seconds": short}),
    ],
)
def test_all_stop_together(reason, iterations, arguments):
    (theta, result), second = fork(fit, 0, iterations=5, **arguments)
    assert (result.reason, result.iterations) == (reason, iterations)
    assert second[1] == result
    assert_equal(second[0], theta, 0)
    assert_equal(theta, fit(None, iterations=iterations)[0], 1e-8)


def metric(rank):
    return lambda model: model(points(5)).square().sum() + (rank or 0)


def test_metrics_are_means_over_processes():
    first, second = fork(fit, 0, validation=metric, iterations=3)
    assert first[1] == second[1]
    alone = fit(None, validation=metric, iterations=3)
    assert first[1].validation_losses == approx([loss + 0.5 for loss in alone[1].validation_losses])
    assert_equal(first[0], alone[0], 1e-8)


def test_errors():
    for arguments, said in [
        ({"across_processes": None}, "`across_processes` should be given where torch.distributed has 2 processes"),
        ({"seed": 0.1}, "`model` should have the same parameters in all processes"),
    ]:
        assert all(said in str(error) for _, error in fork(fit, 0, **arguments))
    with pytest.raises(TypeError, match="`across_processes` should be True, False or None .* 1"):
        fit(None, across_processes=1)


def failing(rank):
    def callback(result):
        if rank == 1:
            raise RuntimeError("no luck")

    return callback


def test_an_error_in_one_process_ends_all():
    first, second = fork(fit, 0, callback=failing, iterations=3)
    assert "process 1 failed, so that all of them end: RuntimeError: no luck" in str(first[1])
    assert "no luck" in str(second[1])
    assert_equal(first[0], second[0], 0)


def breaks(rank, where):
    """Residuals that fail in process 1, only where they are differentiated: by rows of J, or by its products."""

    def residual(net, batch):
        found = net(batch[0]) - batch[1]
        traced = torch._C._functorch.is_functorch_wrapped_tensor(found) and len(batch[0]) == 1
        if rank == 1 and (traced if where == "rows" else found.requires_grad):
            raise ArithmeticError("no derivative here")
        return found

    return residual


@pytest.mark.parametrize(("where", "max_memory"), [("rows", 2**32), ("products", 130_000)])
def test_an_error_in_the_derivatives_of_one_process_ends_all(where, max_memory):
    first, second = fork(broken, where, max_memory)
    assert "process 1 failed, so that all of them end: ArithmeticError: no derivative here" in first
    assert "no derivative here" in second


def broken(where, max_memory):
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    data = part((points(60), reals(60, 4)), rank)
    try:
        fit_gauss_newton(
            adapted(), breaks(rank, where), data, across_processes=True, max_memory=max_memory, iterations=3,
            progressbar=False,
        )  # fmt: skip
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return str(error)


def test_a_process_by_itself():
    results = fork(fit, 0, across_processes=False, iterations=2)
    assert_different(results[0][0], results[1][0])
