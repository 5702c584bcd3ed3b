"""Small adapters of every kind, as this format writes them; later versions have to load them to the same outputs.

python tests/saved_adapters.py      # writes those that are not in tests/saved/ yet
"""

import shutil
import sys
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import torch
from kan_layers import ChebyKANLayer, ConvKANLayer, FastKANLayer
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, at_task, load_task, save_task
from peft_lotra.adapters.lora import save_as_lora
from peft_lotra.layers.lotra import adapted_tensors

SAVED = Path(__file__).parent / "saved"
X = torch.linspace(-0.9, 0.9, 9, dtype=torch.float64).reshape(3, 3)
IMAGES = torch.linspace(-0.9, 0.9, 32, dtype=torch.float64).reshape(1, 2, 4, 4)
CONVOLUTION = {"spline_conv.weight": {"layout": "o (i d) h w", "sizes": {"d": 4}}}
CODES = {"family": ["water", "argon", "helium"], "family_code": 2}


def determined(module):
    """The module with values that no generator and no processor changes."""
    with torch.no_grad():
        for k, tensor in enumerate(module.parameters()):
            if tensor.is_floating_point():
                tensor.copy_(
                    (1.0 + k + 0.7 * torch.arange(tensor.numel(), dtype=torch.float64)).sin().reshape(tensor.shape)
                )
    return module.double()


def kan():
    return determined(nn.Sequential(OrderedDict(layer=ChebyKANLayer(3, 4, 3), head=nn.Linear(4, 2))))


def convolution():
    return determined(nn.Sequential(ConvKANLayer(2, 3, norm=nn.Identity)))


def fast():
    return determined(nn.Sequential(FastKANLayer(3, 4)))


# Kind -> the base, fields of the config, and the arguments of `at_task` with which it runs.
KINDS = {
    "plain": (kan, {"r": 2}, None),
    "whole_modes": (kan, {"r": (None, 2, None), "alpha": 0.5}, None),
    "positions": (convolution, {"r": (2, 2, 2, 3), "coefficients": CONVOLUTION}, None),
    "head": (kan, {"r": 2, "modules_to_save": ["head"]}, None),
    "biases": (kan, {"r": 2, "bias": "all"}, None),
    "frozen_factors": (kan, {"r": 2, "freeze_factors": True}, None),
    "family": (kan, {"r": 2, "family": {"lam": (1.0, 1.6)}}, {"lam": 1.3}),
    "codes": (kan, {"r": 2, **CODES}, {"task": "argon"}),
    "task": (kan, {"r": 2, "family": {"lam": (1.0, 1.6)}}, None),
    "lora": (fast, {"r": 2}, None),
}


def output(kind, model):
    task = KINDS[kind][2]
    with torch.no_grad(), at_task(model, **task) if task else nullcontext():
        return model.eval()(IMAGES if kind == "positions" else X)


def make(kind, path):
    base, fields, _ = KINDS[kind]
    model = get_peft_model(base(), LoTRAConfig(**fields))
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            if "lotra" in name or ".modules_to_save." in name or parameter.requires_grad:
                parameter.copy_(
                    (2.0 + k + 0.9 * torch.arange(parameter.numel()).double()).sin().reshape(parameter.shape) / 2
                )
    if kind == "lora":
        save_as_lora(path, model)
    else:
        model.save_pretrained(path)
    if kind == "task":
        adapter_at(model, "new", lam=1.2)
        for layer in adapted_tensors(model, "new").values():
            layer.lotra_core["new"].data.add_(0.1)
        save_task(path / "task.safetensors", model, "new")
    torch.save(output(kind, model), path / "output.pt")


def load(kind, path):
    model = PeftModel.from_pretrained(KINDS[kind][0](), path)
    if kind == "task":
        load_task(path / "task.safetensors", model, "new")
    return output(kind, model)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    for kind in KINDS:
        path = SAVED / kind
        if path.exists() and "--again" not in sys.argv:
            continue
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        make(kind, path)
        (path / "README.md").unlink(missing_ok=True)
        print(path)
