"""The benchmark of communication runs, in a short form, and counts what it should."""

import json
import math
from pathlib import Path

import pytest
from launching import launch

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "communication.py"


@pytest.mark.processes
def test_gradients_of_the_factors_are_all_that_is_reduced(tmp_path):
    arguments = ("--layer", "efficient", "--widths", 16, 32, "--batch", 4, "--steps", 1, "--gpus", 2, "--gbit", 8)
    done = launch(SCRIPT, *arguments, "--output-dir", tmp_path, launcher="python", num_processes=1)
    result = json.loads((tmp_path / "communication.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "communication.json"]
    rows = {(row["width"], row["method"]): row for row in result["rows"]}
    for width in (16, 32):
        lotra, full = rows[width, "LoTRA"], rows[width, "full fine-tuning"]
        assert lotra["trainable"] == 8 * 8 * 4 + 8 * width + 8 * width + 4 * 8
        assert full["trainable"] == full["parameters"] == lotra["parameters"] - lotra["trainable"] == 10 * width**2
        for row in (lotra, full):
            assert row["processes"] == 2
            assert row["sent"]["allreduce"] == 4 * row["trainable"]
            assert row["sent"]["broadcast"] == 4 * width * 12  # the knots
            assert row["seconds"] > 0 < row["seconds of one process"]
            expected = 2 * 1 / 2 * row["sent"]["allreduce"] / 1e9 + 2 * 5e-6
            assert math.isclose(row["communication"]["2"], expected)
            assert f"{row['sent']['allreduce']:,}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "argument --processes: nothing is sent by 1 process"),
        (["--gbit", "0"], "argument --gbit: should be a positive number, got '0'"),
        (["--latency", "inf"], "argument --latency: should be a positive number, got 'inf'"),
    ],
)
def test_arguments_are_checked(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT.parents[1])
    from communication import parse_args

    monkeypatch.setattr("sys.argv", ["communication.py", *arguments])
    with pytest.raises(SystemExit):
        parse_args()
    assert message in capsys.readouterr().err
