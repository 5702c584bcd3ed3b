"""examples/method_comparison/families.py in a short form: its lines, how it goes on, its page; exact solutions."""

import json
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[1] / "examples" / "method_comparison"
for folder in (SUITE.parent / "benchmarks", SUITE.parent, SUITE):
    sys.path.insert(0, str(folder))
import families  # noqa: E402
from family_methods import METHODS, SEPARATE  # noqa: E402
from family_tasks import CASES, residual_vector  # noqa: E402
from pde_least_squares import batch  # noqa: E402
from pdes import Points  # noqa: E402

CHOSEN = ["elliptic", "advection", "two parameters"]


def test_smoke(tmp_path, monkeypatch, capsys):
    arguments = ["families.py", "--smoke", "--cases", *CHOSEN, "--outputs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert families.main() == 0
    results = tmp_path / "smoke" / "families.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    expected = [(name, m, 0) for name in CHOSEN for m in METHODS if CASES[name].separate or m not in SEPARATE]
    assert [families.key(line) for line in lines] == expected
    for line in lines:
        for task in line["tasks"]:
            errors = [error for _, _, error in task["marks"]]
            assert all(0 < error < 100 for error in errors)
            if line["method"] in ("family", "LoTRA alone, LM", "full, LM"):
                assert errors[-1] < errors[0]
    assert [len(line["tasks"]) for line in lines[:4]] == [4, 4, 4, 1]  # two of them outside of the range
    page = (tmp_path / "smoke" / "families.md").read_text()
    for name in CHOSEN:
        assert f"<!-- end {name} -->" in page
    assert len(list((tmp_path / "smoke" / "images").glob("*.png"))) == 1 + len(CHOSEN)

    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    capsys.readouterr()
    assert families.main() == 0
    assert capsys.readouterr().out.count("Done in") == 1, "only what is missing should run"
    assert [families.key(json.loads(line)) for line in results.read_text().splitlines()] == expected


def test_needs_the_seconds_of_the_family(tmp_path, monkeypatch):
    arguments = ["families.py", "--smoke", "--cases", "front", "--methods", "parameter as an input"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--outputs", str(tmp_path)])
    with pytest.raises(SystemExit, match="takes the seconds of 'family'"):
        families.main()


@pytest.mark.parametrize("name", CASES)
def test_exact_solutions_solve_the_equations(name):
    case = CASES[name]
    for values in case.held_out():
        pde = case.pde(values)
        points = pde.sample(torch.Generator().manual_seed(0))
        parts = batch(pde, Points(*(part.double() for part in points)))
        assert residual_vector(pde, pde.exact, parts).abs().max() < 1e-12
        assert case.base != values, "the base should not be trained where errors are measured"
