"""Checks of adapters that are saved or loaded, made before a model is changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

from ..tucker.decomposition import CODES, CONTAINERS

PREFIX = "base_model.model."  # every name in a file that PEFT writes begins with it
CONFIG_KEY = "lotra_config"  # the entry in the header of an adapter file that is the text of its config


class Slot(NamedTuple):
    """The shape and dtype of the place for a tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64


class SavedAdapter(NamedTuple):
    """The contents of an adapter file."""

    origin: str  # the file, as errors name it
    weights: Mapping[str, torch.Tensor]
    config: str | None  # the text of the config that was saved with them, if the file has it


@contextmanager
def naming(path: str | None) -> Iterator[None]:
    """If a path is given, errors inside become a ValueError or TypeError that names it, except for a full memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT, json, the file system and Python itself raise other types
        kind = TypeError if isinstance(error, TypeError) else ValueError
        if path is None or (path in str(error) and isinstance(error, kind)):
            raise
        raise kind(f"{path}: {error if isinstance(error, kind) else repr(error)}") from error


def is_adapter_key(key: str) -> bool:
    """Whether a state dict's key names a core, a factor or codes, and not another trained tensor."""
    return is_tucker_key(key) or f".{CODES}" in f".{key}"


def is_tucker_key(key: str) -> bool:
    """Whether a state dict's key names a core or factor."""
    return any(f".{name}" in f".{key}" for name in CONTAINERS)


def check_weights(expected: Mapping[str, Slot], weights: Mapping[str, torch.Tensor], origin: str) -> None:
    """Raise ValueError unless `weights` has exactly the `expected` names and shapes, and valid values.

    Factors are real and finite in the dtype of their use. Other tensors may hold infinity, but no NaN.
    """
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{origin} does not belong to this adapter: it lacks {missing or 'nothing'}, and has "
            f"{unexpected or 'nothing'} in addition. Was it made for another base model, or other `target_modules`? "
            "Tensors of the base model are loaded only if `modules_to_save` or `bias` selects them"
        )
    for key, slot in expected.items():
        check_tensor(key, weights[key], slot, origin)


def check_tensor(key: str, given: torch.Tensor, slot: Slot, origin: str) -> None:
    """`check_weights` for one tensor."""
    if tuple(given.shape) != tuple(slot.shape):
        raise ValueError(
            f"{origin} has {key} of shape {tuple(given.shape)}, expected {tuple(slot.shape)}: "
            "an adapter of other ranks (`rank_pattern`), or for another base model"
        )
    is_factor = is_adapter_key(key)
    if is_factor and not given.is_floating_point():
        raise ValueError(f"{origin} has {key} of dtype {given.dtype}: factors are real floating-point tensors")
    if given.is_meta or not (given.is_floating_point() and slot.dtype.is_floating_point):
        return
    if given.isnan().any() or (is_factor and given.isinf().any()):
        raise ValueError(f"{origin} has NaN or infinity in {key}: the adapter is broken; use an earlier save")
    if given.dtype != slot.dtype and not torch.equal(given.isinf(), given.to(slot.dtype).isinf()):
        raise ValueError(
            f"{origin} has values up to {given.abs().max().item():.3g} in {key}, too large for the {slot.dtype} in "
            "which they are used: load the base model in a wider dtype, such as torch.float32"
        )


def digest(weights: Mapping[str, torch.Tensor], meaning: Mapping[str, Any]) -> str:
    """The sha256 of `meaning`, which is plain data, and of every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for key, tensor in sorted((key.replace(PREFIX, ""), tensor) for key, tensor in weights.items()):
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata in a safetensors file's header, which is JSON after its length in 8 bytes."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})


def set_metadata(path: Path, key: str, text: str) -> None:
    """Add an entry to the header of a safetensors file."""
    content = path.read_bytes()
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(content), {**_metadata(content), key: text}))


def read_adapter(directory: str) -> SavedAdapter | None:
    """The adapter file in a local directory, or None. ValueError if it holds anything but dense tensors by name."""
    file = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    is_pickle = not os.path.isfile(file)
    if is_pickle and not os.path.isfile(file := os.path.join(directory, WEIGHTS_NAME)):
        return None
    config = None
    try:
        if is_pickle:
            weights: Any = load_peft_weights(directory, device="cpu")
        else:
            content = Path(file).read_bytes()  # once, so that header and tensors are of one save
            weights = safetensors.torch.load(content)
            config = _metadata(content).get(CONFIG_KEY)
    except Exception as error:  # safetensors, pickle and zip raise types of their own
        raise ValueError(
            f"the adapter file {file} cannot be read ({error}): it is corrupt or truncated; copy or save it again"
        ) from error
    things = weights.items() if isinstance(weights, Mapping) else [("it", weights)]
    for key, thing in things:
        if not (isinstance(key, str) and isinstance(thing, torch.Tensor) and thing.layout is torch.strided):
            raise ValueError(
                f"the adapter file {file} should hold dense tensors by name, but {key!r} is a {type(thing).__name__}: "
                "save the adapter again by `save_pretrained`"
            )
    return SavedAdapter(f"the adapter file {file}", weights, config)
