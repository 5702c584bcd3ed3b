"""examples/fluids.py, in a short form: its table, files and picture, fluids and tables that are asked for."""

import json

import pytest
import torch
from chebyshev_kan import ChebyshevKAN
from peft import PeftModel
from scripts import call

SHORT = ("--steps", 30)
pytestmark = pytest.mark.filterwarnings(
    "ignore:the task is unlike those of the family", "ignore:the samples say nothing"
)


@pytest.fixture
def table(tmp_path):
    """y = sin(a x1) + a x2 for 12 tasks of 30 samples."""
    path = tmp_path / "my.csv"
    generator = torch.Generator().manual_seed(0)
    lines = ["task,x:a,x:b,y:c"]
    for task in range(12):
        s = 0.5 + 0.1 * task
        for a, b in torch.rand(30, 2, generator=generator).tolist():
            lines.append(f"t{task},{a},{b},{torch.sin(torch.tensor(s * a)) + s * b}")
    path.write_text("\n".join(lines))
    return path


def test_a_table_of_ones_own(table, tmp_path):
    folder = tmp_path / "out"
    done = call("fluids", "--data", table, *SHORT, "--samples", 3, "--suggest", "--output-dir", folder)
    record = json.loads((folder / "fluids.json").read_text())
    split = record["split"]
    names = split["seen"] + split["calibration"] + split["new"]
    assert sorted(names) == sorted(f"t{k}" for k in range(12))
    assert len(split["new"]) == len(record["before"]) == len(record["errors"]["core"]["3"]) == 2
    assert done.out.count(", after 3: a ") == 2
    assert (folder / "fluids.png").stat().st_size > 10_000
    kan = ChebyshevKAN((2, 12, 12, 1), 4).double()
    kan.load_state_dict(torch.load(folder / "kan.pt"))
    model = PeftModel.from_pretrained(kan, folder / "family")
    assert model(torch.zeros(2, 2).double(), lotra_task=split["seen"][:2]).shape == (2, 1)


@pytest.mark.slow
def test_fluids_beside_rivals(tmp_path):
    done = call("fluids", *SHORT, "--output-dir", tmp_path)
    errors = json.loads((tmp_path / "fluids.json").read_text())["errors"]
    assert {len(values) for by_count in errors.values() for values in by_count.values()} == {12}
    assert {"an adapter of its own", "full fine-tuning", "from scratch", "acentric factor"} < errors.keys()
    assert "of intervals of 95 %" in done.out


@pytest.mark.slow
def test_a_fluid_that_is_asked_for(tmp_path):
    done = call("fluids", *SHORT, "--fluid", "R125", "--samples", 5, "--output-dir", tmp_path)
    assert "52 tasks to learn from, 8 to calibrate, 1 new: R125" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "0"), "should be a positive integer"),
        (("--data", "none.csv"), "No such file"),
        (("--samples", "10000"), "a task has 429 samples only"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("fluids", *arguments, "--output-dir", tmp_path / "out", code=2).err
    assert not list(tmp_path.iterdir())


def test_a_name_that_a_table_does_not_have(table, tmp_path):
    done = call("fluids", "--data", table, "--fluid", "water", "--output-dir", tmp_path / "out", code=2)
    assert "'water' is none of the tasks" in done.err
