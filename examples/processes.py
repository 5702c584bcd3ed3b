"""For runs in several processes: a check of their number, and checkpoints that survive when a process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType


def check_processes(accelerator: Accelerator) -> None:
    """Print how many processes work together.

    Raises:
        SystemExit: if this is not the number that the launcher was asked for, as far as that can be known, or they
            should shard and do not.
    """
    processes = accelerator.num_processes
    if processes == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise SystemExit(
            "The launcher was asked for several processes and has started one, as `accelerate launch --cpu` does: use "
            "torchrun or a file from examples/accelerate/, and put --cpu after the script's name."
        )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type != DistributedType.FSDP:
        raise SystemExit(
            f"The launcher was asked for FSDP, and accelerate gives {accelerator.distributed_type.value} here: it "
            "shards on accelerators only, and not with --cpu. Use examples/accelerate/cpu_2_processes.yaml"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if processes != launched:
        raise SystemExit(f"{launched} processes were started, but each would train alone: is --cpu missing?")
    accelerator.print(
        f"Processes: {processes} ({accelerator.distributed_type.value}), device {accelerator.device}, "
        f"mixed precision {accelerator.mixed_precision}"
    )


@contextmanager
def complete_directory(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """A directory for all processes to fill. It then takes the name `path`, and replaces what was there.

    It is complete or absent, whenever a process is killed.
    """
    partial = path.with_name(".partial")
    if accelerator.is_main_process:
        for rest in (partial, path.with_name(".old")):  # left by a killed run
            shutil.rmtree(rest, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield partial
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _remove(path)
        partial.rename(path)


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: dict) -> None:
    """Save everything that is prepared (models with their bases) and `progress`, a dict for JSON that has "step".

    Earlier checkpoints are removed when this one is complete. (accelerate's own limit would remove them before.)
    """
    with complete_directory(accelerator, folder / f"step_{progress['step']:07d}") as partial:
        accelerator.save_state(partial)
        if accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(progress))
    if accelerator.is_main_process:
        for earlier in _checkpoints(folder)[:-1]:
            _remove(earlier)


def load_checkpoint(accelerator: Accelerator, folder: Path, settings: dict) -> dict | None:
    """Load the last checkpoint into what is prepared. Return its progress, or None if there is no checkpoint.

    Raises:
        SystemExit: if it was made with other settings. Nothing is loaded then.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    progress = json.loads((checkpoints[-1] / "progress.json").read_text())
    for name, value in settings.items():
        if progress["settings"][name] != value:
            raise SystemExit(
                f"{checkpoints[-1]} was made with {name}={progress['settings'][name]}, not {value}: choose another "
                f"--output-dir, or remove {folder}."
            )
    accelerator.load_state(checkpoints[-1])
    accelerator.step = 0  # backward passes since the last whole step; their number per step may have changed
    accelerator.print(f"Goes on after step {progress['step']}, from {checkpoints[-1]}")
    return progress


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def _remove(path: Path) -> None:
    """Remove a directory. The rename first makes it absent at once, not file by file."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(".old")))
