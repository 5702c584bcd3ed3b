"""A KAN with an adapter for a family of tasks, and its dense oracle at one task."""

import copy

import numpy as np
import torch
from kan_layers import ChebyKAN
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.testing import dense_model

LAM = {"lam": (1.0, 1.6)}
X = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).reshape(8, 3)


def polynomials(value, a=1.0, b=1.6, degree=4):
    """T_0 … T_degree by numpy."""
    x = 2 * (np.asarray(value, dtype=float) - a) / (b - a) - 1
    return torch.tensor(np.polynomial.chebyshev.chebvander(x, degree).reshape(*x.shape, degree + 1))


def fill(model):
    """Fill the cores with nonzero values of the size of the coefficients."""
    torch.manual_seed(3)
    for layer in adapted_tensors(model).values():
        for core in layer.lotra_core.values():
            nn.init.normal_(core, std=0.5)


def kan(r=2, widths=(3, 6, 4), **kwargs):
    torch.manual_seed(1)
    base = ChebyKAN(list(widths)).double()
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=r, **({"family": LAM} | kwargs)))
    fill(model)
    return base, model


def at(base, model, c):
    """The dense oracle at c: every core is contracted by hand."""
    one = copy.deepcopy(model)
    for layer in adapted_tensors(one).values():
        core = layer.lotra_core["default"]
        layer._modules["lotra_core"]._parameters["default"] = torch.einsum("...p,p->...", core.detach(), c)
        layer.terms["default"] = 0
    return dense_model(base, one)
