"""Several machines: two launchers on this one, as Slurm would start them, over the loopback interface."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LIMIT, ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.processes]
SCRIPT = ROOT / "examples" / "accelerate" / "slurm.sh"

# A stub of srun: one task for each machine, with its number. A machine's launcher may end after that of the first.
SRUN = """#!/bin/bash
for SLURM_NODEID in $(seq 0 $((SLURM_NNODES - 1))); do
    export SLURM_NODEID
    "$@" > "$SLURM_LOGS/$SLURM_NODEID.txt" 2>&1 &
done
wait
"""
SCONTROL = "#!/bin/bash\necho 127.0.0.1\necho 127.0.0.1\n"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_two_machines_train_as_one(tmp_path):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_LOGS": str(tmp_path)}
    own = {"CONFIG": "examples/accelerate/cpu_2_processes.yaml", "PORT": str(free_port()), "PATH": path}
    arguments = [
        "--cpu",
        "--pde",
        "parabolic",
        "--base-steps",
        "3",
        "--steps",
        "4",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    env = environment() | slurm | own
    done = subprocess.run(["bash", SCRIPT, *arguments], cwd=ROOT, env=env, timeout=LIMIT, check=False)
    logs = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert done.returncode == 0, logs
    assert "Processes: 2 (MULTI_CPU)" in logs[0], logs
    two = json.loads((tmp_path / "run" / "parabolic_lotra.json").read_text())
    assert two["processes"] == 2
    alone = [sys.executable, "examples/accelerate_pde.py", *arguments[:-1], str(tmp_path / "alone")]
    subprocess.run(alone, cwd=ROOT, env=environment(), timeout=LIMIT, check=True, capture_output=True)
    one = json.loads((tmp_path / "alone" / "parabolic_lotra.json").read_text())
    assert two["course"][0] == pytest.approx(one["course"][0], rel=1e-3)  # fp32
