"""Small KAN layers, written for the tests, that use their coefficients in ways that only few public libraries do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kan_layers import chebyshev, gaussians
from torch import nn


class GroupedFastConvLayer(nn.Module):
    """Per group: y = spline_conv[g](gaussians(layer_norm[g](x))) + base_conv[g](silu(x)): a norm and a tensor each."""

    def __init__(self, n, m, groups=2, num_grids=4, kernel_size=3):
        super().__init__()
        self.groups = groups
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, num_grids))
        sizes = {"kernel_size": kernel_size, "padding": kernel_size // 2, "bias": False}
        self.layer_norm = nn.ModuleList(nn.InstanceNorm2d(n // groups) for _ in range(groups))
        self.base_conv = nn.ModuleList(nn.Conv2d(n // groups, m // groups, **sizes) for _ in range(groups))
        self.spline_conv = nn.ModuleList(
            nn.Conv2d(n // groups * num_grids, m // groups, **sizes) for _ in range(groups)
        )

    def forward(self, x):
        outputs = []
        for g, part in enumerate(x.chunk(self.groups, dim=1)):
            basis = gaussians(self.layer_norm[g](part), self.grid).movedim(-1, 2).flatten(1, 2)
            outputs.append(self.spline_conv[g](basis) + self.base_conv[g](F.silu(part)))
        return torch.cat(outputs, dim=1)


class GroupNormalizedConvLayer(nn.Module):
    """Per group: y = silu(norm(conv2d(T(x in [-1, 1]), weights[g]))), one Parameter for all: `g o (d i) h w`."""

    def __init__(self, n, m, groups=2, degree=3, kernel_size=3):
        super().__init__()
        self.groups, self.degree, self.padding = groups, degree, kernel_size // 2
        n, m = n // groups, m // groups
        self.weights = nn.Parameter(torch.randn(groups, m, n * (degree + 1), kernel_size, kernel_size) / n)
        self.norm = nn.ModuleList(nn.InstanceNorm2d(m) for _ in range(groups))

    def forward(self, x):
        outputs = []
        for g, part in enumerate(x.chunk(self.groups, dim=1)):
            scaled = 2 * (part - part.min()) / (part.max() - part.min()) - 1
            basis = chebyshev(scaled, self.degree).movedim(-1, 1).flatten(1, 2)
            outputs.append(F.silu(self.norm[g](F.conv2d(basis, self.weights[g], padding=self.padding))))
        return torch.cat(outputs, dim=1)


class GramConvLayer(nn.Module):
    """Per group: y = silu(norm(conv2d(silu(p(tanh x)), poly_weights[g]) + base_conv[g](silu(x)))): `g o (d i) h w`.

    p are Gram polynomials, whose recursion has learned numbers, as in KAGN convolutions. With `inner`, convolutions of
    size 1 narrow the channels of each group before the basis and widen them after the contraction: a bottleneck.
    """

    def __init__(self, n, m, kernel_size=3, degree=3, groups=1, inner=None, stride=1):
        super().__init__()
        self.groups, self.degree, self.inner = groups, degree, inner
        self.sizes = {"stride": stride, "padding": kernel_size // 2}
        n, m = n // groups, m // groups
        low, high = (n, m) if inner is None else (inner, inner)
        self.base_conv = nn.ModuleList(nn.Conv2d(n, m, kernel_size, bias=False, **self.sizes) for _ in range(groups))
        self.layer_norm = nn.ModuleList(nn.InstanceNorm2d(m) for _ in range(groups))
        self.poly_weights = nn.Parameter(torch.randn(groups, high, low * (degree + 1), kernel_size, kernel_size) / n)
        self.beta_weights = nn.Parameter(torch.rand(degree + 1))
        if inner is not None:
            self.inner_proj = nn.ModuleList(nn.Conv2d(n, inner, 1, bias=False) for _ in range(groups))
            self.out_proj = nn.ModuleList(nn.Conv2d(inner, m, 1, bias=False) for _ in range(groups))

    def gram(self, x):
        terms = [torch.ones_like(x), x]
        for k in range(1, self.degree):
            terms.append(x * terms[-1] - self.beta_weights[k] * terms[-2])
        return torch.cat(terms, dim=1)

    def forward(self, x):
        outputs = []
        for g, part in enumerate(x.chunk(self.groups, dim=1)):
            base = self.base_conv[g](F.silu(part))
            part = part if self.inner is None else self.inner_proj[g](part)
            y = F.conv2d(F.silu(self.gram(torch.tanh(part))), self.poly_weights[g], **self.sizes)
            y = y if self.inner is None else self.out_proj[g](y)
            outputs.append(F.silu(self.layer_norm[g](y + base)))
        return torch.cat(outputs, dim=1)


class BernsteinConvLayer(nn.Module):
    """y = conv2d(b(sigmoid x), poly_weights), b by de Casteljau's steps from ones, which stay ones, as in KABN."""

    def __init__(self, n, m, kernel_size=3, degree=3):
        super().__init__()
        self.degree = degree
        self.poly_weights = nn.Parameter(torch.randn(m, n * (degree + 1), kernel_size, kernel_size) / n)

    def forward(self, x):
        x = torch.sigmoid(x)
        basis = torch.ones(*x.shape, self.degree + 1, dtype=x.dtype)
        for j in range(1, self.degree + 1):
            for k in range(self.degree + 1 - j):
                basis[..., k] = basis[..., k] * (1 - x) + basis[..., k + 1] * x
        return F.conv2d(basis.movedim(-1, 2).flatten(1, 2), self.poly_weights, padding=1)


