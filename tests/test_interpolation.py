"""The example of interpolated adapters runs, in a short form."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "interpolation.py"


def test_interpolation(tmp_path):
    short = ["--seeds", "1", "--steps", "2", "--r", "2", "2", "2", "--base-steps", "2", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-W", "error", str(SCRIPT), *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (errors,) = json.loads((tmp_path / "interpolation_lm.json").read_text())["errors"]
    assert len(errors) == len(set(errors.values())) == 10, errors
    assert all(f"{error:.1e}" in done.stdout for error in errors.values())
