"""The benchmarks run, in a short form, and what they count is plausible. No test relies on what they time."""

import json
import shutil

import gauss_newton_cost
import pytest
import step_cost
import torch
from conftest import within
from launching import launch
from layers import KINDS
from measuring import clock
from methods import DENSE, FLOOR, FULL, LOTRA, training_methods
from scripts import EXAMPLES, InThisProcess, call


@pytest.fixture
def _once(monkeypatch):
    """Every pass is timed once: what takes the time of a benchmark is that it repeats."""
    monkeypatch.setattr(step_cost, "steady", clock)


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_once")]


def steps(folder, *arguments):
    """The record of the benchmark of training steps, and what it prints."""
    done = call("step_cost", "--threads", 1, "--seconds", 0, *arguments, "--output-dir", folder)
    return json.loads((folder / "step_cost.json").read_text()), done.out


def test_step_cost(tmp_path):
    parts = ("--parts", "step", "inference", "initialization")
    results, _ = steps(tmp_path, "--widths", 16, 32, "--batches", 32, *parts)
    assert (tmp_path / "step_cost.png").stat().st_size > 10_000
    assert results["environment"]["threads"] == 1
    assert results["settings"]["widths"] == [16, 32]
    costs = {}
    for row in results["rows"]:
        costs.setdefault((row["layer"], row["width"]), {}).setdefault(row["part"], {})[row["method"]] = row
    assert len(costs) == 8
    for (layer, width), parts in costs.items():
        step, inference = parts["step"], parts["inference"]
        assert ("LoRA, target_modules" in step) == (layer == "fastkan")
        assert all(len(row["seconds"]) == 5 for row in step.values() if not row["refused"])
        # Forward and input gradient are a matrix product each; the gradient of the coefficients is a third.
        assert step[FULL]["flops"] == pytest.approx(1.5 * step[FLOOR]["flops"], rel=0.01)
        assert step[FLOOR]["flops"] < step[LOTRA]["flops"]
        # Parameters, their gradients and Adam's two moments, in fp32.
        assert step[FULL]["peak_bytes"] > 16 * step[FULL]["trainable"]
        for cost in ("saved_bytes", "peak_bytes"):
            assert 0 < step[FLOOR][cost] < step[FULL][cost]
        assert step[FULL]["trainable"] >= 8 * width**2
        assert inference["base"]["flops"] == inference["merged"]["flops"] == inference["disabled"]["flops"]
        assert inference["base"]["flops"] < inference["unmerged"]["flops"]
        assert 0 < parts["initialization"]["gradient initialisation"]["flops"]


EPS = torch.finfo(torch.float32).eps
STEP = ("--layers", "chebyshev", "--widths", 16, "--parts", "step")


def lotra_of(record):
    return {(row["batch"], row["dtype"], row["mode"]): row for row in record["rows"] if row["method"] == LOTRA}


