"""`advise` tries tools on copies of a model."""

import copy
import sys

import pytest
import torch
from conftest import assert_equal
from kan_layers import ChebyKAN
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.advise import Advice, Trial, advise, main

X = torch.linspace(-0.9, 0.9, 120).reshape(40, 3)
TOOLS = ["as it is", "the KAN itself, LM", "an adapter, LM", "the KAN itself, Adam", "an adapter, Adam"]


def misfit(net, batch):
    return net(batch[0]) - batch[1]


def problem():
    torch.manual_seed(0)
    model = ChebyKAN([3, 6, 2])
    return (
        model,
        misfit,
        (X, torch.stack([X.sum(1).sin(), X.prod(1)], 1)),
        LoTRAConfig(r=2, coefficients={"cheby_coeffs": "i o d"}),
    )


@pytest.mark.filterwarnings("ignore:.*residuals:UserWarning")
def test_every_tool_is_tried_and_the_model_stays():
    model, residual, data, config = problem()
    before, y = copy.deepcopy(model.state_dict()), model(X)
    advice = advise(model, residual, data, config=config, seconds=0.2, progressbar=False)
    assert [trial.tool for trial in advice] == TOOLS
    assert all(trial.error < advice[0].error for trial in advice[1:])
    assert advice[1].trained == sum(p.numel() for p in model.parameters())
    assert 0 < advice[2].trained < advice[1].trained
    assert advice[2].stored == 8 * advice[2].trained
    assert not hasattr(model, "peft_config")
    for name, value in model.state_dict().items():
        assert_equal(value, before[name], 0)
    assert_equal(model(X), y, 0)
    text = str(advice)
    assert text.splitlines()[-len(advice.best.code.splitlines()) - 1] == f"take: {advice.best.tool}"
    assert "r=2" in advice[2].code
    assert "coefficients={'cheby_coeffs': 'i o d'}" in advice[2].code
    assert "lr=0.0" in advice[4].code


def test_level_errors_mean_the_fewer_numbers():
    def trial(tool, error, trained):
        return Trial(tool, error, trained, 0, 1.0, "")

    assert Advice([trial("all", 1.0, 900), trial("adapter", 1.1, 90), trial("none", 9.0, 0)]).best.tool == "adapter"
    assert Advice([trial("all", 1.0, 900), trial("adapter", 1.3, 90)]).best.tool == "all"


@pytest.mark.filterwarnings("ignore:.*residuals:UserWarning")
def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_problem.py").write_text("from test_advise import problem\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["my_problem:problem", "--seconds", "0.1"]) == 0
    assert "take: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["my_problem:nothing"])
    assert "my_problem:nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Sequential(nn.Linear(3, 2))}, "no KAN layer found"),
        ({"data": (X, torch.zeros(7, 2))}, r"`data` should be tensors with N rows each, .* \[7, 40\] rows"),
        ({"seconds": 0.0}, "`seconds`=0.0 should be positive"),
        ({"held_out": 1.0}, "`held_out`=1.0 between 0 and 1"),
    ],
)
def test_bad_input(change, message):
    model, residual, data, _ = problem()
    given = {"model": model, "residual": residual, "data": data, "seconds": 0.01, "progressbar": False} | change
    with pytest.raises(ValueError, match=message):
        advise(**given)


def test_a_model_with_adapters_is_refused():
    model, residual, data, config = problem()
    with pytest.raises(ValueError, match="`model` has adapters"):
        advise(get_peft_model(model, config), residual, data)
