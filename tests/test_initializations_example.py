"""The comparison of initialisations runs, in a short form."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "initializations.py"


def test_initializations(tmp_path):
    short = ["--tasks", "parabolic", "regression", "--seeds", "2", "--steps", "2", "--base-steps", "2"]
    command = [sys.executable, "-W", "error", str(SCRIPT), *short, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "initializations.json").read_text())["losses"]
    assert list(losses) == ["parabolic", "regression"]
    for found in losses.values():
        assert list(found) == ["random", "gradient", "gradient_hosvd"]
        assert all(len(values) == 2 for values in found.values())
        assert found["random"] != found["gradient"] != found["gradient_hosvd"]
