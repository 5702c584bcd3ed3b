"""The study of update spectra runs, in a short form, and leaves what it promises."""

import json

import pytest
from conftest import approx, within
from scripts import call


@pytest.mark.slow
def test_low_rank_updates(tmp_path):
    arguments = ("--pde", "elliptic", "--base-steps", 3, "--steps", 3, "--energies", 0.9, 1, "--fit-iterations", 1)
    arguments += ("--output-dir", tmp_path)
    call("low_rank_updates", *arguments)
    assert (tmp_path / "low_rank_updates.png").stat().st_size > 10_000
    (record,) = json.loads((tmp_path / "low_rank_updates.json").read_text())["records"]
    assert [row["budget"] for row in record["budgets"]] == [560, 1120, 2240, 4480]
    for row in record["budgets"]:
        assert row["suggested"]["parameters"] <= row["budget"]
        assert row["suggested"]["update_error"] < row["uniform"]["update_error"]
    some, everything, *budgets = record["extraction"]
    assert some["nearest"]["times_full"] != 1
    assert everything["nearest"]["times_full"] == approx(1, abs=1e-3)
    assert max(everything["nearest"]["update_errors"].values()) < within(1e-6)
    assert [row["choice"] for row in budgets] == ["budget 1/10", "budget 1/20"]
    assert all(row["parameters"] <= 896 for row in budgets)

    weights = {
        path: path.stat().st_mtime_ns for pattern in ("*.pt", "*.safetensors") for path in tmp_path.glob(pattern)
    }
    assert len(weights) == 2
    assert "of an earlier run" in call("low_rank_updates", *arguments).out
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pde", "parabola"), "invalid choice: 'parabola'"),
        (("--energies", 1.5), "(0, 1]"),
        (("--device", "nowhere"), "'nowhere' cannot be used"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("low_rank_updates", *arguments, "--output-dir", tmp_path, code=2).err
    assert not list(tmp_path.iterdir())
