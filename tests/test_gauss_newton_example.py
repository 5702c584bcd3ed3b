"""The second-order example in a short form: its residuals, its runs, what it leaves, how it goes on."""

import json

import gauss_newton
import pytest
import torch
from chebyshev_kan import ChebyshevKAN
from conftest import assert_equal
from launching import launch
from pde_least_squares import batch, residual_functions
from pdes import PDES
from scripts import EXAMPLES, InThisProcess, call

SHORT = ("--seeds", 1, "--steps", 3, "--base-steps", 3, "--lm-steps", 2, "--widths", 8)


@pytest.mark.parametrize("family", PDES)
def test_mean_squares_sum_to_the_loss_of_the_pde(family):
    pde = PDES[family](1.3)
    points = pde.sample(torch.Generator().manual_seed(0), interior=50, per_side=7)
    torch.manual_seed(0)
    model = ChebyshevKAN((2, 8, 8, 1)).double()
    points = type(points)(*(part.double() for part in points))
    data = batch(pde, points)
    means = {kind: function(model, data[kind]).square().mean() for kind, function in residual_functions(pde).items()}
    assert set(means) == set(data)
    assert_equal(sum(means.values()), pde.loss(model, points))


def check_results(folder):
    assert (folder / "gauss_newton.png").stat().st_size > 10_000
    record = json.loads((folder / "gauss_newton.json").read_text(), parse_constant=pytest.fail)
    rows = record["families"]["parabolic"]["rows"]
    assert rows["lm adapter"]["numbers"] == 976 <= rows["lm all"]["numbers"] / 8
    assert rows["lm adapter"]["error"] < record["runs"]["parabolic"]["lm adapter"][0]["marks"][0][-1]
    assert [(row["width"], row["part"]) for row in record["widths"]] == [(8, "adapter"), (8, "all")]


@pytest.mark.slow
def test_table_picture_and_second_start(tmp_path, monkeypatch):
    monkeypatch.setattr(gauss_newton.multiprocessing, "get_context", InThisProcess)
    arguments = (*SHORT, "--families", "parabolic", "--output-dir", tmp_path)
    first = call("gauss_newton", *arguments)
    check_results(tmp_path)
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_*.*") if path.stem != "gauss_newton"}
    assert len(runs) == 1 + 4 + 2  # base, methods, costs
    second = call("gauss_newton", *arguments)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs, "a run was repeated"
    assert second.out.splitlines()[-1] == first.out.splitlines()[-1]


@pytest.mark.slow
def test_costs_are_measured_in_processes_of_their_own(tmp_path):
    script = EXAMPLES / "gauss_newton.py"
    launch(script, *SHORT, "--families", "parabolic", "--output-dir", tmp_path, launcher="python", num_processes=1)
    check_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--families", "parabola"), "invalid choice: 'parabola'"),
        (("--lm-steps", 0), "positive integer"),
        (("--widths", 4), "at least 8, the highest rank, got 4"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("gauss_newton", *arguments, "--output-dir", tmp_path / "out", code=2).err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kan", ["chebyshev", "pykan"])
def test_main_job_by_lm(kan, tmp_path):
    short = ("--kan", kan, "--base-steps", 3, "--steps", 2, "--optimizer", "lm", "--output-dir", tmp_path)
    call("pde_transfer", *short)
    base, full, adapted = json.loads((tmp_path / f"elliptic_{kan}_lm.json").read_text())["rows"]
    assert len({base["error"], full["error"], adapted["error"]}) == 3  # both have moved
