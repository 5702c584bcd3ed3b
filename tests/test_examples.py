"""The main job runs, in a short form, and leaves what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "pde_transfer.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pde", "elliptic"),
        ("--pde", "parabolic", "--r", 4),
        ("--pde", "hyperbolic", "--r", 2, 4, 4),
        ("--kan", "pykan"),
    ],
)
def test_pde_transfer(arguments, tmp_path):
    short = ("--base-steps", 3, "--steps", 3, "--output-dir", tmp_path)
    first = run(*arguments, *short)
    assert first.returncode == 0, first.stderr
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    assert [path.stat().st_size > 10_000 for path in tmp_path.rglob("*.png")] == [True]
    (table,) = (path for path in tmp_path.rglob("*.json") if path.name != "adapter_config.json")
    rows = json.loads(table.read_text())
    assert len(json.dumps(rows)) > 100
    bases = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(bases) == 1
    second = run(*arguments, *short)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == bases, "the base was trained again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pde", "parabola"), "invalid choice: 'parabola'"),
        (("--r", 0), "positive integer"),
        (("--r", 1, 2), "one or three"),
        (("--compression-ratio", 2), "(0, 1]"),
        (("--steps", 0), "--steps"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run(*arguments, "--output-dir", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
