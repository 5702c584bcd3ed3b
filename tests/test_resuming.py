"""Long fits: checkpoints that a kill cannot harm, data in batches, and what goes on only where it belongs."""

import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from conftest import approx, assert_equal, within
from launching import fork
from test_gauss_newton import adapted, laplacian, points, regression, trained
from torch.utils.data import DataLoader

from peft_lotra import fit_gauss_newton
from peft_lotra.training.resuming import NAME

pytestmark = pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")


def noisy(iteration):
    """Points that depend on the states of three random generators."""
    return points(50, seed=iteration) + 1e-3 * (torch.rand(1).double() + random.random() + np.random.rand())


def fit(model, data=noisy, residual=regression, **arguments):
    return fit_gauss_newton(model, residual, data, **{"iterations": 7, "progressbar": False, **arguments})


def seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


class Killed(BaseException):
    pass


def killing(at):
    def callback(now):
        if now.iterations == at:
            raise Killed

    return callback


@pytest.mark.parametrize("arguments", [{}, {"weight_decay": 0.01, "validation": points(9, seed=77)}])
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path, arguments):
    whole, killed, again = adapted(), adapted(), adapted()
    seeded()
    expected = fit(whole, **arguments)
    seeded()
    with pytest.raises(Killed):
        fit(killed, checkpoint_dir=tmp_path, every=2, callback=killing(5), **arguments)
    random.seed(1)  # another process has other states
    result = fit(again, checkpoint_dir=tmp_path, every=2, **arguments)
    assert result == expected
    assert_equal(trained(again), trained(whole), 0)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    longer = fit(adapted(), checkpoint_dir=tmp_path, iterations=8, **arguments)
    assert longer.iterations == 8
    assert longer.losses[:8] == expected.losses


def test_a_write_that_is_killed_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    fit(adapted(), checkpoint_dir=tmp_path, every=2, iterations=2)
    before = (tmp_path / NAME).read_bytes()

    def half(state, path):
        path.write_bytes(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(), checkpoint_dir=tmp_path, every=2, iterations=4)
    assert (tmp_path / NAME).read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 1


def other_base():
    model = adapted()
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).neg_()
    return model


DIFFERENT = {
    "model": lambda: {"model": other_base()},
    "data": lambda: {"data": points(60, seed=4)},
    "residual_fn": lambda: {"residual": laplacian},
    "weight_decay": lambda: {"weight_decay": 0.5},
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("argument", ["resume_from", "checkpoint_dir"])
def test_another_fit_is_refused(argument, what, tmp_path):
    held = {"weight_decay": 0.1} if what == "weight_decay" else {}
    first, model = adapted(), adapted()
    given = {"checkpoint_dir": tmp_path} if argument == "checkpoint_dir" else {}
    result = fit(first, points(60), iterations=2, **held, **given)
    arguments = {"model": model, "data": points(60), **held, **DIFFERENT[what]()}
    with torch.no_grad():  # what is trained is where the first fit left it
        for own, p in zip(arguments["model"].parameters(), first.parameters(), strict=True):
            own.copy_(p if p.requires_grad else own)
    state, before = torch.get_rng_state(), trained(arguments["model"])
    with pytest.raises(ValueError, match=f"`{argument}` is of another fit.*: `{what}` was .* and is "):
        fit(**arguments, **(given or {"resume_from": result}))
    assert_equal(trained(arguments["model"]), before, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_has_changed_is_refused():
    result = fit(adapted(), points(60), iterations=2)
    with pytest.raises(ValueError, match="`resume_from` is of another fit.*`parameters`"):
        fit(adapted(), points(60), resume_from=result)


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        fit(adapted(), checkpoint_dir=tmp_path, resume_from=fit(adapted(), iterations=1))
    fit(adapted(), checkpoint_dir=tmp_path, iterations=1)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read .* delete it to start anew"):
        fit(adapted(), checkpoint_dir=tmp_path)


def of_processes(folder, kill, fixed):
    accelerator = Accelerator(cpu=True)
    seeded()
    if kill is None:
        random.seed(accelerator.process_index)
    model = adapted()

    def callback(now):
        if now.iterations == kill:
            os.kill(os.getpid(), signal.SIGINT)

    part = slice(accelerator.process_index, None, 2)
    data = points(60)[part] if fixed else lambda k: noisy(k)[part]
    result = fit(model, data, across_processes=True, checkpoint_dir=folder, every=2, callback=callback)
    return trained(model), result


@pytest.mark.processes
@pytest.mark.parametrize("fixed", [False, True])
def test_checkpoints_of_several_processes(fixed, tmp_path):
    (expected, whole), _ = fork(of_processes, tmp_path / "whole", -1, fixed)
    (_, part), _ = fork(of_processes, tmp_path / "parts", 3, fixed)
    assert (part.reason, part.iterations) == ("interrupted", 3)
    first, second = fork(of_processes, tmp_path / "parts", None, fixed)
    assert first[1] == second[1] == whole
    assert_equal(first[0], expected, 0)
    with pytest.raises(ValueError, match="is of 2 processes, but 1 run now"):
        fit(adapted(), checkpoint_dir=tmp_path / "parts")


BATCHES = {
    "one function": (regression, lambda x: x),
    "two": ({"a": regression, "b": laplacian}, lambda x: {"a": x, "b": x}),
}


@pytest.mark.parametrize("which", BATCHES)
@pytest.mark.parametrize("max_memory", [2**32, 300_000])
def test_batches_equal_the_whole(which, max_memory):
    function, of = BATCHES[which]
    x = points(60)
    whole, parts = adapted(), adapted()
    arguments = {"residual": function, "iterations": 3, "max_memory": max_memory, "damping": 100.0}
    expected = fit(whole, of(x), **arguments)
    loader = DataLoader(x, batch_size=23, collate_fn=lambda rows: of(torch.stack(rows)))
    result = fit(parts, loader, **arguments)
    tolerance = within(1e-9) if max_memory == 2**32 else 1e-2
    assert result.losses == approx(expected.losses, rel=tolerance)
    assert_equal(trained(parts), trained(whole), tolerance)


def test_an_iterator_is_refused():
    with pytest.raises(TypeError, match="`data` is a generator, which can be read only once"):
        fit(adapted(), (points(20) for _ in range(2)))


def test_batches_that_change_are_refused():
    model = adapted()
    before = trained(model)
    with pytest.raises(ValueError, match="second reading gave others: use a DataLoader with `shuffle=False`"):
        fit(model, DataLoader(points(60), batch_size=20, shuffle=True))
    assert_equal(trained(model), before, 0)


class Kept(GeneralTracker):
    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.values = {}

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.values[step] = values["loss"]


def test_trackers():
    tracker = Kept()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("fit")
    result = fit(adapted(), callback=lambda now: accelerator.log({"loss": now.losses[-1]}, step=now.iterations))
    assert tracker.values == dict(enumerate(result.losses[1:], 1))


def test_lines_in_a_log_file(capfd, monkeypatch):
    monkeypatch.setattr("peft_lotra.training.progress._SECONDS", float("inf"))  # however slow the machine is
    fit(adapted(), progressbar=True)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("fit_gauss_newton: iteration 7 of 7, loss ")
    monkeypatch.setattr("peft_lotra.training.progress._SECONDS", 0.0)
    fit(adapted(), progressbar=True)
    lines = capfd.readouterr().err.splitlines()
    assert [int(line.split()[2]) for line in lines] == [*range(1, 8)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(adapted(), progressbar=True)
    assert "7/7" in capfd.readouterr().err
