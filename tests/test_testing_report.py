"""`python -m peft_lotra.testing module:factory`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(folder, name):
    (folder / "mine.py").write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{MODULE}")
    command = [sys.executable, "-W", "error", "-m", "peft_lotra.testing", name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("name", ["found", "registered"])
def test_a_layer_that_passes(name, tmp_path):
    done = run(tmp_path, f"mine:{name}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("0.weight: 'o (i d)'" in done.stdout or "weight: 'o (i d)' (n, m, n_d) = (3, 4, 4)" in done.stdout) == (
        name == "found"
    )
    for test in ("values", "second derivatives", "whole modes", "family", "mixed batch", "save and load"):
        assert re.search(rf"^{test} +passed$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^\d+ passed, 0 skipped, 0 failed$", done.stdout, re.MULTILINE)


def test_a_layer_that_fails(tmp_path):
    done = run(tmp_path, "mine:wrong")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"^layout +failed: ValueError: KAN layer '0', parameter weight: declared is 'o \(d i\)'", done.stdout, re.M
    )
    assert re.search(r"^\d+ passed, 0 skipped, 1 failed$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "should be like my_module:make, got 'mine'"),
        ("mine:nothing", "'mine:nothing' cannot be imported"),
        ("mine:alone", "the factory should return (layer, sample) or (layer, sample, coefficients)"),
        ("mine:refused", "every input and output has one function, shaped by"),
    ],
)
def test_what_cannot_be_tested_is_named(name, message, tmp_path):
    done = run(tmp_path, name)
    assert done.returncode == 2
    assert message in done.stderr
