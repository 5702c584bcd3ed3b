"""Small KAN layers written for the tests: layouts met in public libraries that PyPI does not have.

Forward behaviour and attribute names are those of the libraries, the code is ours. `pose_as` gives a class the
qualified name of the original, so that the registry knows it (and pickle finds it).
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn


def pose_as(module: str):
    """Give a class the `__module__` of a library's class, and put it into that module, so that pickle finds it."""

    def rename(cls: type) -> type:
        cls.__module__, cls.__qualname__ = module, cls.__name__
        for part in (module.partition(".")[0], module):
            sys.modules.setdefault(part, ModuleType(part))
        setattr(sys.modules[module], cls.__name__, cls)
        return cls

    return rename


def chebyshev(x: torch.Tensor, degree: int) -> torch.Tensor:
    """T_0(x) … T_degree(x) by T_k = 2x·T_{k-1} - T_{k-2}, on a new last axis."""
    terms = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        terms.append(2 * x * terms[-1] - terms[-2])
    return torch.stack(terms[: degree + 1], dim=-1)


def gaussians(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """exp(-((x - grid_d)/h)²) on a new last axis, h the distance of the grid points."""
    return torch.exp(-(((x[..., None] - grid) / (grid[1] - grid[0])) ** 2))


class _Stack(nn.Module):
    """y = layers[-1](… layers[0](x)): the container of most KAN libraries."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# Layers that the registry knows --------------------------------------------------------------------------------------


@pose_as("efficient_kan.kan")
class KANLinear(nn.Module):
    """y = F.linear(silu(x), base_weight) + F.linear(B(x), spline_weight · spline_scaler), as in efficient-kan."""

    def __init__(self, in_features, out_features, grid_size=5, spline_order=3, enable_standalone_scale_spline=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.enable_standalone_scale_spline = enable_standalone_scale_spline
        knots = torch.arange(-spline_order, grid_size + spline_order + 1) * (2 / grid_size) - 1
        self.register_buffer("grid", knots.expand(in_features, -1).contiguous())
        basis = grid_size + spline_order
        self.base_weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.spline_weight = nn.Parameter(torch.randn(out_features, in_features, basis) * 0.3)
        if enable_standalone_scale_spline:
            self.spline_scaler = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.base_activation = nn.SiLU()

    def b_splines(self, x):
        """B(x), shape (batch, in, basis), by the Cox-de Boor recursion on the knots of each input."""
        x, grid = x.unsqueeze(-1), self.grid
        basis = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.spline_order + 1):
            rising = (x - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1])
            falling = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k])
            basis = rising * basis[..., :-1] + falling * basis[..., 1:]
        return basis

    @property
    def scaled_spline_weight(self):
        if not self.enable_standalone_scale_spline:
            return self.spline_weight * 1.0
        return self.spline_weight * self.spline_scaler.unsqueeze(-1)

    def forward(self, x):
        lead = x.shape[:-1]
        x = x.reshape(-1, self.in_features)
        spline = F.linear(self.b_splines(x).reshape(len(x), -1), self.scaled_spline_weight.view(self.out_features, -1))
        return (F.linear(self.base_activation(x), self.base_weight) + spline).reshape(*lead, self.out_features)

    @torch.no_grad()
    def update_grid(self, x):
        """New knots from the range of x. The coefficients are fitted again by least squares and written to `.data`."""
        curves = torch.einsum("bid,oid->ibo", self.b_splines(x), self.scaled_spline_weight)
        low, high = x.min(0).values - 0.01, x.max(0).values + 0.01
        steps = torch.arange(self.grid.shape[1], dtype=x.dtype) - self.spline_order
        self.grid.copy_(low[:, None] + steps * ((high - low) / self.grid_size)[:, None])
        fitted = torch.linalg.lstsq(self.b_splines(x).transpose(0, 1), curves).solution
        self.spline_weight.data.copy_(fitted.permute(2, 0, 1))

    def regularization_loss(self, regularize_activation=1.0, regularize_entropy=1.0):
        l1 = self.spline_weight.abs().mean(-1)
        p = l1 / l1.sum()
        return regularize_activation * l1.sum() - regularize_entropy * (p * p.log()).sum()


@pose_as("efficient_kan.kan")
class KAN(_Stack):
    """efficient-kan's container, with its `update_grid` flag and its regularization loss."""

    def __init__(self, layers_hidden, **kwargs):
        super().__init__(KANLinear(n, m, **kwargs) for n, m in zip(layers_hidden[:-1], layers_hidden[1:], strict=True))

    def forward(self, x, update_grid=False):
        for layer in self.layers:
            if update_grid:
                layer.update_grid(x)
            x = layer(x)
        return x

    def regularization_loss(self, regularize_activation=1.0, regularize_entropy=1.0):
        return sum(layer.regularization_loss(regularize_activation, regularize_entropy) for layer in self.layers)


class RadialBasisFunction(nn.Module):
    def __init__(self, num_grids=8):
        super().__init__()
        self.num_grids = num_grids
        self.grid = nn.Parameter(torch.linspace(-2.0, 2.0, num_grids), requires_grad=False)

    def forward(self, x):
        return gaussians(x, self.grid)


@pose_as("fastkan.fastkan")
class FastKANLayer(nn.Module):
    """y = spline_linear(flatten(rbf(layernorm(x)))) + base_linear(silu(x)), as in fast-kan."""

    def __init__(self, input_dim, output_dim, num_grids=8, use_base_update=True, use_layernorm=True):
        super().__init__()
        self.input_dim, self.output_dim, self.use_base_update = input_dim, output_dim, use_base_update
        self.layernorm = nn.LayerNorm(input_dim) if use_layernorm else None
        self.rbf = RadialBasisFunction(num_grids)
        self.spline_linear = nn.Linear(input_dim * num_grids, output_dim, bias=False)
        if use_base_update:
            self.base_activation = F.silu
            self.base_linear = nn.Linear(input_dim, output_dim)

    def forward(self, x):
        basis = self.rbf(x if self.layernorm is None else self.layernorm(x))
        y = self.spline_linear(basis.view(*basis.shape[:-2], -1))
        if self.use_base_update:
            y = y + self.base_linear(self.base_activation(x))
        return y


@pose_as("fastkan.fastkan")
class FastKAN(_Stack):
    def __init__(self, layers_hidden, **kwargs):
        super().__init__(
            FastKANLayer(n, m, **kwargs) for n, m in zip(layers_hidden[:-1], layers_hidden[1:], strict=True)
        )


@pose_as("ChebyKANLayer")
class ChebyKANLayer(nn.Module):
    """y = einsum("bid,iod->bo", T(tanh x), cheby_coeffs); leading axes flattened in the output, as in ChebyKAN."""

    def __init__(self, input_dim, output_dim, degree):
        super().__init__()
        self.inputdim, self.outdim, self.degree = input_dim, output_dim, degree
        self.cheby_coeffs = nn.Parameter(torch.randn(input_dim, output_dim, degree + 1) / (input_dim * (degree + 1)))

    def forward(self, x):
        basis = chebyshev(torch.tanh(x).view(-1, self.inputdim), self.degree)
        return torch.einsum("bid,iod->bo", basis, self.cheby_coeffs).view(-1, self.outdim)


class ChebyKAN(_Stack):
    """A stack of ChebyKAN layers."""

    def __init__(self, widths, degree=3):
        super().__init__(ChebyKANLayer(n, m, degree) for n, m in zip(widths[:-1], widths[1:], strict=True))


# Layers that nobody registered ---------------------------------------------------------------------------------------


class MatrixKANLayer(nn.Module):
    """y = T(tanh x) contracted with one matrix whose flattened axis has either order: `"o (i d)"` or `"o (d i)"`."""

    def __init__(self, n, m, degree=3, order="i d"):
        super().__init__()
        self.n, self.degree, self.order = n, degree, order
        self.weight = nn.Parameter(torch.randn(m, n * (degree + 1)) / n**0.5)

    def forward(self, x):
        basis = chebyshev(torch.tanh(x), self.degree)
        if self.order == "d i":
            basis = basis.transpose(-1, -2)
        return F.linear(basis.flatten(-2), self.weight)


class EinsumKANLayer(nn.Module):
    """y = einsum(T(tanh x), coeffs) with the three axes of `coeffs` in any order, such as `"d o i"`; no constant φ."""

    def __init__(self, n, m, basis=4, order="d o i"):
        super().__init__()
        self.order, self.basis = order.replace(" ", ""), basis
        sizes = {"i": n, "o": m, "d": basis}
        self.coeffs = nn.Parameter(torch.randn([sizes[axis] for axis in self.order]) / n**0.5)

    def forward(self, x):
        basis = chebyshev(torch.tanh(x), self.basis)[..., 1:]
        return torch.einsum(f"...id,{self.order}->...o", basis, self.coeffs)


class NaiveFourierKANLayer(nn.Module):
    """y = Σ cos(g·x_i) coeffs[0] + sin(g·x_i) coeffs[1] + bias: `"c o i g"` as in FourierKAN, or `"c i o g"`.

    The coefficient tensor is used in two places, a slice each.
    """

    def __init__(self, inputdim, outdim, gridsize=3, addbias=True, order="o i"):
        super().__init__()
        self.inputdim, self.outdim, self.gridsize = inputdim, outdim, gridsize
        self.addbias, self.order = addbias, order
        edges = (outdim, inputdim) if order == "o i" else (inputdim, outdim)
        self.fouriercoeffs = nn.Parameter(torch.randn(2, *edges, gridsize) / (inputdim * gridsize) ** 0.5)
        if addbias:
            self.bias = nn.Parameter(torch.zeros(1, outdim))

    def forward(self, x):
        lead = x.shape[:-1]
        x = x.reshape(-1, self.inputdim)
        k = torch.arange(1, self.gridsize + 1, device=x.device).view(1, 1, 1, self.gridsize)
        edges = (len(x), 1, self.inputdim, 1) if self.order == "o i" else (len(x), self.inputdim, 1, 1)
        c, s = torch.cos(k * x.view(edges)), torch.sin(k * x.view(edges))
        inputs = -2 if self.order == "o i" else -3
        y = (c * self.fouriercoeffs[0:1]).sum((inputs, -1)) + (s * self.fouriercoeffs[1:2]).sum((inputs, -1))
        return (y + self.bias if self.addbias else y).view(*lead, self.outdim)


class PackedKANLayer(nn.Module):
    """y = F.linear([basis(x) flattened, silu(x)], weight): coefficients and residual in one matrix, as in inkan."""

    def __init__(self, in_features, out_features, n_bases=6):
        super().__init__()
        self.in_features, self.out_features, self.n_bases = in_features, out_features, n_bases
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, n_bases))
        self.weight = nn.Parameter(torch.randn(out_features, in_features * n_bases + in_features) / in_features**0.5)

    def forward(self, x):
        return F.linear(torch.cat([gaussians(x, self.grid).flatten(1), F.silu(x)], dim=1), self.weight)


