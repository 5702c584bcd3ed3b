"""Loads LoRA checkpoints as LoTRA adapters."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn

from ..analysis.updates import plain_targets
from ..checkpoint import PREFIX
from ..coefficients.registry import Descriptions
from ..coefficients.spec import Layout
from ..config import LoTRAConfig, Target
from ..layer import adapted_tensors
from ..tensors.tucker import Tucker


def adapter_from_lora(
    base: nn.Module, path: str | os.PathLike, *, coefficients: Descriptions | None = None
) -> PeftModel:
    """G = lora_A with one axis for each mode, U2 = scaling · lora_B, modes i and d whole: the same update, exactly.

    If the coefficients are the weight of an nn.Linear, in a layout such as "o (i d)", a LoRA on them is a LoTRA
    adapter of the ranks (None, r, None). It can then be combined, swapped and served together with others, and trained
    further. `save_as_lora` converts in the other direction.

    Args:
        base: the KAN that the LoRA is for. It is wrapped as by `get_peft_model`.
        path: the directory of the LoRA adapter. It must adapt modules whose weights are coefficients of `base`.
        coefficients: layouts of layers that are not registered, as in `LoTRAConfig(coefficients=...)`.

    Raises:
        ValueError: if the adapter is not a LoRA, has other parts than pairs of matrices (DoRA, biases, embeddings), or
            adapts other modules. `base` is then as it was before.

    Source: ours.
    """
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`path` {str(path)!r} has a {config.peft_type} adapter: only LoRA can be converted")
    weights = load_peft_weights(str(path), device="cpu")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        linear, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{path} has {key}, which is not one of LoRA's pairs of matrices: merge that adapter into the base "
                "(`merge_and_unload`), or remove this tensor"
            )
        pairs.setdefault(linear, {})[side[0]] = value
    known = {t.parameter: t for t in plain_targets("base", base, LoTRAConfig(r=1, coefficients=coefficients or {}))}
    unknown = sorted(linear for linear in pairs if f"{linear}.weight" not in known)
    if unknown:
        raise ValueError(
            f"{path} cannot be a LoTRA adapter: {unknown} are not coefficients of `base`, which has {list(known)}; "
            "merge it into the base (`merge_and_unload`)"
        )
    factors = {}
    for linear, pair in pairs.items():
        target = known[f"{linear}.weight"]
        factors[target.parameter] = _factors(target, pair["A"], pair["B"] * _scaling(config, linear, len(pair["A"])))
    ranks = {parameter: (None, one.core.shape[1] if one.factors else None, None) for parameter, one in factors.items()}
    # A self-contained config adapts these tensors and no others.
    chosen = [replace(known[parameter], ranks=ranks[parameter]) for parameter in factors]
    model = get_peft_model(base, LoTRAConfig(r=1).self_contained(chosen))
    for parameter, layer in adapted_tensors(model).items():
        layer.set_tucker(model.active_adapter, factors[parameter])
    return model


def _factors(target: Target, A: torch.Tensor, B: torch.Tensor) -> Tucker:
    layout = target.spec.layout
    rows = Layout(layout.pattern, {**layout.sizes, "o": len(A)})  # r rows in place of the m outputs
    core = rows.to_canonical(A)
    if B.shape[1] >= len(B):  # a rank that fills the outputs
        return Tucker(torch.einsum("ird,or->iod", core, B))
    return Tucker(core, {"o": B})


def _scaling(config: LoraConfig, linear: str, r: int) -> float:
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), linear), config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r