class SoftplusEdgeLayer(nn.Module):
    """y_o = Σ_i softplus(weight[o, i]·x_i): a function of one number per edge, as in unikan and single-kan."""

    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n + 1))

    def forward(self, x):
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        return F.softplus(x.unsqueeze(-2) * self.weight).sum(-1)


class TwoBasesKANLayer(nn.Module):
    """y = linear([gaussians(x), T(norm(x))]): two bases side by side, and each sees the inputs its own way."""

    def __init__(self, n, m, num_grids=4, degree=2):
        super().__init__()
        self.degree = degree
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, num_grids))
        self.norm = nn.LayerNorm(n)
        self.weight = nn.Parameter(torch.randn(m, n * (num_grids + degree + 1)) / n)

    def forward(self, x):
        basis = torch.cat([gaussians(1.2 * x, self.grid), chebyshev(torch.tanh(self.norm(x)), self.degree)], dim=-1)
        return F.linear(basis.flatten(-2), self.weight)


class StackedKANLayer(nn.Module):
    """y[0] = linear(gaussians(x[0])), y[1] = linear(T(x[1])), x normalised first: one weight, as in FC_KAN."""

    def __init__(self, n, m, basis=4):
        super().__init__()
        self.basis, self.m = basis, m
        self.register_buffer("grid", torch.linspace(-1.5, 1.5, basis))
        self.norm = nn.LayerNorm(n)
        self.weight = nn.Parameter(torch.randn(m, n * basis) / n)

    def forward(self, x):
        x = self.norm(x)
        y = x.new_zeros(*x.shape[:2], self.m)
        for k in range(2):
            part = x[k]
            basis = gaussians(part, self.grid) if k == 0 else chebyshev(torch.tanh(part), self.basis - 1)
            y[k] = F.linear(basis.flatten(-2), self.weight)
        return y


class ComplexInputKANLayer(nn.Module):
    """y = (Σ real·φ) + i (Σ imaginary·φ), φ = exp(-|z - grid|²) on a square grid: `i o d1 d2`, as in cvkan."""

    def __init__(self, n, m, num_grids=3):
        super().__init__()
        line = torch.linspace(-1, 1, num_grids)
        self.register_buffer("grid", torch.complex(line[:, None].expand(-1, num_grids), line.expand(num_grids, -1)))
        self.real, self.imaginary = (nn.Parameter(torch.randn(n, m, num_grids, num_grids) / n) for _ in range(2))
        self.silu_weight = nn.Parameter(torch.randn(n, m, dtype=torch.complex64))

    def forward(self, z):
        basis = torch.exp(-((z[..., None, None] - self.grid).abs() ** 2))
        y = torch.complex(*(torch.einsum("biuv,iouv->bo", basis, w) for w in (self.real, self.imaginary)))
        return y + torch.einsum("io,bi->bo", self.silu_weight.to(z.dtype), torch.tanh(z))


