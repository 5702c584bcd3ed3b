"""The updates of a layer in a pass whose samples have different adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..calls.context import Shares
from ..standin import Update
from ..tucker.decomposition import CORE, NAMES, Tucker


def updates_by_sample(layer: Any, names: Collection[str], shares: Shares) -> tuple[Update, ...]:
    """The updates of these adapters for their samples; those of the same ranks are one stack, after S-LoRA's batches.

    Families at tasks that differ from sample to sample are updates of their own.
    """
    found: list[Update] = []
    alike: dict[Any, list[str]] = {}
    cores = layer._modules[CORE]._parameters
    for name in names:
        rows = None if shares.rows is None else shares.rows[name]
        if rows is None or layer.terms[name]:
            update = layer._update(name)
            found.append(update.for_samples(rows, shares.samples) if shares.samples else update)
        else:
            core = cores[name]
            alike.setdefault((layer.r[name], core.shape, core.dtype, core.device), []).append(name)
    return *found, *[_stack(layer, members, shares) for members in alike.values()]


def _stack(layer: Any, names: Sequence[str], shares: Shares) -> Update:
    """The updates of adapters of the same ranks, each for its own samples, as one."""
    if names[0] in layer._modules[NAMES["k"]]._parameters:
        tuckers = [layer._update(name).tucker for name in names]
        core = torch.stack([tucker.core for tucker in tuckers])
        factors = {m: torch.stack([tucker.factors[m] for tucker in tuckers]) for m in tuckers[0].factors}
    else:
        held = {mode: layer._modules[name]._parameters for mode, name in {"": CORE, **NAMES}.items()}
        stacks = {m: torch.stack([own[name] for name in names]) for m, own in held.items() if names[0] in own}
        core, factors = stacks.pop(""), stacks
    scalings = [layer.scaling[name] for name in names]
    if len({*scalings}) > 1:
        core = core * core.new_tensor(scalings).reshape(-1, *[1] * (core.dim() - 1))
    assert shares.rows is not None
    rows: Any = tuple([shares.rows[name] for name in names])
    return Update(Tucker(core, factors), scalings[0] if len({*scalings}) == 1 else 1.0, None, shares.samples, rows)
