"""The comparison of initialisations runs, in a short form."""

import json

import pytest
from scripts import call

pytestmark = pytest.mark.slow


def test_initializations(tmp_path):
    short = ["--tasks", "parabolic", "regression", "--seeds", "2", "--steps", "2", "--base-steps", "2"]
    call("initializations", *short, "--output-dir", tmp_path)
    losses = json.loads((tmp_path / "initializations.json").read_text())["losses"]
    assert list(losses) == ["parabolic", "regression"]
    for found in losses.values():
        assert list(found) == ["random", "gradient", "gradient_hosvd"]
        assert all(len(values) == 2 for values in found.values())
        assert found["random"] != found["gradient"] != found["gradient_hosvd"]
