"""`run.py families` and `run.py convection` in a short form: lines, how they go on; exact solutions."""

import json
import math

import convection
import jobs
import pytest
import torch
from conftest import within
from family_methods import METHODS
from family_tasks import CASES, OfParameters, residual_vector
from pde_least_squares import batch
from pdes import PDES, Points
from scripts import call

ORIGIN = {"cpu_seconds", "version", "commit", "processor", "threads", "torch"}  # which every line names


def again_but_the_last(results, arguments):
    """Only what is missing runs again, and ends in the same lines."""
    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    assert call("run", *arguments).out.count("Done in") == 1, "only what is missing should run"
    names = [[json.loads(line).get(key) for key in ("case", "range", "method", "seed")] for line in text]
    assert [
        [line.get(key) for key in ("case", "range", "method", "seed")] for line in jobs.read_lines(results)
    ] == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "methods"),
    [("elliptic", list(METHODS)), *((case, ["family"]) for case in ("advection", "two parameters"))],
)
def test_smoke(case, methods, tmp_path):
    arguments = ("families", "--smoke", "--only", case, "--outputs", tmp_path)
    call("run", *arguments)
    results = tmp_path / "smoke" / "families.jsonl"
    lines = jobs.read_lines(results)
    assert [(line["case"], line["method"], line["seed"]) for line in lines] == [(case, m, 0) for m in methods]
    for line in lines:
        assert ORIGIN <= {*line, *line["environment"]}
        for task in line["tasks"]:
            errors = [error for _, _, error in task["marks"]]
            assert all(0 < error < 100 for error in errors)
            if line["method"] in ("family", "small KAN alone, LM", "LoTRA alone, LM", "full, LM"):
                assert errors[-1] < errors[0]
    tasks = {line["method"]: len(line["tasks"]) for line in lines}
    assert tasks["family"] == 2
    assert tasks.get("full, LM", 1) == 1
    again_but_the_last(results, arguments)


@pytest.mark.slow
def test_smoke_of_convection(tmp_path):
    arguments = ("convection", "--smoke", "--outputs", tmp_path)
    call("run", *arguments)
    lines = jobs.read_lines(tmp_path / "smoke" / "convection.jsonl")
    assert [line["method"] for line in lines] == list(convection.METHODS)
    for line in lines:
        assert ORIGIN <= {*line, *line["environment"]}
        assert all(0 < task["marks"][-1][-1] < 10 for task in line["tasks"])
    again_but_the_last(tmp_path / "smoke" / "convection.jsonl", arguments)


def test_exact_solution_of_the_convection_has_no_residual(tmp_path):
    lab = convection.Lab("30-40", 0, convection.SMOKE, tmp_path)
    parts = {name: (p.double(), s.double()) for name, (p, s) in lab.points(3, 0.5, lab.bounds).items()}
    assert {name: len(points) for name, (points, _) in parts.items()} == {"equation": 1500, "value": 250}
    ends = torch.tensor([2 * math.pi, 0.5])
    assert ((0.9 * ends < parts["equation"][0].amax(0)) & (parts["equation"][0].amax(0) <= ends)).all()
    assert parts["value"][0][:, 1].abs().max() == 0

    def exact(points, speeds):
        return lab.case.pde((speeds,)).exact(points)

    for name, residual in lab.case.residuals(OfParameters.at).items():
        assert residual(exact, parts[name]).abs().max() < within(1e4 * torch.finfo(torch.float64).eps), name


def test_needs_the_seconds_of_the_family(tmp_path):
    arguments = ("families", "--smoke", "--only", "elliptic", "parameter as an input", "--outputs", tmp_path)
    assert "takes the seconds of 'family'" in call("run", *arguments, code=1).err


def residual_of_exact(pde):
    points = pde.sample(torch.Generator().manual_seed(0))
    parts = batch(pde, Points(*(part.double() for part in points)))
    return residual_vector(pde, pde.exact, parts).abs().max()


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.title)
def test_exact_solutions_solve_the_equations(case):
    for values in case.held_out():
        assert residual_of_exact(case.pde(values)) < within(1e-12)
        assert case.base != values, "the base should not be trained where errors are measured"


@pytest.mark.parametrize("name", PDES)
def test_exact_solutions_of_single_equations(name):
    for parameter in (PDES[name].base_parameter, PDES[name].target_parameter):
        assert residual_of_exact(PDES[name](parameter)) < within(1e-12)
