"""For runs in several processes: a check of their number, and checkpoints that survive when a process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn


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
        missing = "is --cpu missing, or, for DeepSpeed, an accelerator?"
        raise SystemExit(f"{launched} processes were started, but each would train alone: {missing}")
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
    """Save everything that is prepared, of models what is trained, and `progress`, a dict for JSON that has "step".

    Under FSDP, accelerate writes the shards of the whole model.

    Earlier checkpoints are removed when this one is complete. (accelerate's own limit would remove them before.)
    """
    with complete_directory(accelerator, folder / f"step_{progress['step']:07d}") as partial:
        hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
        accelerator.save_state(partial)
        hook.remove()
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
    hook = accelerator.register_load_state_pre_hook(_load_trained)
    accelerator.load_state(checkpoints[-1])
    hook.remove()
    accelerator.step = 0  # backward passes since the last whole step; their number per step may have changed
    accelerator.print(f"Goes on after step {progress['step']}, from {checkpoints[-1]}")
    return progress


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
    """Of the states that are about to be saved, keep what `_load_trained` wants, by names without wrappers."""
    for k, state in enumerate(weights):
        wanted = _trained(models[k])
        weights[k] = {
            short: value for name, value in state.items() if (short := name.removeprefix("module.")) in wanted
        }


def _load_trained(models: list[nn.Module], folder: str) -> None:
    """Load what `_leave_out_frozen` has left. accelerate then finds no models, and asks for no frozen tensors."""
    for k, model in enumerate(models):
        state = load_file(Path(folder) / f"model{f'_{k}' * (k > 0)}.safetensors")
        own = _trained(model)
        if own.keys() != state.keys():
            raise SystemExit(f"{folder} is of another model: {sorted(own.keys() ^ state.keys())[:5]}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
    models.clear()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    held = [item for item in model.named_parameters() if item[1].requires_grad]
    return {name.removeprefix("module."): tensor for name, tensor in held}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def _remove(path: Path) -> None:
    """Remove a directory. The rename first makes it absent at once, not file by file."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(".old")))