class ComplexBasisKANLayer(nn.Module):
    """y = Σ coeffs[i, o, d]·exp(i d x_i): real coefficients of complex functions."""

    def __init__(self, n, m, basis=4):
        super().__init__()
        self.basis = basis
        self.coeffs = nn.Parameter(torch.randn(n, m, basis) / n)

    def forward(self, x):
        waves = torch.exp(1j * x[..., None] * torch.arange(1, self.basis + 1))
        return torch.view_as_real(torch.einsum("bid,iod->bo", waves, self.coeffs.to(waves.dtype))).flatten(1)


class ReLUKANLayer(nn.Module):
    """y = conv(r·(relu(x - low)·relu(high - x))²), the basis (i d) reshaped into one image, as in ReLU-KAN."""

    def __init__(self, n, m, g=4, k=2):
        super().__init__()
        self.n, self.m, self.size, self.r = n, m, g + k, 4 * g * g / ((k + 1) * (k + 1))
        low = torch.arange(-k, g) / g * 2 - 1
        self.phase_low = nn.Parameter(low.repeat(n, 1))
        self.phase_high = nn.Parameter((low + 2 * (k + 1) / g).repeat(n, 1))
        self.equal_size_conv = nn.Conv2d(1, m, (self.size, n))

    def forward(self, x):
        x = x.unsqueeze(2)
        basis = (torch.relu(x - self.phase_low) * torch.relu(self.phase_high - x) * self.r) ** 2
        return self.equal_size_conv(basis.reshape(len(x), 1, self.size, self.n)).reshape(len(x), self.m)


class VmapKANLayer(nn.Module):
    """y_o = Σ_i Σ_d values[i, o, d]·φ_d(x_i) by torch.vmap over samples, inputs and outputs, as in mlp-kan."""

    def __init__(self, n, m, points=5):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.values = nn.Parameter(torch.randn(n, m, points) / n)

    def forward(self, x):
        def curve(x, values):
            return (gaussians(x, self.points) * values).sum()

        edges = torch.vmap(torch.vmap(curve, (None, 0)), (0, 0))
        return torch.vmap(lambda sample: edges(sample, self.values))(x).sum(1)


class CumulativeKANLayer(nn.Module):
    """y = Σ cumsum(steps along d)[i, d, o]·φ_d(x_i), as in kanditioned's parallel scan."""

    def __init__(self, n, m, points=5):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.steps = nn.Parameter(torch.randn(n, points, m) / n)

    def forward(self, x):
        return torch.einsum("bid,ido->bo", gaussians(x, self.points), torch.cumsum(self.steps, dim=1))


class SharingKANLayer(nn.Module):
    """y = Σ_i coef[weight_sharing][o·i, d]·φ_d(x_i): rows picked by an index tensor, as in pykan's older versions."""

    def __init__(self, n, m, points=5):
        super().__init__()
        self.n, self.m = n, m
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.weight_sharing = torch.arange(n * m)
        self.coef = nn.Parameter(torch.randn(n * m, points) / n)

    def forward(self, x):
        x = torch.einsum("bi,o->boi", x, x.new_ones(self.m)).reshape(len(x), -1).T
        y = torch.einsum("ij,ijk->ik", self.coef[self.weight_sharing], gaussians(x, self.points).transpose(1, 2))
        return y.T.reshape(-1, self.m, self.n).sum(2)


# Found ---------------------------------------------------------------------------------------------------------------


class DegreesKANLayer(nn.Module):
    """y = Σ_d T_d(tanh x) c_dᵀ, the c_d in a ParameterList."""

    def __init__(self, n, m, degree=3):
        super().__init__()
        self.c = nn.ParameterList([nn.Parameter(torch.randn(m, n) / n) for _ in range(degree + 1)])

    def forward(self, x):
        basis = chebyshev(torch.tanh(x), len(self.c) - 1)
        return sum(F.linear(basis[..., d], c) for d, c in enumerate(self.c))


