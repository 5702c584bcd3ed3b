"""PEFT's own table-driven tests on LoTRA.

`PEFT_CHECKOUT` is the path of PEFT's source distribution, unpacked, or of a checkout of its repository.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from launching import LIMIT

CHECKOUT = os.environ.get("PEFT_CHECKOUT")
FILES = ("tests/test_custom_models.py", "tests/test_config.py")
HERE = Path(__file__).parent
# The version of PEFT, what LoRA passes and LoTRA does not, by whole test id, and why; what the plugin drops.
EXPECTED = json.loads((HERE / "peft_suite_expected.json").read_text())


def run(method, directory):
    """What the plugin writes of a run of PEFT's tests, which are in `directory`."""
    path = directory / f"{method}.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "LOTRA_SUITE": method,
        "LOTRA_SUITE_OUTCOMES": str(path),
        "HF_HUB_OFFLINE": "1",
    }
    plugins = ("-p", "peft_suite_plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=line", *plugins, *FILES]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="the environment variable PEFT_CHECKOUT is not set")
def test_what_lora_passes_lotra_passes(tmp_path):
    version = EXPECTED["version"]
    assert peft.__version__ == version
    assert f'VERSION = "{version}"' in (Path(CHECKOUT) / "setup.py").read_text()
    # The source distribution lacks the file that makes the tests a package, which they import each other from.
    shutil.copytree(Path(CHECKOUT) / "tests", tmp_path / "tests")
    (tmp_path / "tests" / "__init__.py").touch()
    lora, lotra = (run(method, tmp_path) for method in ("LoRA", "LoTRA"))
    assert lora["dropped"] == lotra["dropped"] == EXPECTED["dropped"]
    assert lora["outcomes"].keys() == lotra["outcomes"].keys()
    passed = [test for test, outcome in lora["outcomes"].items() if outcome == "passed"]
    for kind in ("failed", "skipped"):
        found = {test: lotra["outcomes"][test] for test in passed if lotra["outcomes"][test].startswith(kind)}
        expected = {test for tests in EXPECTED[kind].values() for test in tests}
        assert set(found) == expected, {test: found.get(test, "not " + kind) for test in set(found) ^ expected}
    passed_too = [test for test in passed if lotra["outcomes"][test] == "passed"]
    assert (len(passed), len(passed_too)) == (EXPECTED["passed"]["LoRA"], EXPECTED["passed"]["LoTRA"])
