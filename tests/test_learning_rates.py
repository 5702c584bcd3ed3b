"""The study of learning rates runs, in a short form, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "learning_rates.py"


def run(*arguments):
    command = [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_study_and_its_second_half(tmp_path):
    sizes = ("--widths", 5, "--ratio-width", 5, "--seeds", 1, "--steps", 1, "--output-dir", tmp_path)
    short = (*sizes, "--optimizers", "adam", "--rules", "LR-1", "LR-4")
    first = run(*short)
    assert first.returncode == 0, first.stderr
    path = tmp_path / "learning_rates.json"
    record = json.loads(path.read_text())
    assert len(record["runs"]) == 2 * 2 * 5 + 5 * 2 * 5
    assert {row["case"]["rule"] for row in record["runs"]} == {"LR-1", "LR-4"}
    assert (tmp_path / "learning_rates.png").stat().st_size > 10_000
    kept, record["runs"] = record["runs"][1:], record["runs"][1:]
    kept[0]["loss"] = 123.0  # if this comes back, it was not computed again
    path.write_text(json.dumps(record))
    second = run(*short)
    assert second.returncode == 0, second.stderr
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == len(kept) + 1
    assert kept[0] in runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--widths", 7), "not 7"), (("--widths", 3), "at least 4"), (("--seeds", 0), "positive")],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run(*arguments, "--output-dir", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
