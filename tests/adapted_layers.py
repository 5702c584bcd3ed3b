"""Layers of the table as adapted models of one layer, with their dense oracle."""

import copy

import torch
from layer_table import LAYERS
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.testing import dense_model


class First(nn.Module):
    """The first output of a layer that may have more."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def adapted(name, dtype=torch.float64, adapters=1, r=(2, 3, 2)):
    """The base, an adapted copy, an input."""
    row = LAYERS[name]
    r = (r[0], min(r[1], row.sizes[1]), r[2])
    return adapt(row.make(), row.declared, row.sample(dtype).shape, dtype, adapters, r)


def adapt(layer, coefficients, shape, dtype=torch.float64, adapters=1, r=(8, 8, 4)):
    base = First(layer)
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data = tensor.data.to(dtype)
    config = LoTRAConfig(r=r, init_weights=False, alpha=0.7, coefficients=coefficients or {})
    model = get_peft_model(copy.deepcopy(base), config)
    for k in range(1, adapters):
        model.add_adapter(f"adapter {k}", config)
    model.base_model.set_adapter(["default", *(f"adapter {k}" for k in range(1, adapters))])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return base.requires_grad_(False), model, (torch.rand(shape, dtype=dtype) * 1.6 - 0.8).requires_grad_()


def dense(base, model):
    """x -> the output of a new dense oracle, because each result may be differentiated only once."""
    return lambda x: dense_model(base, model)(x)


def factors_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
