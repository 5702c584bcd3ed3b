"""The base model under adapters."""

from __future__ import annotations

import torch
from torch import nn

from ..files.adapter_file import is_adapter_key
from ..layers.lotra import adapted_tensors
from ..model import lotra_model


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's tensors by the names that they have without adapters, as `base.load_state_dict` takes them.

    It is what has to be saved once where the base is fitted together with its adapters:

    >>> model.requires_grad_(True)
    >>> fit_gauss_newton(model, residual, data)
    >>> model.requires_grad_(False)
    >>> torch.save(base_state_dict(model), "base.pt")
    >>> model.save_pretrained("family")  # notes by which coefficients its base is known

    Args:
        model: a PeftModel with LoTRA adapters.

    Raises:
        TypeError: for another model.
        ValueError: if an adapter is merged, because its update is then in these tensors.
    """
    base = lotra_model(model).model
    if any(layer.merged for layer in adapted_tensors(base).values()):
        raise ValueError("`model` has merged adapters, whose updates are in the base's tensors: unmerge them before")
    own = {key: value for key, value in base.state_dict().items() if not is_adapter_key(key)}
    return {
        ".".join(part for part in key.split(".") if part not in ("base_layer", "original_module")): value
        for key, value in own.items()
        if ".modules_to_save." not in key
    }
