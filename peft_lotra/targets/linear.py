"""Targets that "all-linear" adds to KAN layers: matrices and convolution kernels, as coefficients with n_d = 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..coefficients import CoefficientSpec, known_matrices
from ..coefficients.spec import owner_of, tensor_at
from ..coefficients.target import Target
from ..config.lotra_config import LoTRAConfig
from ..layers.lotra import LoTRALayer
from .base_model import BaseModel, around, naming_layer

_LAYOUTS = {
    nn.Linear: "o (i d)",
    Conv1D: "(i d) o",
    nn.Conv1d: "o (i d) w",
    nn.Conv2d: "o (i d) h w",
    nn.Conv3d: "o (i d) t h w",
}


def layout_of(module: nn.Module) -> tuple[str, dict[str, int]] | None:
    """The layout and sizes of a linear layer's or a convolution's `weight`, with one basis function; else None.

    For the output projection in nn.MultiheadAttention it is None, too: the attention reads this weight, and never
    calls the module.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    layout = next((layout for cls, layout in _LAYOUTS.items() if isinstance(module, cls)), None)
    if layout is None:
        return None
    groups = getattr(module, "groups", 1)
    if groups > 1:
        return layout.replace("o ", "(g o) ", 1), {"d": 1, "g": groups}
    return layout, {"d": 1}


def linear_targets(model: nn.Module, base: BaseModel, known: list[Target], config: LoTRAConfig) -> list[Target]:
    """Every matrix and convolution kernel of `model` that "all-linear" means, without the `known` tensors.

    If a KAN layer contains a weight, the target is that layer. The output layer of a transformers model is left out,
    by PEFT's rule for LoRA, and so are modules that another PEFT method or `modules_to_save` has wrapped, and layers
    and weights that the model has twice (tied weights).

    Raises:
        ValueError, TypeError: naming the layer, if its weight cannot be adapted, for example because it is quantized.
    """
    taken = {target.parameter for target in known}
    kan_layers = {target.module for target in known}
    kan_layers |= {name for name, layer in base.layers.items() if known_matrices(layer)}
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses.update(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    closed = _closed(model, config)
    targets = []
    for name, layer in base.layers.items():
        if not name or closed.intersection([*around(name), name]) or kan_layers.intersection(around(name)):
            continue
        with naming_layer(name, "KAN layer" if name in kan_layers else "linear layer"):
            specs = [s for s in _matrices(layer, name in kan_layers) if f"{name}.{s.parameter}" not in taken]
        for spec in specs:
            if uses[id(owner_of(layer, spec.parameter)[0])] <= 1 >= uses[id(tensor_at(layer, spec.parameter))]:
                targets.append(Target(name, spec))
    return targets


def _matrices(layer: nn.Module, is_kan_layer: bool) -> Iterator[CoefficientSpec]:
    """What is registered, the weight of a linear layer, and those in a KAN layer, except what another method wraps."""
    yield from known_matrices(layer)
    modules = [("", layer)]
    for path, module in modules:
        if (found := layout_of(module)) is not None:
            yield CoefficientSpec.resolve(layer, f"{path}weight", {"layout": found[0], "sizes": found[1]})
        for name, child in module.named_children() if is_kan_layer else ():
            if not isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
                modules.append((f"{path}{name}.", child))


def _closed(model: nn.Module, config: LoTRAConfig) -> set[str]:
    """The names of modules that are left out with everything inside them."""
    head = _output_layer(model, config)

    def is_closed(module: nn.Module) -> bool:
        is_other = isinstance(module, BaseTunerLayer) and not isinstance(module, LoTRALayer)
        return module is head or is_other or isinstance(module, AuxiliaryTrainingWrapper)

    return {name for name, module in model.named_modules() if is_closed(module)}


def _output_layer(model: nn.Module, config: LoTRAConfig) -> nn.Module | None:
    """The layer that PEFT leaves out for LoRA: the layer after the last hidden state, if `model` is transformers'."""
    if not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
        return next((head for head in heads if head is not None), None)
    return head
