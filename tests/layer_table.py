"""The table of layers that the tests adapt, and models of two such layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from conftest import parts
from kan import KAN as PyKAN
from kan.KANLayer import KANLayer
from kan_layers import (
    KAN,
    ChebyKAN,
    ChebyKANLayer,
    ConvKANLayer,
    EinsumKANLayer,
    FastKAN,
    FastKANLayer,
    GroupedPolyConvKANLayer,
    KANLinear,
    MatrixKANLayer,
    NaiveFourierKANLayer,
    PackedKANLayer,
    PreActivatedKANLayer,
    TupleKANLayer,
    TwoTensorKANLayer,
    UnfoldConvKANLayer,
)
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.layers.lotra import LoTRALayer, adapted_tensors

FLOATS = (torch.float64, torch.float32)
ALL_FLOATS = (*FLOATS, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """A kind of KAN layer.

    Attributes:
        layer: of n inputs and m outputs.
        coefficients: for the config, of n inputs; nothing for a registered class.
        sizes: n and m of the layer in `make`.
        lead: the sizes of a sample input before its n features.
        image: those after them.
        container: the library's own model with the widths that it is given; else layers in a Sequential.
        dtypes: those that the library itself runs in.
    """

    layer: Callable[[int, int], nn.Module]
    coefficients: Callable[[int], Mapping[str, Any]] = lambda n: {}
    sizes: tuple[int, int] = (6, 5)
    lead: tuple[int, ...] = (9,)
    image: tuple[int, ...] = ()
    container: Callable[[list[int]], nn.Module] | None = None
    dtypes: tuple[torch.dtype, ...] = ALL_FLOATS

    def make(self) -> nn.Module:
        return self.layer(*self.sizes)

    @property
    def declared(self) -> dict[str, Any]:
        """The coefficients of the layer in `make`."""
        return dict(self.coefficients(self.sizes[0]))

    def sample(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Inside the range of every basis."""
        return torch.rand(*self.lead, self.sizes[0], *self.image, dtype=dtype) * 1.6 - 0.8


def _given(description: Any, parameter: str = "weight") -> Callable[[int], Mapping[str, Any]]:
    return lambda n: {parameter: description}


