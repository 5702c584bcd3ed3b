"""How much of a tensor Tucker ranks keep and lose, from its HOSVD. Pure functions, without PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .decomposition import hosvd


@dataclass(frozen=True)
class Spectrum:
    """σ_k⁽¹⁾, σ_k⁽²⁾, σ_k⁽³⁾ of a tensor A (n, m, n_d, ...) unfolded along its modes input, output and basis.

    With the HOSVD A = S ×₁ U1 ×₂ U2 ×₃ U3, the energy (squared norm) of A is that of S, and the truncated HOSVD of
    ranks r keeps the energy of S[:r1, :r2, :r3].

    Attributes:
        shape: the shape of A.
        singular_values: the singular values of the three unfoldings, descending, in float64.
        core_energy: S², summed over A's trailing axes. shape: (≤ n, ≤ m, ≤ n_d)
    """

    shape: tuple[int, ...]
    singular_values: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    core_energy: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "tensor") -> Spectrum:
        """The spectrum of A, shape (n, m, n_d, ...), computed in float64 on the CPU.

        Raises:
            TypeError, ValueError: naming A by `name`, if A is not a real tensor, has fewer than three axes, or is not
                finite.
        """
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} should be a real floating-point tensor, got {getattr(tensor, 'dtype', tensor)!r}")
        if tensor.dim() < 3 or not tensor.numel():
            raise ValueError(f"{name} should have the axes (input, output, basis, ...), got {tuple(tensor.shape)}")
        tensor = tensor.detach().to("cpu", torch.float64)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has NaN or infinity: did the training diverge?")
        factors, values = hosvd(tensor)
        core_energy = factors.core.square().reshape(*factors.core.shape[:3], -1).sum(3)
        return cls(tuple(tensor.shape), (values["i"], values["o"], values["d"]), core_energy)

    @property
    def energy(self) -> float:
        """‖A‖²."""
        return self.core_energy.sum().item()

    def energy_kept(self, ranks: Sequence[int]) -> tuple[float, float, float]:
        """Σ_{k ≤ r} σ_k² / Σ_k σ_k² for each mode; 1 if A is zero."""
        squares = [values.square() for values in self.singular_values]
        return tuple(  # type: ignore[return-value]
            (square[:r].sum() / square.sum()).item() if square.any() else 1.0
            for square, r in zip(squares, ranks, strict=True)
        )

    def tail_bound(self, ranks: Sequence[int]) -> float:
        """sqrt(Σ_modes Σ_{k > r} σ_k²), an upper bound of `truncation_error`; Theorem 1 of the source rests on it."""
        values = zip(self.singular_values, ranks, strict=True)
        return math.sqrt(sum(values[r:].square().sum().item() for values, r in values))

    def truncation_error(self, ranks: Sequence[int]) -> float:
        """‖A − A_r‖ for the HOSVD of A truncated to the ranks r."""
        discarded = self.core_energy.clone()
        discarded[tuple(slice(r) for r in ranks)] = 0
        return math.sqrt(discarded.sum().item())
