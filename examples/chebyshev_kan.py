"""A small Chebyshev KAN in plain PyTorch, without any knowledge of PEFT.

It stands for "the KAN that you already have": the adapter is told where the coefficients lie by
``coefficients={"coefficients": "i o d"}`` and needs nothing else from this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def chebyshev_basis(z: Tensor, degree: int) -> Tensor:
    """T_0(z), …, T_degree(z), by T_{k+1} = 2 z T_k − T_{k−1}.

    cos(k·acos z) would give NaN gradients: the derivative of acos is infinite at ±1, and a saturated tanh is exactly
    ±1 in floating point.

    Args:
        z: Points in [−1, 1]. shape: (*batch, n)
        degree: Highest degree, at least 1.

    Returns:
        shape: (*batch, n, degree + 1)
    """
    polynomials = [torch.ones_like(z), z]
    for _ in range(degree - 1):
        polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
    return torch.stack(polynomials, dim=-1)


class ChebyshevKANLayer(nn.Module):
    """y_o = Σ_i Σ_d coefficients[i, o, d] · T_d(tanh x_i)

    Args:
        in_features: Number of inputs n.
        out_features: Number of outputs m.
        degree: Highest Chebyshev degree, at least 1; the layer has n_d = degree + 1 basis functions per input.

    Shapes: x (*batch, n), coefficients (n, m, n_d), y (*batch, m).
    """

    def __init__(self, in_features: int, out_features: int, degree: int) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"`degree` must be at least 1, got {degree}.")
        self.in_features, self.out_features, self.degree = in_features, out_features, degree
        self.coefficients = nn.Parameter(torch.empty(in_features, out_features, degree + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """coefficients[i, o, d] ~ N(0, 1 / (n · n_d · (d + 1)²))

        Without the decay in d, the layer starts with such large derivatives (T_d' grows as d²) that a loss of second
        derivatives does not decrease.
        """
        nn.init.normal_(self.coefficients, std=(self.in_features * (self.degree + 1)) ** -0.5)
        with torch.no_grad():
            self.coefficients /= torch.arange(1, self.degree + 2)

    def forward(self, x: Tensor) -> Tensor:
        basis = chebyshev_basis(torch.tanh(x), self.degree)
        return torch.einsum("...id,iod->...o", basis, self.coefficients)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, degree={self.degree}"


class ChebyshevKAN(nn.Module):
    """Ψ = layer_L ∘ … ∘ layer_1, where layer l maps width[l − 1] features to width[l].

    Args:
        width: Numbers of features, from the input to the output.
        degree: Highest Chebyshev degree, the same in every layer.

    Shapes: x (*batch, width[0]) → (*batch, width[-1]).
    """

    def __init__(self, width: Sequence[int] = (2, 32, 32, 1), degree: int = 7) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChebyshevKANLayer(n, m, degree) for n, m in pairwise(width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
