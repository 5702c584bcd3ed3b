"""The compared ways to train one KAN layer, and to run an adapted one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from layers import Kind, OneLayer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_lotra import LoTRAConfig

FLOOR, FULL, DENSE = "frozen layer", "full fine-tuning", "dense A + Δ"
LOTRA, LOTRA_8 = "LoTRA", "LoTRA, 8 adapters"
LORA_MODULES, LORA_PARAMETERS = "LoRA, target_modules", "LoRA, target_parameters"
LORA_RANK = 8


@dataclass
class Trained:
    """A model, and Adam for its trainable parameters. x always gets a gradient, because a layer below may need it."""

    model: nn.Module

    def __post_init__(self) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trainable)
        on_cuda = any(p.is_cuda for p in trainable)  # otherwise its step counter would keep it out of CUDA graphs
        self.optimizer = torch.optim.Adam(trainable, lr=1e-5, capturable=on_cuda) if trainable else None

    def tensors(self) -> list[Tensor]:
        """All tensors that live from step to step: parameters, buffers, optimizer state."""
        state = self.optimizer.state.values() if self.optimizer else ()
        moments = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments]

    def clear(self, x: Tensor) -> None:
        x.grad = None
        if self.optimizer:
            self.optimizer.zero_grad()

    def forward_backward(self, x: Tensor, gradient: Tensor, autocast: bool = False) -> None:
        self.clear(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = self.model(x)
        y.backward(gradient.to(y.dtype))

    def update(self) -> None:
        if self.optimizer:
            self.optimizer.step()


def captured(stages: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """The stages of a training step as CUDA graphs, to be replayed in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # tensors that are made at first use must exist before capturing
        for stage in 3 * stages:
            stage()
    torch.cuda.current_stream().wait_stream(stream)
    replays: list[Callable[[], object]] = []
    pool = torch.cuda.graph_pool_handle()
    for stage in stages:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            stage()
        replays.append(graph.replay)
    return replays


def owner_of_coefficients(layer: nn.Module, kind: Kind) -> tuple[nn.Module, str]:
    """The module that has the coefficient parameter, and the parameter's name there."""
    path, _, name = kind.parameter.rpartition(".")
    return layer.get_submodule(path), name


def with_lotra(
    layer: nn.Module, kind: Kind, adapters: int = 1, init_weights: bool = False, **ranks: object
) -> PeftModel:
    """`layer` with LoTRA adapters, all active. Their cores are random, so that zeros save no time."""
    config = LoTRAConfig(coefficients=dict(kind.coefficients(layer)), init_weights=init_weights, alpha=0.1, **ranks)
    model = get_peft_model(OneLayer(layer), config, adapter_name="0")
    for number in range(1, adapters):
        model.add_adapter(str(number), config)
    model.base_model.set_adapter([str(number) for number in range(adapters)])
    return model


class _DenseUpdate(nn.Module):
    """A ↦ A + G ×₁ U1 ×₂ U2 ×₃ U3, formed at every step: the simplest adapter."""

    def __init__(self, axes: str, coefficients: Tensor, sizes: tuple[int, int, int], r: tuple[int, int, int]) -> None:
        super().__init__()
        self.axes = axes
        self.core = nn.Parameter(torch.randn(r, device=coefficients.device))
        self.factors = nn.ParameterList(
            torch.randn(n, k, device=coefficients.device) / n**0.5 for n, k in zip(sizes, r, strict=True)
        )

    def forward(self, coefficients: Tensor) -> Tensor:
        U1, U2, U3 = self.factors
        thin = torch.einsum("abc,ia,dc->ibd", self.core, U1, U3)
        return coefficients + torch.einsum(f"ibd,ob->{self.axes}", thin, U2).reshape(coefficients.shape)


def training_methods(
    layer: nn.Module, kind: Kind, sizes: tuple[int, int, int], r: tuple[int, int, int]
) -> dict[str, Trained | str]:
    """The methods by name, in the order of the table; a message where PEFT refuses the layer. `layer` gets frozen."""
    methods: dict[str, Trained | str] = {FULL: Trained(OneLayer(copy.deepcopy(layer)))}
    layer.requires_grad_(False)
    methods = {FLOOR: Trained(OneLayer(layer)), **methods}

    dense = _sharing(layer)
    owner, name = owner_of_coefficients(dense, kind)
    update = _DenseUpdate(kind.axes, getattr(owner, name), sizes, r)
    parametrize.register_parametrization(owner, name, update)
    methods[DENSE] = Trained(OneLayer(dense))
    methods[LOTRA] = Trained(with_lotra(_sharing(layer), kind, r=r))
    methods[LOTRA_8] = Trained(with_lotra(_sharing(layer), kind, adapters=8, r=r))
    if kind.lora_target is not None:
        methods[LORA_MODULES] = _lora(layer, target_modules=[kind.lora_target])
    methods[LORA_PARAMETERS] = _lora(layer, target_modules=[], target_parameters=[kind.parameter])
    return methods


def inference_methods(layer: nn.Module, kind: Kind, r: tuple[int, int, int]) -> dict[str, nn.Module]:
    """The base layer, and the adapted layer in its three states."""
    models = {name: with_lotra(_sharing(layer), kind, r=r) for name in ("disabled", "unmerged")}
    models["disabled"].base_model.disable_adapter_layers()
    models["merged"] = with_lotra(copy.deepcopy(layer), kind, r=r)  # merging writes to the base
    models["merged"].merge_adapter()
    return {"base": OneLayer(layer), **models}


def lotra_and_floor(layer: nn.Module, kind: Kind, r: tuple[int, int, int], adapters: int) -> dict[str, Trained]:
    layer.requires_grad_(False)
    return {FLOOR: Trained(OneLayer(layer)), LOTRA: Trained(with_lotra(_sharing(layer), kind, adapters, r=r))}


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of `layer` that holds the same parameters, which no method changes."""
    return copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})


def _lora(layer: nn.Module, **targets: object) -> Trained | str:
    try:
        return Trained(get_peft_model(OneLayer(_sharing(layer)), LoraConfig(r=LORA_RANK, **targets)))
    except (ValueError, TypeError) as error:
        return str(error).splitlines()[0]
