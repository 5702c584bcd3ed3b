"""Starts programs in several processes on the CPU, by the launchers that users have.

    done = launch(script, "--steps", 5, launcher="accelerate")   # waits; fails with the log unless it ends with 0
    with running(script, options=("--max-restarts", "3")) as job:
        job.worker(1).kill()
        assert job.wait() == 0
    results = fork(function, argument)                           # many times cheaper: no new interpreters, no imports

If its arguments do not fit, a launcher silently starts one process, or several that do not know each other. Every
program should therefore compare `Accelerator().num_processes` with the number that it was started for.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import patch_environment
from filelock import FileLock
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
_MARKER = "PEFT_LOTRA_TEST_JOB"
LIMIT = 600  # seconds: ends what hangs; no test relies on the time that something takes

HAS_FSDP2 = torch.__version__ >= (2, 13)  # on the CPU; older versions may not have it, 2.6 does not
has_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="older versions may have no FSDP2 on the CPU; 2.6 has none")
_LOCK = Path(tempfile.gettempdir()) / f"peft_lotra_{os.getuid()}.lock"


@dataclass
class Launched:
    """The end of a job. `stdout` has what all of its processes wrote, also to standard error."""

    returncode: int
    stdout: str


@dataclass
class Job:
    """A running launcher and the processes that it has started."""

    process: subprocess.Popen
    marker: str
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All living processes of the job, found by their environment, because workers have other sessions."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARKER) == self.marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def worker(self, rank: int) -> psutil.Process | None:
        """The living worker of this rank."""
        for process in self.processes():
            try:
                if process.environ().get("RANK") == str(rank):
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    def wait(self) -> int:
        """The exit code. Fails with the log after `LIMIT` seconds."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {LIMIT} s:\n{self.output()}") from None

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until `condition()` holds; fails with the log if the job ends before, or after `LIMIT` seconds."""
        end = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"ended with {self.process.poll()} before the condition held:\n{self.output()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL to every process at once, and again until none is left."""
        while alive := self.processes():
            for process in alive:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(alive, timeout=5)


def command(launcher: str, num_processes: int, options: Sequence[str] = ()) -> list[str]:
    """The part of the command line before the script.

    Args:
        launcher: "torchrun", "accelerate", or "python" for one process without a launcher.
        options: further arguments of the launcher. With accelerate's `--config_file`, the arguments that such a file
            decides are left out.
    """
    start = [sys.executable, "-m"]
    if launcher == "torchrun":
        # --standalone takes a free port. Without an address, it asks for the machine's name.
        start += [
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={num_processes}",
        ]
    elif launcher == "accelerate":
        start += ["accelerate.commands.launch", "--num_processes", str(num_processes), "--main_process_port", "0"]
        if "--config_file" not in options:
            start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            start += ["--multi_gpu"] if num_processes > 1 and "--cpu" not in options else []
    elif launcher == "python" and num_processes == 1 and not options:
        start.pop()
    else:
        raise ValueError(f"`launcher`={launcher!r} with {num_processes} processes and options {options}")
    return [*start, *map(str, options)]


@contextmanager
def running(
    program: str | Path,
    *args: object,
    num_processes: int = 2,
    launcher: str = "torchrun",
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """A job, of which no process or file is left afterwards. One job runs at a time, in all of pytest's processes.

    Args:
        program: a script's path, or Python code. It may import from tests/ and examples/.
        args: the script's arguments.
        env: further environment variables.
    """
    marker = uuid.uuid4().hex
    with FileLock(_LOCK), _folder() as folder:
        if not isinstance(program, Path):
            source, program = textwrap.dedent(program), folder / "program.py"
            program.write_text(source)
        log = folder / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command(launcher, num_processes, options), str(program), *map(str, args)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment(), **(env or {}), _MARKER: marker},
                start_new_session=True,
            )
        job = Job(process, marker, log)
        try:
            yield job
        finally:
            job.kill()
            process.wait()


def launch(
    program: str | Path,
    *args: object,
    num_processes: int = 2,
    launcher: str = "torchrun",
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> Launched:
    """Run a job to its end; see `running`.

    Args:
        check: whether to fail, with the log, if the exit code is not 0.
    """
    arguments = {"num_processes": num_processes, "launcher": launcher, "options": options, "env": env}
    with running(program, *args, **arguments) as job:
        code = job.wait()
        done = Launched(code, job.output())
    assert not check or code == 0, f"exit code {code}:\n{done.stdout}"
    return done


def environment() -> dict[str, str]:
    """This process's environment without variables of a launcher or an `Accelerator`, and with the project's paths."""
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
    named = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers) and key not in named}
    paths = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
    return {
        **env,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        # A restarted group would meet the addresses of the first group in the store that it shares with the launcher.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Fails if it is not left within `LIMIT` seconds. In the main thread only."""

    def expire(*_: object) -> None:
        raise AssertionError(f"{what} not done after {LIMIT} s")

    handler = signal.signal(signal.SIGALRM, expire)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def fork(function: Callable[..., object], *args: object, num_processes: int = 2, **kwargs: object) -> list:
    """Run `function(*args, **kwargs)` in forks of this process that form a group, and return their results by rank."""
    with limited(function.__name__), _folder() as folder, _forks():
        debug_launcher(_forked, (partial(function, *args, **kwargs), num_processes, folder), num_processes)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def fork_by_torchrun(function: Callable[[], object], num_processes: int = 2, max_restarts: int = 0) -> list:
    """The same by the agent of torchrun, itself in a fork. It starts all processes again when one has died."""

    def agent() -> None:
        results = elastic_launch(config, _fresh)(function)
        torch.save([results[rank] for rank in range(num_processes)], folder / "results.pt")

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        start_method="fork",
    )
    # A restarted group would meet the addresses of the first group in the store that it shares with the agent.
    with _folder() as folder, _forks(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        process = multiprocessing.get_context("fork").Process(target=agent)
        process.start()
        process.join(LIMIT)
        assert process.exitcode == 0, f"exit code {process.exitcode}"
        return torch.load(folder / "results.pt", weights_only=False)


@contextmanager
def _forks(**environment: str) -> Iterator[None]:
    """What forks need; kills those that are left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        with patch_environment(**environment), warnings.catch_warnings():
            # Python 3.12 and later warn of forks beside threads, which pytest-xdist has.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            yield
    finally:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in before:
                child.kill()


def _forked(function: Callable[[], object], num_processes: int, folder: Path) -> None:
    rank = torch.distributed.get_rank()
    os.environ["LOCAL_RANK"] = str(rank)  # else every process is its machine's main process
    result = _fresh(function)
    if PartialState._shared_state:
        assert PartialState().num_processes == num_processes
    torch.save(result, folder / f"{rank}.pt")


def _fresh(function: Callable[[], object]) -> object:
    """What it returns, without what the parent has."""
    gc.freeze()  # a collection would copy every page that the parent has objects in
    torch.set_num_threads(1)  # the threads of OpenMP are not in a fork, which would wait for them
    tqdm.set_lock(threading.RLock())  # else one lock is that of all, and one that is killed may keep it for good
    AcceleratorState._reset_state(reset_partial_state=True)  # left by an `Accelerator` of an earlier test
    GradientState._reset_state()
    return function()


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peft_lotra_") as folder:
        yield Path(folder)
