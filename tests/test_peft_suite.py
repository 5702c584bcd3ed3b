"""PEFT's own table-driven tests on LoTRA. `PEFT_CHECKOUT` is the path of a checkout of PEFT's repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("PEFT_CHECKOUT")
FILES = ("tests/test_custom_models.py", "tests/test_config.py")

# What LoRA passes and LoTRA does not, and why.
EXPECTED = {
    "test_add_adapter_rejects_duplicate_name_without_mutation": "PeftMixedModel is closed to methods from outside",
    "test_mixed_adapter_batches_multiple_modules_to_save": "in a mixed batch, PEFT takes trained copies of torch's "
    "own layers only, and here the copy is one of a KAN layer",
    "test_from_pretrained_config_construction": "the config passed in stays as it is; the model has a completed copy",
    "test_default_target_modules_not_set_raises": "without `target_modules`, every known KAN layer is adapted",
    "test_default_target_modules_not_set_model_type_set_raises": "likewise",
}


def run(method, path):
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]),
        "LOTRA_SUITE": method,
        "LOTRA_SUITE_OUTCOMES": str(path),
        "HF_HUB_OFFLINE": "1",
    }
    plugins = ("-p", "peft_suite_plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=line", *plugins, *FILES]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=900)
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.skipif(CHECKOUT is None, reason="the environment variable PEFT_CHECKOUT is not set")
def test_what_lora_passes_lotra_passes(tmp_path):
    lora, lotra = (run(method, tmp_path / method) for method in ("LoRA", "LoTRA"))
    assert lora.keys() == lotra.keys()
    passed = [test for test, outcome in lora.items() if outcome == "passed"]
    assert len(passed) > 300
    failed = {test: lotra[test] for test in passed if lotra[test].startswith("failed")}
    assert {test.split("::")[-1].split("[")[0] for test in failed} == set(EXPECTED), failed
    print(f"{len(passed)} pass on LoRA, {sum(lotra[test] == 'passed' for test in passed)} of them on LoTRA")
