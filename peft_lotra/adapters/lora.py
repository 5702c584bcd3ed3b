"""Converts adapters to plain LoRA checkpoints, which load without this package, and LoRA checkpoints to adapters."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from ..analysis.updates import plain_targets
from ..coefficients.layout import Layout
from ..coefficients.registry import Descriptions
from ..coefficients.spec import owner_of
from ..combination import check_finite, update_of
from ..config.lotra_config import LoTRAConfig
from ..files.adapter_file import PREFIX, is_adapter_key
from ..layers.lotra import LoTRALayer, adapted_tensors
from ..model import LoTRAModel, lotra_model
from ..tucker.decomposition import Tucker
from .extraction import fill

_INSTEAD = "use `merge_and_unload()` and save the dense model, or LoTRA's own checkpoint"


def convert_to_lora(
    model: nn.Module, rank: int | float | None = None, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """lora_B · lora_A = Δ for coefficients that are the weight of an nn.Linear, in a layout such as "o (i d)".

    The update is the matrix Δ = s · U2 · G_(o) · (U1 ⊗ U3)ᵀ, shape (m, n·n_d), of rank r2 at most. With
    lora_B = U2, shape (m, r2), and lora_A = s · G_(o) · (U1 ⊗ U3)ᵀ, shape (r2, n·n_d), LoRA's own scaling is 1.
    LoRA has (m + n·n_d) · r2 numbers, and LoTRA has r1·r2·r3 + n·r1 + m·r2 + n_d·r3.

    The checkpoint names the nn.Linear inside the KAN layer (`layers.0.spline_linear`), and PEFT's LoRA wraps it. A
    layer that calls the nn.Linear sees LoRA's update. A layer that reads the weight without a call does not.

    Args:
        model: a PeftModel with LoTRA adapters, or what `torch.compile` makes of it. It is not changed.
        rank: None: exact, with rank r2 in each layer. An int: the best approximation of at most this rank, by SVD. A
            float in (0, 1]: the best approximation of the least rank in each layer that keeps this fraction of ‖Δ‖².
        adapter_name: the adapter to convert, with its `modules_to_save` and `trainable_token_indices`.

    Returns:
        The config, and the state dict as PEFT saves it.

    Raises:
        TypeError, ValueError: if an argument does not fit, or, naming the layer, if LoRA cannot adapt a layer.
    """
    tuner = lotra_model(model, adapter_name)
    if rank is not None and not (type(rank) in (int, float) and 0 < rank and (type(rank) is int or rank <= 1)):
        raise ValueError(f"`rank` should be a positive integer or a float in (0, 1] but the value passed is {rank!r}")
    if (bias := tuner.peft_config[adapter_name].bias) != "none":
        raise ValueError(f"{adapter_name!r} has `bias`={bias!r}: LoRA saves biases under other names; {_INSTEAD}")
    layers = adapted_tensors(tuner.model, adapter_name)
    for parameter, layer in layers.items():
        if obstacle := _obstacle(layer, adapter_name):
            raise ValueError(f"{parameter} cannot be converted to LoRA: {obstacle}")
    model = getattr(model, "_orig_mod", model)
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state_dict = {key: value.detach().clone() for key, value in state_dict.items() if not is_adapter_key(key)}
    ranks = {}
    for parameter, layer in layers.items():
        linear = parameter.removesuffix(".weight")
        A, B = _matrices(update_of(layer, adapter_name, parameter), layer.spec.layout, rank)
        ranks[linear], dtype = len(A), layer.lotra_core[adapter_name].dtype
        for side, matrix in {"A": A.to(dtype), "B": B.to(dtype)}.items():
            check_finite([matrix], adapter_name, parameter)  # 16 bits may be too few
            state_dict[f"{PREFIX}{linear}.lora_{side}.weight"] = matrix.contiguous()
    return _config(tuner, adapter_name, ranks), state_dict


def save_as_lora(
    path: str | os.PathLike, model: nn.Module, rank: int | float | None = None, adapter_name: str = "default"
) -> None:
    """Save the result of `convert_to_lora`. `PeftModel.from_pretrained` loads it without this package."""
    config, state_dict = convert_to_lora(model, rank, adapter_name)
    os.makedirs(path, exist_ok=True)
    save_file(state_dict, os.path.join(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(str(path))


def _obstacle(layer: LoTRALayer, adapter_name: str) -> str | None:
    spec = layer.spec
    if adapter_name in layer.merged_adapters:
        return "it is merged into the base; call `unmerge_adapter()` first"
    if layer.terms[adapter_name]:
        return "it is for a family of tasks; convert an adapter for one, from `adapter_at`"
    owner, name = owner_of(layer.get_base_layer(), spec.parameter)
    if not (isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward and name == "weight"):
        return f"it is no weight of an nn.Linear, which LoRA would wrap, but of a {type(owner).__name__}; {_INSTEAD}"
    if spec.scale is not None or spec.slice is not None:
        return f"its `scale` {spec.scale!r} or `slice` {spec.slice!r} is no part of an nn.Linear; {_INSTEAD}"
    if spec.axes[0] != ("o",) or {axis[0] for axis in spec.axes[1]} != {"i", "d"}:
        return f"its layout {spec.layout.pattern!r} has other rows than the outputs o; {_INSTEAD}"
    return None


def _matrices(update: Tucker, layout: Layout, rank: int | float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A, shape (k, n·n_d), and lora_B, shape (m, k)."""
    r2 = update.core.shape[1]
    B = update.factors.get("o", torch.eye(r2, dtype=update.core.dtype))
    thin = Tucker(update.core[..., 0], {mode: U for mode, U in update.factors.items() if mode != "o"})
    A = replace(layout, sizes={**layout.sizes, "o": r2}).from_canonical(thin.dense())
    if rank is None:
        return A, B
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, values, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    if isinstance(rank, float):  # the least k with Σ_{j ≤ k} σ_j² ≥ rank · Σ_j σ_j²
        kept = values.square().cumsum(0)
        rank = int(torch.searchsorted(kept, rank * kept[-1])) + 1
    k = min(rank, len(values))
    return V[:k] @ Q_A.T, Q_B @ (U[:, :k] * values[:k])


