"""The benchmark of communication runs, in a short form, and counts what it should."""

import json
import math

import communication
import pytest
import torch
from launching import fork, launch
from scripts import EXAMPLES, call, restored

pytestmark = pytest.mark.slow

SHORT = ("--layer", "efficient", "--batch", 4, "--steps", 1, "--gpus", 2, "--gbit", 8)


def check_results(folder, widths, out):
    """Gradients of the factors are all that is reduced."""
    result = json.loads((folder / "communication.json").read_text())
    assert list(folder.iterdir()) == [folder / "communication.json"]
    rows = {(row["width"], row["method"]): row for row in result["rows"]}
    for width in widths:
        lotra, full = rows[width, "LoTRA"], rows[width, "full fine-tuning"]
        assert lotra["trainable"] == 8 * 8 * 4 + 8 * width + 8 * width + 4 * 8
        assert full["trainable"] == full["parameters"] == lotra["parameters"] - lotra["trainable"] == 10 * width**2
        for row in (lotra, full):
            assert row["processes"] == 2
            assert row["sent"]["allreduce"] == 4 * row["trainable"]
            assert row["sent"]["broadcast"] == 4 * width * 12  # the knots
            expected = 2 * 1 / 2 * row["sent"]["allreduce"] / 1e9 + 2 * 5e-6
            assert math.isclose(row["communication"]["2"], expected)
            assert f"{row['sent']['allreduce']:,}" in out


def measured(args):
    torch.set_default_dtype(torch.float32)  # as the processes of users begin
    return communication.measure_all(args)


@pytest.mark.processes
def test_what_two_processes_send(tmp_path, capsys):
    args = communication.parse_arguments([*map(str, SHORT), "--widths", "32", "--output-dir", str(tmp_path)])
    with restored():
        alone = communication.measure_all(args)  # before the forks, which then have all imports
    together, other = fork(measured, args, num_processes=2)
    assert [row["sent"] for row in together] == [row["sent"] for row in other]
    communication.report(args, alone, together)
    check_results(tmp_path, [32], capsys.readouterr().out)


@pytest.mark.processes
def test_it_starts_its_processes(tmp_path):
    script = EXAMPLES / "benchmarks" / "communication.py"
    arguments = (*SHORT, "--widths", 16, 32, "--output-dir", tmp_path)
    done = launch(script, *arguments, launcher="python", num_processes=1)
    check_results(tmp_path, [16, 32], done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "argument --processes: nothing is sent by 1 process"),
        (["--gbit", "0"], "argument --gbit: should be a positive number, got '0'"),
        (["--latency", "inf"], "argument --latency: should be a positive number, got 'inf'"),
    ],
)
def test_arguments_are_checked(arguments, message, tmp_path):
    assert message in call("communication", *arguments, "--output-dir", tmp_path / "out", code=2).err
    assert not list(tmp_path.iterdir())
