"""The study of learning rates runs, in a short form, and goes on where it stopped."""

import json

import pytest
from scripts import call

pytestmark = pytest.mark.slow


def test_study_and_its_second_half(tmp_path):
    sizes = ("--widths", 5, "--ratio-width", 5, "--seeds", 1, "--steps", 1, "--output-dir", tmp_path)
    short = (*sizes, "--optimizers", "adam", "--rules", "LR-1", "LR-4")
    call("learning_rates", *short)
    path = tmp_path / "learning_rates.json"
    record = json.loads(path.read_text())
    assert len(record["runs"]) == 2 * 2 * 5 + 5 * 2 * 5
    assert {row["case"]["rule"] for row in record["runs"]} == {"LR-1", "LR-4"}
    assert (tmp_path / "learning_rates.png").stat().st_size > 10_000
    kept, record["runs"] = record["runs"][1:], record["runs"][1:]
    kept[0]["loss"] = 123.0  # if this comes back, it was not computed again
    path.write_text(json.dumps(record))
    call("learning_rates", *short)
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == len(kept) + 1
    assert kept[0] in runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--widths", 7), "not 7"), (("--widths", 3), "at least 4"), (("--seeds", 0), "positive")],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("learning_rates", *arguments, "--output-dir", tmp_path, code=2).err
    assert not list(tmp_path.iterdir())