class TwoTensorKANLayer(nn.Module):
    """Two coefficient tensors on one module, in two layouts: Gaussians `"(i d) o"` and Chebyshev `"i o d"`."""

    def __init__(self, n, m, num_grids=5, degree=3):
        super().__init__()
        self.degree = degree
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, num_grids))
        self.rbf_weight = nn.Parameter(torch.randn(n * num_grids, m) / n**0.5)
        self.cheby_weight = nn.Parameter(torch.randn(n, m, degree) / n**0.5)

    def forward(self, x):
        smooth = gaussians(x, self.grid).flatten(1) @ self.rbf_weight
        return smooth + torch.einsum("bid,iod->bo", chebyshev(torch.tanh(x), self.degree)[..., 1:], self.cheby_weight)


class TupleKANLayer(ChebyKANLayer):
    """(y, x, None): a layer that returns more than its output."""

    def forward(self, x):
        return super().forward(x), x.detach(), None


class PreActivatedKANLayer(nn.Module):
    """y = coefficients on the basis of every (input, basis) pair of a learned scale: P[i, o, d]·s[o, i] first."""

    def __init__(self, n, m, degree=4):
        super().__init__()
        self.degree = degree
        self.coeffs = nn.Parameter(torch.randn(n, m, degree))
        self.gain = nn.Parameter(torch.randn(m, n))

    def forward(self, x):
        weight = self.coeffs * self.gain.T.unsqueeze(-1)
        return torch.einsum("bid,iod->bo", chebyshev(torch.tanh(x), self.degree)[..., 1:], weight)


