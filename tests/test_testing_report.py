"""`python -m peft_lotra.testing module:factory`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LIMIT
from scripts import restored

from peft_lotra.testing.__main__ import main

MODULE = """
import torch
from kan_layers import ChebyKANLayer, MatrixKANLayer, WaveletKANLayer

def found():
    return MatrixKANLayer(3, 4), torch.rand(6, 3) * 1.8 - 0.9

def registered():
    return ChebyKANLayer(3, 4, 3), torch.rand(6, 3) * 1.8 - 0.9

def wrong():
    return MatrixKANLayer(3, 4), torch.rand(6, 3), {"weight": {"layout": "o (d i)", "sizes": {"d": 4}}}

def refused():
    return WaveletKANLayer(3, 4), torch.rand(6, 3)

def alone():
    return MatrixKANLayer(3, 4)
"""


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{MODULE}")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with restored():
        monkeypatch.chdir(tmp_path)
        yield


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "peft_lotra.testing", "mine:wrong"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^\d+ passed, 0 skipped, 1 failed$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["found", "registered"])
def test_a_layer_that_passes(name, capsys):
    code, out = main([f"mine:{name}"]), capsys.readouterr().out
    assert code == 0, out
    assert ("0.weight: 'o (i d)'" in out or "weight: 'o (i d)' (n, m, n_d) = (3, 4, 4)" in out) == (name == "found")
    for test in (
        "values and gradients",
        "second derivatives",
        "whole modes",
        "family",
        "mixed batch",
        "save and load",
    ):
        assert re.search(rf"^{test} +passed$", out, re.MULTILINE), out
    assert re.search(r"^\d+ passed, 0 skipped, 0 failed$", out, re.MULTILINE)


def test_a_layer_that_fails(capsys):
    assert main(["mine:wrong"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^layout +failed: ValueError: KAN layer '0', parameter weight: declared is 'o \(d i\)'", out, re.M
    )
    assert re.search(r"^\d+ passed, 0 skipped, 1 failed$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "should be like my_module:make, got 'mine'"),
        ("mine:nothing", "'mine:nothing' cannot be imported"),
        ("mine:alone", "the factory should return (layer, sample) or (layer, sample, coefficients)"),
        ("mine:refused", "every input and output has one function, shaped by"),
    ],
)
def test_what_cannot_be_tested_is_named(name, message, capsys):
    with pytest.raises(SystemExit) as end:
        main([name])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