def _config(tuner: LoTRAModel, adapter_name: str, ranks: dict[str, int]) -> LoraConfig:
    own, largest = tuner.peft_config[adapter_name], max(ranks.values())
    # PEFT reads the keys as regular expressions on endings of names, so they are anchored and escaped.
    pattern = {f"^{re.escape(name)}": k for name, k in ranks.items() if k != largest}
    names = {name.replace(".base_layer", "") for name, _ in tuner.model.named_modules()}
    same_ending = {name for name in names if name.endswith(tuple([f".{linear}" for linear in ranks]))}
    kept = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "trainable_token_indices")
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(ranks),
        exclude_modules=sorted(same_ending - ranks.keys()) or None,
        **{name: getattr(own, name) for name in kept},
    )


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
    linears = [key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in weights]
    pairs = {linear: [f"{PREFIX}{linear}.lora_{side}.weight" for side in "AB"] for linear in linears}
    if wrong := sorted(weights.keys() ^ {key for pair in pairs.values() for key in pair}):
        raise ValueError(
            f"{path} should have pairs of LoRA's matrices alone, but has or lacks {wrong}: merge that adapter into "
            "the base (`merge_and_unload`), or remove these tensors"
        )
    targets = plain_targets("base", base, LoTRAConfig(r=1, coefficients=coefficients or {}))
    known = {target.parameter.removesuffix(".weight"): target for target in targets}
    if unknown := sorted(pairs.keys() - known.keys()):
        raise ValueError(
            f"{path} cannot be a LoTRA adapter: {unknown} are not coefficients of `base`, which has {list(known)}; "
            "merge it into the base (`merge_and_unload`)"
        )
    factors, chosen, alphas = {}, [], config.alpha_pattern or {}
    for linear, keys in pairs.items():
        A, B = (weights[key] for key in keys)
        target, r = known[linear], len(A)
        alpha = alphas.get(get_pattern_key(list(alphas), linear), config.lora_alpha)
        layout = replace(target.spec.layout, sizes={**target.spec.layout.sizes, "o": r})
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        update = Tucker(layout.to_canonical(A), {"o": B * scaling})
        if r >= len(B):  # a rank that fills the outputs
            update = update.absorb("o")
        factors[target.parameter] = update
        chosen.append(replace(target, ranks=(None, r if update.factors else None, None)))
    # A self-contained config adapts these tensors and no others.
    model = get_peft_model(base, LoTRAConfig(r=1).self_contained(chosen))
    fill(model, model.active_adapter, factors)
    return model
