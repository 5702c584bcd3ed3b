"""The example of interpolated adapters runs, in a short form."""

import json

from scripts import call


def test_interpolation(tmp_path):
    short = ("--seeds", 1, "--steps", 2, "--r", 2, 2, 2, "--base-steps", 2, "--output-dir", tmp_path)
    done = call("interpolation", *short)
    (errors,) = json.loads((tmp_path / "interpolation_lm.json").read_text())["errors"]
    assert len(errors) == len(set(errors.values())) == 10, errors
    assert all(f"{error:.1e}" in done.out for error in errors.values())
