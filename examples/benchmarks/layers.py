"""Layers whose training step is measured: small KAN layers in plain PyTorch, pykan's own, nn.Linear, a convolution.

The first two compute the same as the public libraries efficient-kan and fast-kan, operation by operation, because the
operations around the coefficients decide on the cost of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from chebyshev_kan import ChebyshevKANLayer, chebyshev_basis
from einops import rearrange
from torch import Tensor, nn

from peft_lotra import register_kan_layer

SPLINE_ORDER = 3


class EfficientKANLayer(nn.Module):
    """y = F.linear(silu(x), base_weight) + F.linear(B(x), spline_weight · spline_scaler), as in efficient-kan.

    Shapes: x (batch, n), spline_weight (m, n, n_d), spline_scaler (m, n), y (batch, m).
    """

    def __init__(self, in_features: int, out_features: int, basis: int) -> None:
        super().__init__()
        intervals = basis - SPLINE_ORDER
        knots = torch.arange(-SPLINE_ORDER, intervals + SPLINE_ORDER + 1) * (2 / intervals) - 1
        self.register_buffer("grid", knots.expand(in_features, -1).contiguous())
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.spline_weight = nn.Parameter(torch.randn(out_features, in_features, basis) / in_features**0.5)
        self.spline_scaler = nn.Parameter(torch.rand(out_features, in_features) + 0.5)

    def b_splines(self, x: Tensor) -> Tensor:
        """Cubic B-splines by the Cox–de Boor recursion. shape: (batch, n) → (batch, n, n_d)"""
        x, grid = x.unsqueeze(-1), self.grid
        basis = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, SPLINE_ORDER + 1):
            rising = (x - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1])
            falling = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k])
            basis = rising * basis[..., :-1] + falling * basis[..., 1:]
        return basis

    @property
    def scaled_spline_weight(self) -> Tensor:
        # The scaler is optional, as it is there.
        return self.spline_weight * (1.0 if self.spline_scaler is None else self.spline_scaler.unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scaled_spline_weight.view(len(self.base_weight), -1)
        return F.linear(F.silu(x), self.base_weight) + F.linear(self.b_splines(x).view(len(x), -1), weight)


class FastKANLayer(nn.Module):
    """y = spline_linear(exp(−((LayerNorm(x) − grid) / h)²)) + base_linear(silu(x)), as in fast-kan.

    Shapes: x (batch, n), spline_linear.weight (m, n · n_d), y (batch, m).
    """

    def __init__(self, in_features: int, out_features: int, basis: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_features)
        self.register_buffer("grid", torch.linspace(-2, 2, basis))
        self.spline_linear = nn.Linear(in_features * basis, out_features, bias=False)
        self.base_linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        distance = (self.layernorm(x).unsqueeze(-1) - self.grid) / (4 / (len(self.grid) - 1))
        return self.spline_linear(torch.exp(-(distance**2)).view(len(x), -1)) + self.base_linear(F.silu(x))


def _pykan_layer(in_features: int, out_features: int, basis: int) -> nn.Module:
    from kan.KANLayer import KANLayer  # imported here: optional, and slow to import

    return KANLayer(in_features, out_features, num=basis - SPLINE_ORDER, k=SPLINE_ORDER)


class OneLayer(nn.Module):
    """A model of one KAN layer, because PEFT adapts layers inside a model. It returns the first of several outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


@dataclass(frozen=True)
class Kind:
    """A kind of KAN layer, and where it keeps its coefficients."""

    title: str
    build: Callable[[int, int, int], nn.Module]  # (n, m, n_d) -> layer
    parameter: str  # path of the coefficients
    axes: str  # their order, for einsum; flattened or not
    coefficients: Callable[[nn.Module], Mapping[str, Any]]  # for LoTRAConfig
    basis: int | None = None  # n_d, if it is fixed
    lora_target: str | None = None  # the nn.Linear that LoRA can wrap


def _efficient_coefficients(layer: EfficientKANLayer) -> Mapping[str, Any]:
    scale = {} if layer.spline_scaler is None else {"scale": "spline_scaler", "scale_layout": "o i"}
    return {"spline_weight": {"layout": "o i d", **scale}}


KINDS = {
    "efficient": Kind("efficient-kan", EfficientKANLayer, "spline_weight", "oid", _efficient_coefficients),
    "fastkan": Kind(
        "FastKAN",
        FastKANLayer,
        "spline_linear.weight",
        "oid",
        lambda layer: {"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": len(layer.grid)}}},
        lora_target="spline_linear",
    ),
    "chebyshev": Kind(
        "Chebyshev",
        lambda n, m, basis: ChebyshevKANLayer(n, m, degree=basis - 1),
        "coefficients",
        "iod",
        lambda layer: {"coefficients": "i o d"},
    ),
    "pykan": Kind("pykan", _pykan_layer, "coef", "iod", lambda layer: {"coef": "i o d"}),
    "linear": Kind(
        "nn.Linear",
        lambda n, m, _: nn.Linear(n, m),
        "weight",
        "oid",
        lambda layer: {"weight": {"layout": "o (i d)", "sizes": {"d": 1}}},
        basis=1,
        lora_target="layer",
    ),
}


class ConvKANLayer(nn.Module):
    """y_o(p) = Σ_h Σ_w Σ_i Σ_d weight[o, (i d), h, w] · T_d(tanh x_i(p + (h, w)))

    Shapes: x (N, n, height, width), conv.weight (m, n · n_d, kernel, kernel), y (N, m, height, width).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, basis: int) -> None:
        super().__init__()
        self.basis = basis
        self.conv = nn.Conv2d(in_channels * basis, out_channels, kernel, padding=kernel // 2, bias=False)
        nn.init.normal_(self.conv.weight, std=(in_channels * basis) ** -0.5 / kernel)
        with torch.no_grad():  # less of the higher degrees, as in ChebyshevKANLayer
            self.conv.weight /= torch.arange(1, basis + 1).repeat(in_channels)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        basis = rearrange(chebyshev_basis(torch.tanh(x), self.basis - 1), "b i h w d -> b (i d) h w")
        # Of one channel, it is a view with the channels last. Residual blocks then mix both orders, and the backward
        # pass of a frozen convolution (torch 2.13, CPU) crashes.
        return self.conv(basis.contiguous())


register_kan_layer(ConvKANLayer, lambda layer: {"conv.weight": {"layout": "o (i d) h w", "sizes": {"d": layer.basis}}})
