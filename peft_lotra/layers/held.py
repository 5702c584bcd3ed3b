"""The adapters that a LoTRALayer holds, by name: their tensors, scales and flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..tucker.decomposition import CODES, CONTAINERS, CORE, NAMES, Tucker


class Held(BaseTunerLayer):
    """Access of a LoTRALayer to its adapters. What concerns one of them does not visit the others."""

    adapter_layer_names = (*CONTAINERS, CODES)
    other_param_names = ("r", "alpha", "scaling", "terms", "_drawn")
    _modules: Any
    lotra_core: Any
    lotra_codes: Any
    alpha: dict[str, float]
    scaling: dict[str, float]

    def containers(self) -> list[Any]:
        """The ParameterDicts that hold the tensors of all adapters."""
        return [self._modules[name] for name in self.adapter_layer_names]

    def tucker(self, adapter_name: str) -> Tucker:
        """G and the factors of the adapter."""
        held = self._modules  # attribute access would look on the base layer, too
        factors = {}  # a comprehension would be one more call in every pass
        for mode, name in NAMES.items():
            if adapter_name in (own := held[name]._parameters):
                factors[mode] = own[adapter_name]  # by indexing, because `get` does not tell ZeRO-3
        return Tucker(held[CORE]._parameters[adapter_name], factors)

    def parameters_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The core, the factors and the codes of the adapter that this layer has, by the names of their containers."""
        codes = {CODES: self.lotra_codes[adapter_name]} if adapter_name in self.lotra_codes else {}
        return self.tucker(adapter_name).named() | codes

    @torch.no_grad()
    def set_tucker(self, adapter_name: str, factors: Tucker) -> None:
        """Write values of G and of the factors. Their shapes must be those of the adapter's ranks."""
        values = factors.named()
        for name, own in self.tucker(adapter_name).named().items():
            own.copy_(values[name].reshape(own.shape))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. They alone are trainable, or none if `inference_mode`.

        As PEFT's, which makes several calls for every adapter that the layer holds.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        trained = frozenset(() if inference_mode else names)
        for container in self.containers():
            for name, tensor in container._parameters.items():
                if tensor.requires_grad != (name in trained) and tensor.is_leaf:
                    tensor.requires_grad_(name in trained)
        self._freeze_non_trainable_peft_weights(names)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them. As PEFT's, without a loop over the other adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for container in self.containers():
            for name in names:
                tensor = container._parameters.get(name)
                if tensor is not None and tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
        if requires_grad:
            self._freeze_non_trainable_peft_weights(names)

    def set_scale(self, adapter: str, scale: float) -> None:
        """s ← scale · alpha, if this layer has the adapter."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter]

    def scale_layer(self, scale: float) -> None:
        """s ← scale · s for the active adapters."""
        for name in self._active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """s ← s / scale for the active adapters, or s ← alpha without `scale`."""
        for name in self._active_here():
            self.scaling[name] = self.alpha[name] if scale is None else self.scaling[name] / scale

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lotra_core]
