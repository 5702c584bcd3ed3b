"""Everything runs on a device that is not the CPU, and no pass waits for it: `on_fake_device.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LIMIT
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch has no devices that are written in Python",
)
def test_on_a_fake_device():
    # A process of its own, because a device has to be there before the first backward pass, and stays.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, str(HERE / "on_fake_device.py")],
        cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
