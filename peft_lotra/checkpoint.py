"""Checks of saved adapters, made before anything of a model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

CONTAINERS = ("lotra_core", "lotra_U1", "lotra_U2", "lotra_U3")


def is_adapter_key(key: str) -> bool:
    """Whether a state dict's key is that of a core or factor, not of a trained copy of a module."""
    return any(f".{name}" in f".{key}" for name in CONTAINERS)


def check_weights(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Raise ValueError unless `weights` has exactly the `expected` adapter tensors, of these shapes, all finite."""
    held = set(filter(is_adapter_key, weights))
    missing, unexpected = sorted(set(expected) - held), sorted(held - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{origin} does not belong to this adapter: it lacks {missing or 'nothing'}, and has "
            f"{unexpected or 'nothing'} beyond it. Was it made for another base model, or other `target_modules`?"
        )
    for key, shape in expected.items():
        if tuple(weights[key].shape) != tuple(shape):
            raise ValueError(
                f"{origin} has {key} of shape {tuple(weights[key].shape)}, expected {tuple(shape)}: "
                "an adapter of other ranks, or for another base model"
            )
        if not torch.isfinite(weights[key]).all():
            raise ValueError(f"{origin} has NaN or infinity in {key}: the adapter is broken; use an earlier save")


def check_saved_weights(path: str, subfolder: str | None, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if the adapter file in a local directory is unreadable, not finite, or not what is `expected`.

    Without a local file there is nothing to check.

    Args:
        path, subfolder: as in `PeftConfig.from_pretrained`.
        expected: key and shape of every adapter tensor.
    """
    directory = os.path.join(path, subfolder or "")
    files = [os.path.join(directory, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    file = next(filter(os.path.isfile, files), None)
    if file is None:
        return
    try:
        weights = load_peft_weights(path, device="cpu", subfolder=subfolder)
    except Exception as error:  # safetensors, pickle and zip each raise their own
        raise ValueError(
            f"the adapter file {file} cannot be read ({error}): it is corrupt or truncated; copy or save it again"
        ) from error
    check_weights(expected, weights, f"the adapter file {file}")
