"""LinearLayer: the Tucker adapters of an nn.Linear's weight, in as few calls as LoRA's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..coefficients import CoefficientSpec
from ..standin.update import Update, products_of
from .lotra import LoTRALayer


class LinearLayer(LoTRALayer):
    """y + (x · B) · U2ᵀ with B = s · G ×₁ U1 ×₃ U3, shape (n, r2), where y is the output of an nn.Linear. Ours.

    The stand-in computes the same with more calls, which take time in layers of up to about 1,000 features. It is used
    where another order may be better: ranks near the modes, 16 bits, weights per sample, or a graph that is compiled.
    """

    def _run_once(self, args: Any, kwargs: Any) -> Any:
        updates = () if kwargs or len(args) != 1 or torch.compiler.is_compiling() else self._active_updates()
        if not updates or not all(map(self._is_simple, updates)):
            return super()._run_once(args, kwargs)
        x, y = args[0], self._modules["base_layer"](*args)  # type: ignore[misc]
        n, m, n_d = self.spec.layout.canonical_shape
        for update in updates:
            core, factors = update.tucker
            products = products_of(
                core.shape, (n, m, n_d), "o", "".join([mode for mode in "id" if mode not in factors])
            )
            thin = products(core if update.scaling == 1 else core * update.scaling, factors)
            y = y + F.linear(F.linear(x, thin.reshape(n, -1).T), factors["o"])
        return y

    def _is_simple(self, update: Update) -> bool:
        core, (n, m, _) = update.tucker.core, self.spec.layout.canonical_shape
        return (
            update.weights is None
            and update.rows is None
            and "o" in update.tucker.factors
            and core.dtype in (torch.float32, torch.float64)
            and core.dtype == self._stored("weight").dtype
            and not core.is_meta
            and not torch.is_autocast_enabled(core.device.type)
            and 2 * core.shape[1] * (n + m) <= n * m
        )


def is_linear(module: nn.Module, spec: CoefficientSpec) -> bool:
    """Whether `spec` describes the weight of `module`, an nn.Linear, as a matrix (n_d = 1)."""
    own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return own and spec.parameter == "weight" and spec.axes == (("o",), ("i", "d")) and spec.layout.sizes["d"] == 1
