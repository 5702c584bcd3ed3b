"""The example of interpolated adapters runs, in a short form."""

import json

import pytest
from scripts import call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("optimizer", ["adam", "lm"])
def test_interpolation(optimizer, tmp_path):
    short = ("--seeds", 1, "--steps", 2, "--r", 2, 2, 2, "--base-steps", 2, "--optimizer", optimizer)
    done = call("interpolation", *short, "--output-dir", tmp_path)
    (errors,) = json.loads((tmp_path / f"interpolation_{optimizer}.json").read_text())["errors"]
    assert len(errors) == len(set(errors.values())) == 10, errors
    assert all(f"{error:.1e}" in done.out for error in errors.values())
