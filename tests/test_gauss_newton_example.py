"""The second-order example in a short form: its residuals, its runs, what it leaves, how it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from chebyshev_kan import ChebyshevKAN  # noqa: E402
from pde_least_squares import batch, residual_functions  # noqa: E402
from pdes import PDES  # noqa: E402

# torch's own, as in pyproject.toml
WARNINGS = ("-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning")
SHORT = ("--seeds", 1, "--steps", 3, "--base-steps", 3, "--lm-steps", 2, "--widths", 8)


def run(script, *arguments):
    command = [sys.executable, *WARNINGS, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


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
    torch.testing.assert_close(sum(means.values()), pde.loss(model, points), rtol=1e-10, atol=0)


def test_table_picture_and_second_start(tmp_path):
    arguments = (*SHORT, "--families", "parabolic", "--output-dir", tmp_path)
    first = run("gauss_newton.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "gauss_newton.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "gauss_newton.json").read_text(), parse_constant=pytest.fail)
    rows = record["families"]["parabolic"]["rows"]
    assert rows["lm adapter"]["numbers"] == 976 <= rows["lm all"]["numbers"] / 8
    assert rows["lm adapter"]["error"] < record["runs"]["parabolic"]["lm adapter"][0]["marks"][0][-1]
    assert [(row["width"], row["part"]) for row in record["widths"]] == [(8, "adapter"), (8, "all")]
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_*.*") if path.stem != "gauss_newton"}
    assert len(runs) == 1 + 4 + 2  # base, methods, costs
    second = run("gauss_newton.py", *arguments)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in runs} == runs, "a run was repeated"
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--families", "parabola"), "invalid choice: 'parabola'"),
        (("--lm-steps", 0), "positive integer"),
        (("--widths", 4), "at least 8, the highest rank, got 4"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run("gauss_newton.py", *arguments, "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kan", ["chebyshev", "pykan"])
def test_main_job_by_lm(kan, tmp_path):
    short = ("--kan", kan, "--base-steps", 3, "--steps", 2, "--optimizer", "lm", "--output-dir", tmp_path)
    done = run("pde_transfer.py", *short)
    assert done.returncode == 0, done.stderr
    base, full, adapted = json.loads((tmp_path / f"elliptic_{kan}_lm.json").read_text())["rows"]
    assert len({base["error"], full["error"], adapted["error"]}) == 3  # both have moved
