"""examples/method_comparison/families.py in a short form: its lines, how it goes on, its page; exact solutions."""

import json

import families
import pytest
import torch
from conftest import within
from family_methods import METHODS, SEPARATE
from family_tasks import CASES, residual_vector
from pde_least_squares import batch
from pdes import Points
from scripts import call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "methods"),
    [
        (["elliptic", "advection", "two parameters"], ["family", "full, Adam"]),
        (["elliptic"], list(METHODS)),
    ],
    ids=["short", "every method"],
)
def test_smoke(cases, methods, tmp_path):
    arguments = ("--smoke", "--cases", *cases, "--methods", *methods, "--outputs", tmp_path)
    call("families", *arguments)
    results = tmp_path / "smoke" / "families.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    expected = [(name, m, 0) for name in cases for m in methods if CASES[name].separate or m not in SEPARATE]
    assert [families.key(line) for line in lines] == expected
    for line in lines:
        for task in line["tasks"]:
            errors = [error for _, _, error in task["marks"]]
            assert all(0 < error < 100 for error in errors)
            if line["method"] in ("family", "LoTRA alone, LM", "full, LM"):
                assert errors[-1] < errors[0]
    tasks = {line["method"]: len(line["tasks"]) for line in lines if line["case"] == "elliptic"}
    assert tasks["family"] == 4  # two of them outside of the range
    assert tasks["full, Adam"] == 1
    page = (tmp_path / "smoke" / "families.md").read_text()
    for name in cases:
        assert f"<!-- end {name} -->" in page
    assert len(list((tmp_path / "smoke" / "images").glob("*.png"))) == 1 + len(cases)

    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    assert call("families", *arguments).out.count("Done in") == 1, "only what is missing should run"
    assert [families.key(json.loads(line)) for line in results.read_text().splitlines()] == expected


def test_needs_the_seconds_of_the_family(tmp_path):
    arguments = ("--smoke", "--cases", "front", "--methods", "parameter as an input", "--outputs", tmp_path)
    assert "takes the seconds of 'family'" in call("families", *arguments, code=1).err


@pytest.mark.parametrize("name", CASES)
def test_exact_solutions_solve_the_equations(name):
    case = CASES[name]
    for values in case.held_out():
        pde = case.pde(values)
        points = pde.sample(torch.Generator().manual_seed(0))
        parts = batch(pde, Points(*(part.double() for part in points)))
        assert residual_vector(pde, pde.exact, parts).abs().max() < within(1e-12)
        assert case.base != values, "the base should not be trained where errors are measured"