# Convolutional layers ------------------------------------------------------------------------------------------------


class ConvKANLayer(nn.Module):
    """y = activation(norm(conv2d(basis(x)))) with the channels flattened as `"(i d)"`; a Conv2d holds the weight."""

    def __init__(self, input_dim, output_dim, kernel_size=3, num_grids=4, norm=nn.InstanceNorm2d, activation=nn.PReLU):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, num_grids))
        self.base_conv = nn.Conv2d(input_dim, output_dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.spline_conv = nn.Conv2d(
            input_dim * num_grids, output_dim, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm, self.activation = norm(output_dim), activation()

    def forward(self, x):
        basis = gaussians(x, self.grid).movedim(-1, 2).flatten(1, 2)
        return self.activation(self.norm(self.base_conv(F.silu(x)) + self.spline_conv(basis)))


class GroupedPolyConvKANLayer(nn.Module):
    """Per group: y = silu(norm(conv2d(T(tanh x), poly_weights[g]))), the channels flattened as `"(d i)"`.

    `poly_weights` is one Parameter `"g o (d i) h w"`, or with `per_group=True` a ParameterList of `"o (d i) h w"`.
    """

    def __init__(self, input_dim, output_dim, kernel_size=3, degree=3, groups=1, per_group=False):
        super().__init__()
        self.groups, self.degree, self.padding = groups, degree, kernel_size // 2
        n, m = input_dim // groups, output_dim // groups
        weights = torch.randn(groups, m, n * (degree + 1), kernel_size, kernel_size) / n
        self.poly_weights = nn.ParameterList(weights.unbind()) if per_group else nn.Parameter(weights)
        self.layer_norm = nn.ModuleList(nn.InstanceNorm2d(m) for _ in range(groups))
        self.base_activation = nn.SiLU()

    def forward(self, x):
        outputs = []
        for g, part in enumerate(x.chunk(self.groups, dim=1)):
            basis = chebyshev(torch.tanh(part), self.degree).movedim(-1, 1).flatten(1, 2)
            y = F.conv2d(basis, self.poly_weights[g], padding=self.padding)
            outputs.append(self.base_activation(self.layer_norm[g](y)))
        return torch.cat(outputs, dim=1)


class UnfoldConvKANLayer(nn.Module):
    """y = unfold(x), basis, weight·scaler, bmm per group: `spline_weight` is `"g o (i h w) d"`, as in convkan."""

    def __init__(self, in_channels, out_channels, kernel_size=3, groups=1, num_grids=4):
        super().__init__()
        self.out_channels, self.kernel_size, self.groups = out_channels, kernel_size, groups
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, num_grids))
        patch = in_channels // groups * kernel_size**2
        self.spline_weight = nn.Parameter(torch.randn(groups, out_channels // groups, patch, num_grids) / patch**0.5)
        self.spline_scaler = nn.Parameter(torch.randn(groups, out_channels // groups, patch))

    def forward(self, x):
        batch, _, height, width = x.shape
        patches = F.unfold(x, self.kernel_size, padding=self.kernel_size // 2)
        patches = patches.view(batch, self.groups, -1, height * width).permute(1, 0, 3, 2).flatten(1, 2)
        weight = (self.spline_weight * self.spline_scaler.unsqueeze(-1)).flatten(2)
        y = torch.bmm(gaussians(patches, self.grid).flatten(2), weight.transpose(1, 2))
        y = y.view(self.groups, batch, height, width, -1).permute(1, 0, 4, 2, 3)
        return y.reshape(batch, self.out_channels, height, width)


# Layers to be refused ------------------------------------------------------------------------------------------------


class WaveletKANLayer(nn.Module):
    """y_o = Σ_i weights[o, i]·ψ((x_i - translation[o, i])/scale[o, i]): every edge has a function of its own."""

    def __init__(self, in_features, out_features, initial=False):
        super().__init__()
        shape = out_features, in_features  # initially, all functions are alike
        self.scale = nn.Parameter(torch.ones(shape) if initial else torch.rand(shape) + 0.5)
        self.translation = nn.Parameter(torch.zeros(shape) if initial else torch.randn(shape))
        self.wavelet_weights = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x):
        u = (x.unsqueeze(1) - self.translation) / self.scale
        return ((1 - u**2) * torch.exp(-0.5 * u**2) * self.wavelet_weights).sum(dim=2)


class RationalActivationLayer(nn.Module):
    """y = linear(p(x)/q(x)) with the coefficients of p and q shared by groups of features, as in KAT."""

    def __init__(self, in_features, out_features, groups=2, order=4):
        super().__init__()
        self.groups = groups
        self.numerator = nn.Parameter(torch.randn(groups, order + 1))
        self.denominator = nn.Parameter(torch.randn(groups, order))
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x):
        z = x.view(*x.shape[:-1], self.groups, -1, 1)
        powers = z ** torch.arange(self.numerator.shape[1])
        p = (powers * self.numerator[:, None]).sum(-1)
        q = 1 + (powers[..., 1:] * self.denominator[:, None]).sum(-1).abs()
        return self.linear((p / q).view(x.shape))


class AliasedKANLayer(nn.Module):
    """The forward pass reads the coefficients from a list made in `__init__`, whatever `self.coeffs` is by then."""

    def __init__(self, n, m, degree=3):
        super().__init__()
        self.degree = degree
        self.coeffs = nn.Parameter(torch.randn(n, m, degree + 1) / n**0.5)
        self._solver_inputs = [self.coeffs]

    def forward(self, x):
        return torch.einsum("bid,iod->bo", chebyshev(torch.tanh(x), self.degree), self._solver_inputs[0])


class ReassigningKANLayer(nn.Module):
    """The forward pass assigns `self.Y` again (to move it to the device of x) before it uses it."""

    def __init__(self, n, m, degree=3):
        super().__init__()
        self.degree = degree
        self.Y = nn.Parameter(torch.randn(n, m, degree + 1) / n**0.5)

    def forward(self, x):
        self.Y = nn.Parameter(self.Y.to(x.device))
        return torch.einsum("bid,iod->bo", chebyshev(torch.tanh(x), self.degree), self.Y)


class SquaredKANLayer(ChebyKANLayer):
    """Not affine: the coefficients enter squared."""

    def forward(self, x):
        basis = chebyshev(torch.tanh(x), self.degree)
        return torch.einsum("bid,iod->bo", basis, self.cheby_coeffs**2)


class ComplexKANLayer(nn.Module):
    """y = Re Σ coeffs[i, o, d]·exp(i·d·x_i) with complex coefficients."""

    def __init__(self, n, m, basis=3):
        super().__init__()
        self.basis = basis
        self.coeffs = nn.Parameter(torch.randn(n, m, basis, dtype=torch.complex64) / n**0.5)

    def forward(self, x):
        waves = torch.exp(1j * x[..., None] * torch.arange(1, self.basis + 1))
        return torch.einsum("bid,iod->bo", waves, self.coeffs).real


class DropoutKANLayer(MatrixKANLayer):
    """`MatrixKANLayer` with dropout on its basis: two runs differ while it trains."""

    def forward(self, x):
        basis = F.dropout(chebyshev(torch.tanh(x), self.degree), 0.3, self.training)
        return F.linear(basis.flatten(-2), self.weight)


class BatchNormKANLayer(ChebyKANLayer):
    """`ChebyKANLayer` with a BatchNorm1d after it, whose running statistics change while it trains."""

    def __init__(self, input_dim, output_dim, degree):
        super().__init__(input_dim, output_dim, degree)
        self.norm = nn.BatchNorm1d(output_dim)

    def forward(self, x):
        return self.norm(super().forward(x))
