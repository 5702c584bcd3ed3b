"""Kill processes of examples/accelerate_pde.py under torchrun by SIGKILL at random moments, and see if it recovers.

    python examples/benchmarks/kill_recovery.py --runs 20

Victims take turns. Some are the first or the second worker, after whose death torchrun restarts the workers. Others
are the launcher and all workers at once, at any time or while the adapter is written; the same command is then given
again. A run has recovered if it ends with the same adapter as an uninterrupted run, bit for bit. After every kill, the
adapter files that exist are loaded. At the end of every run, a truncated copy is loaded. All but the complete adapter
should be refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from tqdm import tqdm

EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from command_line import exit_code, make_output_dir, new_parser, positive_int  # noqa: E402
from pde_transfer import build_kan  # noqa: E402
from reporting import write_atomically  # noqa: E402

VICTIMS = ("worker 0", "worker 1", "all", "all, while saving")
ADAPTER, CHECKPOINTS, WEIGHTS = "parabolic_lotra", "parabolic_checkpoints", "adapter_model.safetensors"
TIMEOUT = 600  # seconds within which something must happen


@dataclass
class Outcome:
    """`checkpoint` is the step of the last checkpoint at the kill. `offered` counts adapters that are not complete."""

    victim: str
    seconds: float
    checkpoint: int
    recovered: bool
    offered: int
    accepted: int

    def line(self) -> str:
        moment = f"killed after {self.seconds:5.1f} s, last checkpoint {self.checkpoint:3}"
        end = "recovered" if self.recovered else "NOT recovered"
        return f"{self.victim:17} {moment}: {end}; broken adapters accepted: {self.accepted} of {self.offered}"


def start(folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command += [EXAMPLES / "accelerate_pde.py", "--cpu", "--pde=parabolic", "--base-steps=3", f"--steps={args.steps}"]
    command += [f"--checkpoint-every={args.checkpoint_every}", "--output-dir", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> bool:
    """Whether the condition became true before the process ended."""
    end = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if condition():
            return True
        if time.monotonic() > end:
            raise SystemExit(f"nothing has happened for {TIMEOUT} s")
        time.sleep(5e-3)
    return False


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / CHECKPOINTS).glob("step_*"))


def kill(process: subprocess.Popen, victim: str) -> bool:
    """Send SIGKILL to the victim, and return whether it was still running."""
    try:
        workers = psutil.Process(process.pid).children(recursive=True)
        if victim.startswith("worker"):
            workers = [worker for worker in workers if worker.environ().get("RANK") == victim[-1]]
        else:
            process.kill()
        for worker in workers:
            worker.kill()
    except psutil.NoSuchProcess:
        return False
    return bool(workers)


def loads(adapter: Path, base: Path) -> bool:
    kan = build_kan("chebyshev", 0)
    kan.load_state_dict(torch.load(base, weights_only=True))
    try:
        PeftModel.from_pretrained(kan, adapter)
    except Exception:  # any refusal will do
        return False
    return True


def offer(folder: Path, base: Path, expected: bytes) -> tuple[int, int]:
    """How many adapters other than the expected one there are, and how many of them can be loaded."""
    found = {path.parent for name in (WEIGHTS, "adapter_config.json") for path in folder.rglob(name)}
    broken = [path for path in found if not (path / WEIGHTS).exists() or (path / WEIGHTS).read_bytes() != expected]
    return len(broken), sum(loads(path, base) for path in broken)


def one_run(folder: Path, base: Path, expected: bytes, victim: str, pause: float, args: argparse.Namespace) -> Outcome:
    """Repeat until a kill has hit its victim, up to `pause` seconds after a checkpoint. Both are drawn at random."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(base, folder)
        process, begin = start(folder, args), time.monotonic()
        step = random.randrange(args.checkpoint_every, args.steps)
        if wait_for(lambda step=step: steps_saved(folder)[-1:] >= [step], process):
            if victim == "all, while saving":
                wait_for(lambda: (folder / ".partial").exists(), process)
            else:
                time.sleep(random.uniform(0, pause))
            seconds, checkpoint = time.monotonic() - begin, max(steps_saved(folder), default=0)
            if kill(process, victim):
                break
        process.wait()
    if victim.startswith("all"):
        process.wait()
        offered, accepted = offer(folder, base, expected)
        process = start(folder, args)
    else:
        offered, accepted = 0, 0
    code = process.wait(TIMEOUT)
    weights = folder / ADAPTER / WEIGHTS
    recovered = code == 0 and weights.exists() and weights.read_bytes() == expected
    if recovered:
        shutil.copytree(folder / ADAPTER, folder / "cut")
        (folder / "cut" / WEIGHTS).write_bytes(expected[: random.randrange(len(expected))])
        more = offer(folder, base, expected)
        offered, accepted = offered + more[0], accepted + more[1]
    return Outcome(victim, seconds, checkpoint, recovered, offered, accepted)


def run(args: argparse.Namespace) -> None:
    random.seed(args.seed)
    folder = args.output_dir / "uninterrupted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    process = start(folder, args)
    begin = wait_for(lambda: steps_saved(folder), process) and time.monotonic()
    wait_for(lambda: steps_saved(folder) == [args.steps], process)
    pause = (time.monotonic() - begin) * args.checkpoint_every / args.steps
    if process.wait(TIMEOUT):
        raise SystemExit(f"the uninterrupted run has failed: {folder / 'log.txt'}")
    (base,) = folder.glob("base_*.pt")
    expected = (folder / ADAPTER / WEIGHTS).read_bytes()
    outcomes = []
    for number in tqdm(range(args.runs), desc="kill", unit="run"):
        victim = args.victims[number % len(args.victims)]
        outcomes.append(one_run(args.output_dir / f"run_{number}", base, expected, victim, pause, args))
        tqdm.write(f"{number + 1:3}  {outcomes[-1].line()}")
    recovered, offered, accepted = (
        sum(getattr(o, key) for o in outcomes) for key in ("recovered", "offered", "accepted")
    )
    print(f"{recovered} of {args.runs} runs recovered; {accepted} of {offered} broken adapters accepted")
    record = json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
    write_atomically(args.output_dir / "kill_recovery.json", lambda p: p.write_text(record))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--runs", type=positive_int, default=20, help="number of kills")
    add("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS), help="whom, in turn")
    add("--steps", type=positive_int, default=24, help="of a run")
    add("--checkpoint-every", type=positive_int, default=2, help="steps")
    add("--seed", type=int, default=0, help="of the moments")
    add("--output-dir", type=Path, default=Path("outputs/kill_recovery"), help="where everything is written")
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "No result is left.")


if __name__ == "__main__":
    sys.exit(main())
