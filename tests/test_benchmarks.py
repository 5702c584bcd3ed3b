"""The benchmark of training steps runs, in a short form, and what it counts is plausible."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "step_cost.py"
FLOOR, FULL, LOTRA = "frozen layer", "full fine-tuning", "LoTRA"


def run(*arguments, warnings="error"):
    return subprocess.run(
        [sys.executable, "-W", warnings, str(SCRIPT), "--threads", "1", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_step_cost(tmp_path):
    short = ("--widths", 16, 32, "--batches", 32, "--seconds", 0, "--output-dir", tmp_path)
    done = run(*short, "--parts", "step", "inference", "slim", "initialization")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "step_cost.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "step_cost.json").read_text())
    assert results["environment"]["threads"] == 1
    assert results["settings"]["widths"] == [16, 32]
    costs = {}
    for row in results["rows"]:
        costs.setdefault((row["layer"], row["width"]), {}).setdefault(row["part"], {})[row["method"]] = row
    assert len(costs) == 8
    for (layer, width), parts in costs.items():
        step, inference, slim = (parts[part] for part in ("step", "inference", "slim"))
        assert ("LoRA, target_modules" in step) == (layer == "fastkan")
        assert all(len(row["seconds"]) == 5 and min(row["seconds"]) > 0 for row in step.values() if not row["refused"])
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
        assert slim["Slim"]["coefficient_bytes"] <= 0.1 * slim["dense"]["coefficient_bytes"] + 4
        assert slim["dense"]["coefficient_bytes"] == 4 * 8 * width**2


STEP = ("--layers", "chebyshev", "--widths", 16, "--seconds", 0, "--parts", "step")


def lotra_of(output_dir):
    rows = json.loads((output_dir / "step_cost.json").read_text())["rows"]
    return {(row["batch"], row["dtype"], row["mode"]): row for row in rows if row["method"] == LOTRA}


def test_types_of_a_step(tmp_path):
    """TF32 changes nothing on a CPU, bf16 saves fewer bytes."""
    done = run(*STEP, "--batches", 8, 16, "--dtypes", "fp32", "tf32", "bf16", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = lotra_of(tmp_path)
    assert len(rows) == 2 * 3
    assert rows[16, "tf32", "eager"]["flops"] == rows[16, "fp32", "eager"]["flops"] > 0
    assert rows[16, "bf16", "eager"]["saved_bytes"] < rows[16, "fp32", "eager"]["saved_bytes"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps(tmp_path):
    """Their time is taken; what they do is not counted."""
    done = run(*STEP, "--batches", 8, "--modes", "compile", "--output-dir", tmp_path, warnings="default")
    assert done.returncode == 0, done.stderr
    row = lotra_of(tmp_path)[8, "fp32", "compile"]
    assert min(row["seconds"]) > 0
    assert row["flops"] is None


def test_a_linear_layer(tmp_path):
    """LoTRA of ranks (8, 8, 1) beside LoRA of rank 8: the core's numbers more, and almost none of FLOPs."""
    short = ("--layers", "linear", "--widths", 256, "--batches", 256, "--seconds", 0, "--output-dir", tmp_path)
    done = run(*short, "--parts", "step")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads((tmp_path / "step_cost.json").read_text())["rows"]}
    lotra, lora = rows[LOTRA], rows["LoRA, target_modules"]
    assert lotra["r"] == [8, 8, 1]
    assert lora["trainable"] < lotra["trainable"] <= lora["trainable"] + 8 * 8 + 1
    assert lotra["flops"] < 1.02 * lora["flops"]


