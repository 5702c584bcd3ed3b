"""The arguments of a call that are for the adapters, `adapter_names` and `lotra_task`. PEFT removes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from . import families, mixed_batch
from .config import LoTRAConfig
from .layer import adapted_tensors
from .mixed_batch import MixedBatch
from .registration import TASK


@contextmanager
def entered(
    model: nn.Module, configs: Mapping[str, LoTRAConfig], active: Sequence[str], arguments: Mapping[str, Any]
) -> Iterator[None]:
    """While this is entered, the adapted layers of a model have the arguments of the call.

    Args:
        model: the base model with the adapters in it.
        configs: the configs of all adapters.
        active: the active adapters.
        arguments: the arguments of the call, by name.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    names, task = arguments.get("adapter_names"), arguments.get(TASK)
    # Generation repeats every sample, but not for the encoder of an encoder-decoder model.
    repeats = max(arguments.get("num_beams") or 1, arguments.get("num_return_sequences") or 1)
    batch = None if names is None else _mixed_batch(model, names, repeats)
    with mixed_batch.entered(batch):
        if task is None:
            yield
            return
        used = active if names is None else dict.fromkeys(names)
        kinds = {name: kind for name in used if name in configs and (kind := configs[name].kind) is not None}
        if not kinds:
            raise ValueError(
                f"`{TASK}` {task!r}: none of the adapters {list(used)} is for a family of tasks "
                "(`LoTRAConfig(family=...)`); leave it out, or call `set_adapter` with a family's adapter"
            )
        weights = families.weights_of(kinds, task)
        repeated = {name: c if c.dim() == 1 else c.repeat_interleave(repeats, dim=0) for name, c in weights.items()}
        layers = set(adapted_tensors(model).values())
        with families.entered(repeated, layers), families.entered(weights, _encoder(model, repeats)):
            yield


def _mixed_batch(model: nn.Module, names: Sequence[str], repeats: int) -> MixedBatch:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`adapter_names` should be a list with a name for each sample, but {names!r} is passed")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    adapters = {name for layer in adapted_tensors(model).values() for name in layer.lotra_core}
    unknown = set(names) - adapters - {mixed_batch.BASE}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            mixed_batch.tell(module)
    repeated = tuple(name for name in names for _ in range(repeats))
    return MixedBatch(repeated, tuple(names), _encoder(model, repeats))


def _encoder(model: Any, repeats: int) -> set[nn.Module]:
    """The modules of the encoder, which sees each sample once while other modules see repeated samples."""
    encoder = model.get_encoder() if repeats > 1 and hasattr(model, "get_encoder") else None
    # transformers' models without an encoder return themselves.
    return set() if encoder is None or encoder is model else set(encoder.modules())