def test_types_of_a_step(tmp_path):
    """TF32 changes nothing on a CPU, bf16 saves fewer bytes."""
    record, _ = steps(tmp_path, *STEP, "--batches", 8, 16, "--dtypes", "fp32", "tf32", "bf16")
    rows = lotra_of(record)
    assert len(rows) == 2 * 3
    assert rows[16, "tf32", "eager"]["flops"] == rows[16, "fp32", "eager"]["flops"] > 0
    assert rows[16, "bf16", "eager"]["saved_bytes"] < rows[16, "fp32", "eager"]["saved_bytes"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps(tmp_path):
    """Their time is taken; what they do is not counted."""
    script, arguments = EXAMPLES / "benchmarks" / "step_cost.py", (*STEP, "--batches", 8, "--modes", "compile")
    launch(script, "--seconds", 0, *arguments, "--output-dir", tmp_path, launcher="python", num_processes=1)
    row = lotra_of(json.loads((tmp_path / "step_cost.json").read_text()))[8, "fp32", "compile"]
    assert len(row["seconds"]) == 5
    assert row["flops"] is None


def test_a_linear_layer(tmp_path):
    """LoTRA of ranks (8, 8, 1) beside LoRA of rank 8: the core's numbers more, and almost none of FLOPs."""
    record, _ = steps(tmp_path, "--layers", "linear", "--widths", 256, "--batches", 256, "--parts", "step")
    rows = {row["method"]: row for row in record["rows"]}
    lotra, lora = rows[LOTRA], rows["LoRA, target_modules"]
    assert lotra["r"] == [8, 8, 1]
    assert lora["trainable"] < lotra["trainable"] <= lora["trainable"] + 8 * 8 + 1
    assert lotra["flops"] < 1.02 * lora["flops"]


def test_growth(tmp_path):
    short = ("--layers", "chebyshev", "--widths", 16, "--batches", 16, "--parts", "growth", "--r", 2, 2, 4)
    record, out = steps(tmp_path, *short)
    growths = record["growth"]
    assert [growth["over"] for growth in growths] == ["width", "basis", "batch", "rank", "adapters"]
    for growth in growths:
        assert len(growth["sizes"]) == len(growth["flops"]) == len(growth["seconds"]) == 4
        assert 0 < growth["flops_exponent"] < 2.1
        assert growth["over"] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "dense"), "invalid choice: 'dense'"),
        (("--basis", 3), "more than 3"),
        (("--device", "abacus"), "'abacus' cannot be used"),
        (("--modes", "eager", "graphs"), "graphs need --device cuda, got 'cpu'"),
        (("--seconds", -1), "a number from 0 on, got -1.0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("step_cost", *arguments, "--output-dir", tmp_path / "results", code=2).err
    assert not list(tmp_path.iterdir())


def test_serving(tmp_path):
    short = ("--layers", 5, "--rounds", 2, "--width", 16, "--batch", 6, "--adapters", 2)
    call("serving", *short, "--output-dir", tmp_path)
    results = json.loads((tmp_path / "serving.json").read_text())
    assert [len(seconds) for seconds in results["loading"]["seconds"].values()] == [2, 2]
    assert list(results["mixed"]) == ["efficient", "fastkan", "chebyshev"]
    assert all(result["difference"] < within(64 * EPS) for result in results["mixed"].values())


def test_growth_of_serving(tmp_path):
    short = ("--held", 2, 3, "--depths", 2, 4, "--together", 1, 3, "--growth-width", 8, "--count", 10, "--batch", 6)
    out = call("serving", "--parts", "growth", *short, "--rounds", 2, "--output-dir", tmp_path).out
    results = json.loads((tmp_path / "serving.json").read_text())
    assert [*results] == ["settings", "memory", "held", "depth", "together"]
    assert [*results["held"]][:2] == ["hot swap, LoRA", "hot swap, LoTRA"]
    assert [*results["depth"]] == [
        f"{what}, {name}" for what in ("get_peft_model", "add_adapter") for name in ("LoRA", "LoTRA")
    ]
    assert all(
        [*result["ratios"]] == ["merged", "one, not merged", "1", "3"] for result in results["together"].values()
    )
    assert "exponent" in out


def test_saving(tmp_path):
    call("saving", "--seconds", 1, "--kills", 12, "--rounds", 2, "--output-dir", tmp_path)
    results = json.loads((tmp_path / "saving.json").read_text())
    for found in (*results["race"].values(), results["kills"]):
        assert [*found] == ["one of the two"]


def small_layers(folder, *arguments):
    call("small_layers", "--widths", 8, "--batch", 8, "--seconds", 1, *arguments, "--output-dir", folder)
    return json.loads((folder / "small_layers.json").read_text())


def test_calls_of_small_layers(tmp_path):
    results = small_layers(tmp_path, "--parts", "calls")
    assert list(results["calls"]) == ["chebyshev", "fastkan", "efficient"]
    assert all(0 < count <= 80 for count in results["calls"].values())


def test_an_adapter_needs_fewer_kernels_than_its_dense_form(tmp_path):
    for row in small_layers(tmp_path, "--parts", "kernels")["kernels"]:
        count = row["kernels"]
        assert count["frozen layer"] < count["full fine-tuning"] < count[LOTRA] < count["dense A + Δ"]


def test_a_compiled_adapter_has_no_more_kernels_than_its_dense_form():
    metrics = pytest.importorskip("torch._inductor.metrics")
    kind, x, counts = KINDS["chebyshev"], torch.rand(256, 64), {}
    methods = training_methods(kind.build(64, 64, 8), kind, (64, 64, 8), (8, 8, 4))
    for name in (DENSE, LOTRA):
        torch._dynamo.reset()
        metrics.reset()
        torch.compile(methods[name].model)(x.requires_grad_()).sum().backward()
        counts[name] = metrics.generated_kernel_count
    assert 0 < counts[LOTRA] <= counts[DENSE]


def test_times_of_small_layers(tmp_path):
    results = small_layers(tmp_path, "--parts", "steps", "constants")
    (row,) = results["steps"]
    assert row["over full"].keys() == {LOTRA, "last layer"}
    assert len(results["constants"]) == 4


def test_all_costs_on_one_device(tmp_path):
    call("on_device", "--smoke", "--output-dir", tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert page.count("\n## ") == 4
    assert "LoTRA" in page


def test_convolutions(tmp_path):
    call("convolutions", "--channels", 16, "--kernels", 3, "--rounds", 1, "--output-dir", tmp_path)
    full, *adapters = json.loads((tmp_path / "convolutions.json").read_text())
    assert len(adapters) == 5
    for row in adapters:
        assert row["trained"] <= 0.1 * full["trained"]
        # The frozen convolution and its input's gradient are two of the three products of full fine-tuning.
        assert 2 / 3 * full["flops"] < row["flops"] < 1.1 * full["flops"]


def test_family_cost(tmp_path):
    call("family_cost", "--widths", 64, "--rounds", 1, "--output-dir", tmp_path)
    (row,) = json.loads((tmp_path / "family_cost.json").read_text())
    assert 1 < row["thin_ratio"] < row["terms"]


def test_robust_fit(tmp_path):
    arguments = ("--problems", "fronts", "classes", "--starts", "merged", "cores at 0.1", "--seeds", 1)
    done = call("robust_fit", *arguments, "--seconds", 0.1, "--output-dir", tmp_path)
    rows = json.loads((tmp_path / "robust_fit.json").read_text())
    assert [len(row["losses"]) for row in rows] == [5, 5, 3, 3]
    assert all(0 < loss < 1e3 for row in rows for loss in row["losses"].values())
    assert "fronts: medians of 2 starts: ours " in done.out


def test_default_ranks(tmp_path):
    call("default_ranks", "--cases", "Chebyshev [2, 8, 8, 1], values", "--seeds", 1, "--output-dir", tmp_path)
    (row,) = json.loads((tmp_path / "default_ranks.json").read_text())
    assert row["a tenth"]["share"] <= 0.1 < row["default"]["share"]
    assert row["default"]["error"] < row["a tenth"]["error"]


def test_few_labels(tmp_path):
    call("few_labels", "--seeds", 1, "--output-dir", tmp_path)
    (row,) = json.loads((tmp_path / "few_labels.json").read_text())
    assert row["before"]["accuracy"] < 0.5 < min(row[label]["accuracy"] for label in row if label != "before")


def check_gauss_newton_cost(results):
    assert 0.5 < results["gram"][0]["memory"] < 0.7
    assert results["chunks"][0]["ratio"] > 0
    assert results["passes"][0].keys() == {"numbers", "problem", "rows", "gram", "product"}
    large, small = results["steps"][0], results["steps"][-1]
    assert large["NormalEquations"]["loss"] == pytest.approx(large["ConjugateGradients"]["loss"], rel=0.01)
    assert 0 < large["ConjugateGradients"]["products"] < small["ConjugateGradients"]["products"]
    assert [row["form"] for row in results["size"]] == ["ConjugateGradients", "NormalEquations"]
    short_of, enough = (row["losses"][-1] for row in results["size"])
    assert short_of == pytest.approx(enough, rel=0.01)


def test_gauss_newton_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(gauss_newton_cost.multiprocessing, "get_context", InThisProcess)
    parts = ("--parts", "gram", "passes", "steps", "chunks", "size")
    call("gauss_newton_cost", "--smoke", "--threads", 1, *parts, "--output-dir", tmp_path)
    check_gauss_newton_cost(json.loads((tmp_path / "gauss_newton_cost.json").read_text()))


@pytest.mark.processes
def test_gauss_newton_cost_in_processes(tmp_path):
    script = EXAMPLES / "benchmarks" / "gauss_newton_cost.py"
    arguments = ("--smoke", "--threads", 1, "--parts", "processes", "--output-dir", tmp_path)
    launch(script, *arguments, launcher="python", num_processes=1)
    results = json.loads((tmp_path / "gauss_newton_cost.json").read_text())
    one, two = results["processes"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["difference"] < within(1e-4)  # fp32, after several iterations


def test_inference(tmp_path):
    call("inference", "--widths", 16, "--blocks", 4, "--rounds", 1, "--output-dir", tmp_path)
    rows = json.loads((tmp_path / "inference.json").read_text())
    assert [row["layers"] for row in rows] == [8, 8, 8]
    assert all(row["forward_passes"] < 8 * 4 and row["memory_ratio"] > 0 for row in rows)
