"""Slim KANs: coefficient tensors that consist of Tucker factors alone, trained from scratch or compressed."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ..analysis.updates import coefficients_of, plain_targets
from ..config.lotra_config import LoTRAConfig
from ..tucker.decomposition import decompose
from ..tucker.ranks import mode_sizes
from .extraction import fill


def slim_kan(model: nn.Module, *, init: str = "random", **config: Any) -> PeftModel:
    """A[i, o, d] = G ×₁ U1 ×₂ U2 ×₃ U3 for every KAN layer: the coefficients of a KAN as Tucker factors alone.

    This is `get_peft_model(model, LoTRAConfig(slim=True, ...))` with a choice of the initialisation. `save_pretrained`
    writes only factors, `PeftModel.from_pretrained(kan, ...)` makes a KAN slim again, and `merge_and_unload` returns
    the dense KAN. As with any adapter, all other parameters (residual weights, biases) stay frozen as they are in
    `model`, and they are not saved. Load onto a model with the same other parameters, or name modules outside the KAN
    layers in `modules_to_save`.

    >>> slim = slim_kan(kan, compression_ratio=0.1)                # train from scratch
    >>> slim = slim_kan(trained, init="hosvd", r=(8, 8, 4))        # compress, then fine-tune

    Args:
        model: a KAN. Its coefficients are lost.
        init: "random": normal factors, such that the mean square of A for each basis function is that in `model`.
            `model` should therefore be freshly initialised; see `SlimLayer.reset_lotra_parameters`. "hosvd": a
            best approximation of A in `model`, by truncated HOSVD improved by HOOI.
        config: fields of LoTRAConfig: `r`, `compression_ratio`, `rank_pattern`, `coefficients`, ...

    Raises:
        ValueError: if an argument does not fit, or coefficients are zero or not finite. `model` is then as it was
            before.
    """
    if init not in ("random", "hosvd"):
        raise ValueError(f"`init` should be 'random' or 'hosvd' but the value passed is {init!r}")
    slim = LoTRAConfig(slim=True, **config)
    targets = plain_targets("model", model, slim)
    factors = {}
    for target in targets:
        coefficients = coefficients_of(model, target).to("cpu", torch.float64)
        if not torch.isfinite(coefficients).all():
            raise ValueError(f"{target.parameter} has NaN or infinity")
        if init == "hosvd":
            factors[target.parameter] = decompose(coefficients.reshape(mode_sizes(coefficients.shape)), target.ranks)
        elif not coefficients.any():
            raise ValueError(
                f"{target.parameter} is zero, so there is no variance to start from: initialise the layer first"
            )
    peft_model = get_peft_model(model, slim)
    fill(peft_model, peft_model.active_adapter, factors)
    return peft_model
