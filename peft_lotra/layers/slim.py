"""SlimLayer: a coefficient tensor that consists of Tucker factors alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..coefficients import CoefficientSpec
from ..standin import adapted_coefficients
from .lotra import LoTRALayer


class SlimLayer(LoTRALayer):
    """A = s · G ×₁ U1 ×₂ U2 ×₃ U3: a LoTRALayer whose base coefficients are zero and take no memory.

    The dense parameter is a single zero, expanded to its shape, until the factors are merged into it.
    """

    def __init__(self, base_layer: nn.Module, spec: CoefficientSpec) -> None:
        super().__init__(base_layer, spec)
        with torch.no_grad():
            coefficients = spec.to_canonical(adapted_coefficients(self.get_base_layer(), spec, ())).detach().double()
        self._variances = coefficients.square().transpose(0, 2).flatten(1).mean(1)  # shape: (n_d,)
        self.register_load_state_dict_post_hook(SlimLayer._empty)
        self._empty()

    def reset_lotra_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """U1 ~ N(0, 1/n), U2 ~ N(0, 1/m), U3[d] ~ N(0, v_d/Σv), G ~ N(0, n·m·Σv / (r1·r2·r3·s²)), if no mode is whole.

        Then E A[i, o, d]² = v_d, the mean square over i and o of the layer's own initialisation. Each basis function
        has its v_d, because layers with polynomials or wavelets start smaller in the higher ones.
        """
        super().reset_lotra_parameters(adapter_name, init_weights=False)
        core, factors = self.tucker(adapter_name)
        if init_weights:
            n_d, total = len(self._variances), self._variances.sum().item()
            shares = self._variances * (n_d / total) if total else self._variances
            # The variance of a sum over products of U1, U2, U3 and U4, whose variances are 1/n, 1/m, v_d/Σv and 1/K.
            sums = math.prod([U.shape[1] / len(U) for U in factors.values()])
            with torch.no_grad():
                core.mul_(math.sqrt(total / n_d / sums) / abs(self.scaling[adapter_name]))
                if "d" not in factors:
                    core.mul_(shares.sqrt().to(core).reshape(-1, *[1] * (core.dim() - 3)))
                else:
                    factors["d"].mul_(shares.sqrt().to(core)[:, None])

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        self._make_dense()
        try:
            super()._merge(safe_merge, adapter_names, keep)
        finally:
            self._empty()
        if self.merged and keep:
            before = self._before_merge[self.spec.parameter]
            self._before_merge[self.spec.parameter] = before.new_zeros(()).expand(before.shape)

    def unmerge(self) -> None:
        """parameter ← 0, without memory; scale ← its value before the first `merge`."""
        super().unmerge()
        self._empty()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer with dense coefficients: the merged updates, or zero."""
        nested = [module for module in self.modules() if isinstance(module, SlimLayer)]
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for layer in nested:
            layer._make_dense()
        return base_layer

    @property
    def _base_is_zero(self) -> bool:  # type: ignore[override]
        return not self.merged

    def _make_dense(self) -> None:
        if not self.merged:
            parameter = self._stored(self.spec.parameter)
            parameter.data = torch.zeros_like(parameter, memory_format=torch.contiguous_format)

    def _empty(self, _: Any = None) -> None:
        """Put one expanded zero in place of the coefficients, unless updates are merged into them."""
        if not self.merged:
            parameter = self._stored(self.spec.parameter)
            parameter.requires_grad_(False)
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)

    # Copies and casts give an expanded tensor memory for all entries. Loading needs this memory to write into.

    def _apply(self, *args: Any, **kwargs: Any) -> SlimLayer:
        super()._apply(*args, **kwargs)
        self._empty()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._empty()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = next(n for n, m in self.named_modules() if m is self.get_base_layer())
        key = f"{prefix}{name}.{self.spec.parameter}"
        coefficients = state_dict.get(key)
        if not (self.merged or coefficients is None or coefficients.is_meta) and coefficients.any():
            error_msgs.append(f"{key} is not zero in the state dict, as in a Slim KAN it is")
        self._make_dense()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
