"""examples/pde_family.py, in a short form."""

import json

import pytest
import torch
from pde_transfer import build_kan
from peft import PeftModel
from scripts import call


@pytest.mark.slow
def test_base_and_family_together(tmp_path):
    sizes = {"iterations": 2, "parameters": 1, "base-steps": 20}
    arguments = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    call("pde_family", *arguments, "--output-dir", tmp_path)
    record = json.loads((tmp_path / "elliptic_family.json").read_text())
    assert record["numbers"] == 8960 + 2532
    assert record["rows"][0]["core"] == 324
    base = build_kan("chebyshev", 0)
    base.load_state_dict(torch.load(tmp_path / "elliptic_family_base.pt"))
    PeftModel.from_pretrained(base, tmp_path / "elliptic_family")  # a warning would be an error


@pytest.mark.slow
def test_a_family_and_its_members(tmp_path):
    pde = "hyperbolic"  # `.ci/run` has the elliptic one
    sizes = {"iterations": 1, "parameters": 2, "compared": 1, "base-steps": 20}
    arguments = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    done = call("pde_family", "--frozen", "--pde", pde, *arguments, "--output-dir", tmp_path)
    record = json.loads((tmp_path / f"{pde}_frozen.json").read_text())
    assert [len(row["family"]) for row in record["rows"]] == [6, 6]
    assert ["LoTRA alone" in row for row in record["rows"]] == [True, False]
    for row in record["rows"]:
        assert row["core"] < record["numbers"] / 3
        assert row["family"][-1][1] < row["family"][0][1]
    assert (tmp_path / f"{pde}_frozen.png").stat().st_size > 10_000
    assert (tmp_path / f"{pde}_frozen" / "adapter_model.safetensors").exists()
    assert f"Medians over 2 parameters never trained on ({record['numbers']:,} numbers" in done.out