LAYERS = {
    "pykan": Row(
        # pykan evaluates its splines in fp32 buffers; 16-bit inputs are not its affair.
        lambda n, m: KANLayer(in_dim=n, out_dim=m, num=4, k=3),
        container=lambda widths: PyKAN(width=widths, grid=4, k=3, auto_save=False, seed=7),
        dtypes=FLOATS,
    ),
    "efficient-kan": Row(KANLinear, container=KAN),
    "efficient-kan, no scaler": Row(
        lambda n, m: KANLinear(n, m, enable_standalone_scale_spline=False),
        lead=(3, 9),
        container=lambda widths: KAN(widths, enable_standalone_scale_spline=False),
    ),
    "fast-kan": Row(FastKANLayer, lead=(3, 9), container=FastKAN),
    "ChebyKAN": Row(lambda n, m: ChebyKANLayer(n, m, 3), container=ChebyKAN),
    "ChebyKAN, one output": Row(lambda n, m: ChebyKANLayer(n, m, 3), sizes=(6, 1)),
    "o (i d)": Row(MatrixKANLayer, _given({"layout": "o (i d)", "sizes": {"d": 4}})),
    "o (d i)": Row(
        lambda n, m: MatrixKANLayer(n, m, order="d i"),
        _given({"layout": "o (d i)", "sizes": {"d": 4}}),
        lead=(2, 9),
    ),
    **{
        order: Row(lambda n, m, order=order: EinsumKANLayer(n, m, order=order), _given(order, "coeffs"), lead=(2, 9))
        for order in ("i o d", "i d o", "o i d", "o d i", "d i o", "d o i")
    },
    "FourierKAN": Row(NaiveFourierKANLayer, _given("d1 o i d2", "fouriercoeffs")),
    "FourierKAN, i o": Row(lambda n, m: NaiveFourierKANLayer(n, m, order="i o"), _given("d1 i o d2", "fouriercoeffs")),
    "packed": Row(
        PackedKANLayer,
        lambda n: {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": f":, :{6 * n}"}},
    ),
    "two tensors": Row(
        TwoTensorKANLayer,
        lambda n: {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"},
    ),
    "tuple": Row(lambda n, m: TupleKANLayer(n, m, 3), _given("i o d", "cheby_coeffs")),
    "a scale in another order": Row(
        PreActivatedKANLayer, _given({"layout": "i o d", "scale": "gain", "scale_layout": "o i"}, "coeffs")
    ),
    "convolution": Row(
        ConvKANLayer,
        _given({"layout": "o (i d) h w", "sizes": {"d": 4}}, "spline_conv.weight"),
        sizes=(4, 5),
        lead=(2,),
        image=(7, 6),
    ),
    "convolution, groups": Row(
        lambda n, m: GroupedPolyConvKANLayer(n, m, groups=2),
        _given({"layout": "g o (d i) h w", "sizes": {"d": 4}}, "poly_weights"),
        sizes=(4, 6),
        lead=(2,),
        image=(7, 6),
    ),
    "convolution, a tensor per group": Row(
        lambda n, m: GroupedPolyConvKANLayer(n, m, groups=2, per_group=True),
        lambda n: {f"poly_weights.{g}": {"layout": "o (d i) h w", "sizes": {"d": 4}} for g in range(2)},
        sizes=(4, 6),
        lead=(2,),
        image=(7, 6),
    ),
    "convolution, unfolded": Row(
        lambda n, m: UnfoldConvKANLayer(n, m, groups=2),
        _given(
            {
                "layout": "g o (i h w) d",
                "sizes": {"h": 3, "w": 3},
                "scale": "spline_scaler",
                "scale_layout": "g o (i h w)",
            },
            "spline_weight",
        ),
        sizes=(4, 6),
        lead=(2,),
        image=(7, 6),
    ),
}
REGISTERED = [name for name, row in LAYERS.items() if not row.declared]

# Of these there are models.
MODELS = ("pykan", "efficient-kan", "efficient-kan, no scaler", "fast-kan", "ChebyKAN", "o (d i)", "FourierKAN")
INPUT = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).reshape(8, 3)[:, torch.tensor([1, 0, 2])]


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A model of two layers of a kind, from 3 inputs to 2 outputs, and an input for it."""
    row = LAYERS[name]
    model = row.container([3, 5, 2]) if row.container else nn.Sequential(row.layer(3, 5), row.layer(5, 2))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(dtype)
    return model, INPUT.to(dtype)


def config(name: str, **kwargs: Any) -> LoTRAConfig:
    """A config for the model of a kind: ranks up to (2, 2, 3) unless said otherwise."""
    if not {"r", "compression_ratio"} & set(kwargs):
        kwargs["r"] = (2, 2, 3)
    return LoTRAConfig(coefficients=dict(LAYERS[name].coefficients(3)), **kwargs)


def lotra_layers(model: nn.Module) -> dict[str, LoTRALayer]:
    """The LoTRALayers of a PEFT model by the names of their modules in the base model."""
    names = {module: name for name, module in model.named_modules()}
    return {names[layer].removeprefix("base_model.model."): layer for layer in adapted_tensors(model).values()}


def randomize(model: nn.Module, adapter: str = "default", std: float = 1.0) -> None:
    """Give an adapter a core that is not zero."""
    for layer in adapted_tensors(model, adapter).values():
        nn.init.normal_(layer.lotra_core[adapter], std=std)


def full_factors(layer, adapter="default"):
    """G, U1, U2, U3, with identities for whole modes."""
    core, *factors, _ = parts(layer.tucker(adapter))
    eyes = [torch.eye(size).to(core) for size in core.shape]
    return core, *(eye if U is None else U for U, eye in zip(factors, eyes, strict=False))