class FrequenciesKANLayer(nn.Module):
    """y = Σ_k linear_k(sin(k x)): a linear layer for each function."""

    def __init__(self, n, m, number=3):
        super().__init__()
        self.waves = nn.ModuleList([nn.Linear(n, m, bias=False) for _ in range(number)])

    def forward(self, x):
        return sum(wave(torch.sin((k + 1) * x)) for k, wave in enumerate(self.waves))


class PowersKANLayer(nn.Module):
    """y = Σ_k tanh(x)^k P_k, in parameters p8, p9, p10: their numbers are in another order than their names."""

    def __init__(self, n, m):
        super().__init__()
        self.p8, self.p9, self.p10 = (nn.Parameter(torch.randn(n, m) / n) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(x)
        return x @ self.p8 + x**2 @ self.p9 + x**3 @ self.p10


class BatchedProductKANLayer(nn.Module):
    """Per group of inputs: y_g = bias_g + φ_g W_g by baddbmm."""

    def __init__(self, n, m, groups=2, points=4):
        super().__init__()
        self.groups = groups
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.weight = nn.Parameter(torch.randn(groups, n // groups * points, m // groups) / n)
        self.bias = nn.Parameter(torch.zeros(groups, 1, m // groups))

    def forward(self, x):
        basis = gaussians(x, self.points).flatten(-2).view(len(x), self.groups, -1).transpose(0, 1)
        return torch.baddbmm(self.bias, basis, self.weight).transpose(0, 1).flatten(1)


class ReorderedKANLayer(nn.Module):
    """y = Σ_i Σ_d coef[order[i], o, d]·φ_d(x_order[i]): inputs in an order of their own."""

    def __init__(self, n, m, points=5):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.order = torch.arange(n).flip(0)
        self.coef = nn.Parameter(torch.randn(n, m, points) / n)

    def forward(self, x):
        basis = gaussians(x.index_select(1, self.order), self.points)
        return torch.einsum("bid,iod->bo", basis, self.coef.index_select(0, self.order))


class WindowedKANLayer(nn.Module):
    """y = Σ_i Σ_d coef[i, o, d]·w_d·φ_d(x_i), an einsum of three operands."""

    def __init__(self, n, m, points=5):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.register_buffer("window", torch.hann_window(points + 2)[1:-1])
        self.coef = nn.Parameter(torch.randn(n, m, points) / n)

    def forward(self, x):
        return torch.einsum("bid,d,iod->bo", gaussians(x, self.points), self.window, self.coef)


class GatedKANLayer(nn.Module):
    """y = a·sigmoid(b), where (a, b) are the outputs of one KAN layer."""

    def __init__(self, n, m, points=4):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.weight = nn.Parameter(torch.randn(2 * m, n * points) / n)

    def forward(self, x):
        return F.glu(F.linear(gaussians(x, self.points).flatten(-2), self.weight), dim=-1)


class EvenKANLayer(nn.Module):
    """y = f(x) + f(-x): the coefficients are used twice."""

    def __init__(self, n, m, points=5):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1, 2, points))
        self.weight = nn.Parameter(torch.randn(m, n * points) / n)

    def forward(self, x):
        return sum(F.linear(gaussians(sign * x, self.points).flatten(-2), self.weight) for sign in (1, -1))


class TokensKANLayer(nn.Module):
    """A KAN over the tokens of each channel: y[b, t, c] = Σ_s Σ_d coef[s, t, d]·φ_d(x[b, s, c])."""

    def __init__(self, n, m, points=4):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.coef = nn.Parameter(torch.randn(n, m, points) / n)

    def forward(self, x):
        return torch.einsum("bscd,std->btc", gaussians(x, self.points), self.coef)


class FlatKANLayer(nn.Module):
    """All coefficients in one vector, which forward views as (n, m, n_d)."""

    def __init__(self, n, m, points=4):
        super().__init__()
        self.sizes = n, m, points
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.vector = nn.Parameter(torch.randn(n * m * points) / n)

    def forward(self, x):
        return torch.einsum("bid,iod->bo", gaussians(x, self.points), self.vector.view(self.sizes))


class TransposedConvKANLayer(nn.Module):
    """y = conv_transpose2d(gaussians(x), weight): `(i d) o h w`."""

    def __init__(self, n, m, points=4):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.weight = nn.Parameter(torch.randn(n * points, m, 3, 3) / n)

    def forward(self, x):
        basis = gaussians(x, self.points).movedim(-1, 2).flatten(1, 2)
        return F.conv_transpose2d(basis, self.weight, padding=1)


class InterpolatingKANLayer(nn.Module):
    """Linear interpolation in tables of values[i, k, o], whose rows an index for each sample picks."""

    def __init__(self, n, m, points=6):
        super().__init__()
        self.points = points
        self.values = nn.Parameter(torch.randn(n, points, m) / n)

    def forward(self, x):
        place = (x.clamp(-0.99, 0.99) + 1) / 2 * (self.points - 1)
        k = place.floor().long()
        t, i = (place - k).unsqueeze(-1), torch.arange(x.shape[1])
        return ((1 - t) * self.values[i, k] + t * self.values[i, k + 1]).sum(1)


# Refused -------------------------------------------------------------------------------------------------------------


class NormalizedKANLayer(nn.Module):
    """The coefficients are divided by their norm, so the layer is not affine in them."""

    def __init__(self, n, m, points=4):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.coef = nn.Parameter(torch.randn(n, m, points))

    def forward(self, x):
        return torch.einsum("bid,iod->bo", gaussians(x, self.points), self.coef / self.coef.norm())


class RecurrentKANLayer(nn.Module):
    """h ← KAN(h), three times by the same coefficients."""

    def __init__(self, n, m, points=4):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.coef = nn.Parameter(torch.randn(n, n, points) / n)

    def forward(self, x):
        for _ in range(3):
            x = torch.einsum("bid,iod->bo", gaussians(x, self.points), self.coef)
        return x


class OneCurveKANLayer(nn.Module):
    """y_o = Σ_i mix[i, o] f(x_i), one function f for all edges."""

    def __init__(self, n, m, points=6):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.curve = nn.Parameter(torch.randn(points))
        self.mix = nn.Parameter(torch.randn(n, m))

    def forward(self, x):
        return (gaussians(x, self.points) @ self.curve) @ self.mix


class FactorisedKANLayer(nn.Module):
    """A = Σ_r a_r ∘ b_r ∘ c_r, as a small KAN of low rank: no factor is a coefficient tensor."""

    def __init__(self, n, m, points=5, rank=3):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.a, self.b, self.c = (nn.Parameter(torch.randn(size, rank)) for size in (n, m, points))

    def forward(self, x):
        return torch.einsum("bid,ir,dr,or->bo", gaussians(x, self.points), self.a, self.c, self.b)


class ExpertsKANLayer(nn.Module):
    """y = Σ_e p_e(x) Σ_i Σ_d coef[e, i, o, d]·φ_d(x_i): the weight of an expert depends on all inputs."""

    def __init__(self, n, m, experts=2, points=4):
        super().__init__()
        self.register_buffer("points", torch.linspace(-1.5, 1.5, points))
        self.route = nn.Linear(n, experts)
        self.coef = nn.Parameter(torch.randn(experts, n, m, points) / n)

    def forward(self, x):
        share = self.route(x).softmax(-1)
        return torch.einsum("be,bid,eiod->bo", share, gaussians(x, self.points), self.coef)


class RootsKANLayer(nn.Module):
    """y_o = Σ_i Π_k (x_i - roots[i, o, k]): polynomials by their roots."""

    def __init__(self, n, m, degree=3):
        super().__init__()
        self.roots = nn.Parameter(torch.randn(n, m, degree))

    def forward(self, x):
        return (x[:, :, None, None] - self.roots).prod(-1).sum(1)
