"""examples/inverse_pde.py, in a short form."""

import json
from importlib import import_module

import pytest
from scripts import call

SIZES = {"TRUTHS": 3, "REPEATS": 2, "COLLOCATION": 5, "ADAM_STEPS": 3, "LM_ITERATIONS": 1}


@pytest.mark.slow
def test_coefficients_with_intervals_beside_a_pinn(tmp_path, monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(import_module("inverse_pde"), name, value)
    short = ("--base-steps", 50, "--iterations", 4, "--compared", 1)
    arguments = ("--pde", "parabolic", *short, "--output-dir", tmp_path)
    out = call("inverse_pde", *arguments).out
    found = json.loads((tmp_path / "parabolic_inverse.json").read_text())["estimates"]
    assert [len(of_one) for of_one in found.values()] == [6, 3, 1, 1]
    sensors, equation, *pinns = found.values()
    for row in [*sensors, *equation]:
        error = abs(row["value"] - row["truth"])
        assert row["inside"] == (error <= 2 * row["deviation"])
        assert error <= 6 * row["deviation"]
    assert [[row["deviation"] for row in pinn] for pinn in pinns] == [[None], [None]]
    assert f"{sum(row['inside'] for row in sensors)} of 6 true κ inside (nominal 95.4%)" in out
    assert (tmp_path / "parabolic_inverse.png").stat().st_size > 10_000

    files = [*tmp_path.rglob("*.pt"), *tmp_path.rglob("adapter_model.safetensors")]
    written = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 2
    assert call("inverse_pde", *arguments).out.count("by an earlier run") == 2
    assert [path.stat().st_mtime_ns for path in files] == written
    assert json.loads((tmp_path / "parabolic_inverse.json").read_text())["estimates"]["PINN: LM"] != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pde", "burgers"), "invalid choice: 'burgers'"),
        (("--sensors", 0), "positive integer"),
        (("--noise", 0), "(0, 1]"),
        (("--seed", -1), "--seed"),
        (("--device", "abacus"), "--device"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("inverse_pde", *arguments, "--output-dir", tmp_path / "new", code=2).err
    assert not list(tmp_path.iterdir())