def test_growth(tmp_path):
    short = ("--layers", "chebyshev", "--widths", 16, "--batches", 16, "--seconds", 0, "--output-dir", tmp_path)
    done = run(*short, "--parts", "growth", "--r", 2, 2, 4)
    assert done.returncode == 0, done.stderr
    growths = json.loads((tmp_path / "step_cost.json").read_text())["growth"]
    assert [growth["over"] for growth in growths] == ["width", "basis", "batch", "rank", "adapters"]
    for growth in growths:
        assert len(growth["sizes"]) == len(growth["flops"]) == len(growth["seconds"]) == 4
        assert 0 < growth["flops_exponent"] < 2.1
        assert growth["over"] in done.stdout


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
    done = run(*arguments, "--output-dir", tmp_path / "results")
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_serving(tmp_path):
    command = [sys.executable, "-W", "error", str(SCRIPT.with_name("serving.py")), "--layers", "5", "--rounds", "2"]
    command += ["--width", "16", "--batch", "6", "--adapters", "2", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "serving.json").read_text())
    assert results["loading"]["ratio"] > 0
    assert list(results["mixed"]) == ["efficient", "fastkan", "chebyshev"]
    assert all(0 < result["difference"] < 1e-5 and result["ratio"] > 0 for result in results["mixed"].values())


def test_small_layers(tmp_path):
    command = [sys.executable, "-W", "error", str(SCRIPT.with_name("small_layers.py")), "--output-dir", str(tmp_path)]
    command += ["--parts", "calls", "steps", "constants", "--widths", "8", "--batch", "8", "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "small_layers.json").read_text())
    assert list(results["calls"]) == ["chebyshev", "fastkan", "efficient"]
    assert all(0 < count <= 80 for count in results["calls"].values())
    (row,) = results["steps"]
    assert row["over full"].keys() == {LOTRA, "last layer"}
    assert all(value > 0 for value in results["constants"].values())


def test_convolutions(tmp_path):
    command = [sys.executable, "-W", "error", str(SCRIPT.with_name("convolutions.py")), "--output-dir", str(tmp_path)]
    command += ["--channels", "16", "--kernels", "3", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    full, *adapters = json.loads((tmp_path / "convolutions.json").read_text())
    assert len(adapters) == 5
    for row in adapters:
        assert row["trained"] <= 0.1 * full["trained"]
        assert 0 < row["time_ratio"]
        # The frozen convolution and its input's gradient are two of the three products of full fine-tuning.
        assert 2 / 3 * full["flops"] < row["flops"] < 1.1 * full["flops"]


def test_family_cost(tmp_path):
    command = [sys.executable, "-W", "error", str(SCRIPT.with_name("family_cost.py")), "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, "--widths", "64", "--rounds", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "family_cost.json").read_text())
    assert 1 < row["thin_ratio"] < row["terms"]
    assert min(row["time_ratio"], row["swap_seconds"]) > 0


def test_gauss_newton_cost(tmp_path):
    # TorchScript is what torch's own code uses when forward derivatives are first used.
    warnings = ("-W", "error", "-W", "ignore:`torch.jit.script:DeprecationWarning")
    command = [sys.executable, *warnings, str(SCRIPT.with_name("gauss_newton_cost.py")), "--smoke"]
    done = subprocess.run(
        [*command, "--threads", "1", "--output-dir", str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gauss_newton_cost.json").read_text())
    assert 0.5 < results["gram"][0]["memory"] < 0.7
    assert min(results["passes"][0][key] for key in ("rows", "gram", "product")) > 0
    assert [row["form"] for row in results["size"]] == ["ConjugateGradients", "NormalEquations"]
    short_of, enough = (row["losses"][-1] for row in results["size"])
    assert short_of == pytest.approx(enough, rel=0.01)
    one, two = results["processes"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["difference"] < 1e-4  # fp32


def test_inference(tmp_path):
    command = [sys.executable, "-W", "error", str(SCRIPT.with_name("inference.py")), "--output-dir", str(tmp_path)]
    command += ["--widths", "16", "--blocks", "4", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "inference.json").read_text())
    assert [row["layers"] for row in rows] == [8, 8, 8]
    assert all(row["forward_passes"] < 8 * 4 and row["memory_ratio"] > 0 for row in rows)
