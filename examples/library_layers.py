"""The layers and models of KAN libraries that kan_libraries.py tries, each with a way to build it and a sample."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # where the layers of ours are


@dataclass(frozen=True)
class Entry:
    """One layer: where it is from, how it is built, and the shape of its sample.

    Attributes:
        library: the name on PyPI; else of the library whose layer the one of ours stands for, with "(git)".
        name: the qualified name of the class; of ours, the module of the tests and the class.
        args, options: what the class is called with.
        sample: the shape of a sample in [-0.9, 0.9], or a function that makes one.
        label: the class as the table has it.
    """

    library: str
    name: str
    args: tuple = (3, 4)
    sample: tuple[int, ...] | Callable[[], torch.Tensor] = (9, 3)
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def title(self) -> str:
        cls = self.name.rpartition(".")[2]
        return self.label or (f"ours: `{cls}`" if "(git)" in self.library else f"`{cls}`")

    def build(self) -> nn.Module:
        module, _, cls = self.name.rpartition(".")
        return getattr(importlib.import_module(module), cls)(*self.args, **self.options)

    def make_sample(self) -> torch.Tensor:
        return self.sample() if callable(self.sample) else torch.rand(self.sample) * 1.8 - 0.9

    def version(self) -> str:
        return "" if "(git)" in self.library else version(self.library)


def complex_sample() -> torch.Tensor:
    return torch.randn(9, 3, dtype=torch.complex64)


IMAGE, BOTTLENECK = (2, 4, 6, 6), {"groups": 2, "inner": 2}
KANDITIONED = {"init": "random_normal", "num_control_points": 8}
ENTRIES = [
    Entry("pykan", "kan.KANLayer.KANLayer"),
    Entry("microkan", "microkan.KANLayer.KANLayer"),
    Entry("seqkan", "seqkan.kan.KANLayer.KANLayer"),
    Entry("yms-kan", "yms_kan.KANLayer.KANLayer"),
    Entry("kan-gpt", "kan_gpt.kan.KANLayer.KANLayer"),
    Entry("kan-gpt", "kan_gpt.efficient_kan.model.KANLinear"),
    Entry("visionkan", "VisionKAN.ekan.KANLinear"),
    Entry("visionkan", "VisionKAN.fasterkan.FasterKANLayer"),
    Entry("qkan", "qkan.kan.KANLinear"),
    Entry("qkan", "qkan.fourier_kan.FourierKANLinear"),
    Entry("qkan", "qkan.qkan.QKANLayer"),
    Entry("convkan3d", "ConvKAN3D.efficient_kan.KANLinear"),
    Entry("convkan3d", "ConvKAN3D.ConvKAN3D.effConvKAN3D", (2, 3, 2), (2, 2, 3, 4, 3)),
    Entry("convkan", "convkan.convkan_layer.ConvKAN", (4, 6), IMAGE, {"padding": 1}),
    Entry("inkan", "inkan.layer.KANLayer", options={"compile_basis": False}),
    Entry("inkan", "inkan.layer.KANLayer", (2, 4), (9, 2), {"compile_basis": False, "dim": 2}, "`KANLayer`, `dim=2`"),
    Entry("flashkan", "flashkan.layer.KANLayer"),
    Entry("kolmarn", "kan.layers.KANLayer"),
    Entry("kan-mlp-hybrid", "kan_mlp_hybrid.layers.kan_layer.SimpleKANLayer"),
    Entry("kan-mlp-hybrid", "kan_mlp_hybrid.layers.pph_layer.PPHLayer"),
    Entry("kan-mlp-hybrid", "kan_mlp_hybrid.layers.la_linear.LALinear"),
    Entry("kan-mlp-hybrid", "kan_mlp_hybrid.layers.moe_layer.MoEKANMLPLayer", sample=(64, 3)),
    Entry("deep-kan", "deepkan.deepkan.SplineLinearLayer"),
    Entry("deep-kan", "deepkan.deepkan.ChebyshevKANLayer", (3, 4, 3)),
    Entry("deep-kan", "deepkan.deepkan.RBFKANLayer"),
    Entry("mlp-kan", "mlp_kan.kan_layer.KANInterpoLayer"),
    Entry("mlp-kan", "mlp_kan.kan_layer.KANLayer"),
    *[
        Entry("ikan", f"ikan.{name}.{name}Linear")
        for name in ("KAN", "ChebyKAN", "FourierKAN", "JacobiKAN", "TaylorKAN", "WaveletKAN")
    ],
    Entry("ikan", "ikan.GroupKAN.GroupKANLinear", (8, 4), (9, 8)),
    Entry("timekan", "timekan.layers.spline.Spline"),
    Entry("timekan", "timekan.layers.relu.ReLU"),
    Entry("timekan", "timekan.layers.chebyshev.Chebyshev"),
    Entry("timekan", "timekan.layers.fourier.Fourier", options={"gridsize": 5}),
    Entry("cvkan", "cvkan.models.CVKAN.CVKANLayer", (3, 4, 4), complex_sample, {"use_norm": None}),
    Entry("cvkan", "cvkan.models.FastKAN.FastKANLayer"),
    Entry("tabkan", "tabkan.chebyshev.model.ChebyKANLayer", (3, 4, 3)),
    Entry("tabkan", "tabkan.fourier.layer.NaiveFourierKANLayer", (3, 4, 5)),
    *[
        Entry(
            "kanditioned",
            "KANditioned.kan_layer.KANLayer",
            options=KANDITIONED | options,
            label=f"`KANLayer`, `{label}`",
        )
        for label, options in {
            "B-spline": {"impl": "embedding"},
            "embedding_bag": {"impl": "embedding_bag"},
            "sparse_matmul_csr": {},
            "parallel_scan": {"impl": "embedding", "variant": "parallel_scan"},
        }.items()
    ],
    Entry("kanrbfpoly", "kanrbfpoly.model.RBFKANLayer", (3, 4, 5)),
    Entry("torch-wavelet-kan", "torch_wavelet_kan.layer.WaveletKANLayer"),
    Entry("unikan", "unikan.skan.SKANLinear_pure"),
    Entry("unikan", "unikan.universal_KAN.UniversalKANNode"),
    Entry("single-kan", "skan.skans.SKANLinear"),
    Entry("rkan", "rkan.torch.PadeRKAN", (3, 3)),
    Entry("rkan", "rkan.torch.JacobiRKAN", (3,)),
    Entry("fkan", "fkan.torch.FractionalJacobiNeuralBlock", (3,)),
    # of libraries that PyPI does not have: small layers of ours
    Entry("efficient-kan (git)", "kan_layers.KANLinear"),
    Entry("fast-kan (git)", "kan_layers.FastKANLayer"),
    Entry("ChebyKAN (git)", "kan_layers.ChebyKANLayer", (3, 4, 3)),
    Entry("JacobiKAN, GottliebKAN, OrthogPolyKANs (git)", "kan_layers.EinsumKANLayer", options={"order": "i o d"}),
    Entry("BSRBF_KAN (git)", "kan_layers.MatrixKANLayer"),
    Entry("FourierKAN (git)", "kan_layers.NaiveFourierKANLayer"),
    Entry("ReLU-KAN (git)", "odd_layers.ReLUKANLayer", (4, 5), (9, 4)),
    Entry("FC_KAN (git), two bases", "odd_layers.TwoBasesKANLayer"),
    Entry("FC_KAN (git), one weight", "odd_layers.StackedKANLayer", sample=(2, 9, 3)),
    Entry("torch-conv-kan (git), KAN", "kan_layers.ConvKANLayer", (4, 6), IMAGE),
    Entry("torch-conv-kan (git), FastKAN in groups", "odd_layers.GroupedFastConvLayer", (4, 6), IMAGE),
    Entry("torch-conv-kan (git), KACN", "kan_layers.GroupedPolyConvKANLayer", (4, 6), IMAGE, {"per_group": True}),
    Entry("torch-conv-kan (git), KALN in groups", "odd_layers.GroupNormalizedConvLayer", (4, 6), IMAGE),
    Entry("torch-conv-kan (git), KAGN", "odd_layers.GramConvLayer", (4, 6), IMAGE),
    Entry("torch-conv-kan (git), KAGN, depthwise", "odd_layers.GramConvLayer", (4, 8), IMAGE, {"groups": 4}),
    Entry(
        "torch-conv-kan (git), KAGN bottleneck", "odd_layers.GramConvLayer", (4, 6), IMAGE, {"groups": 2, "inner": 2}
    ),
    Entry("torch-conv-kan (git), KABN", "odd_layers.BernsteinConvLayer", (4, 6), IMAGE),
    Entry("Wav-KAN (git)", "kan_layers.WaveletKANLayer", options={"initial": True}),
    Entry("rational-kat (git)", "kan_layers.RationalActivationLayer", (4, 4), (9, 4)),
]


# The larger models ---------------------------------------------------------------------------------------------------


def kan_gpt() -> tuple[nn.Module, torch.Tensor]:
    gpt = importlib.import_module("kan_gpt.model").GPT
    config = gpt.get_default_config()
    config.model_type, config.vocab_size, config.block_size = "gpt-mini", 5000, 128
    return gpt(config), torch.randint(5000, (1, 32))


def vision_kan() -> tuple[nn.Module, torch.Tensor]:
    make = importlib.import_module("VisionKAN.models_kan").create_model
    return make("deit_base_patch16_224_KAN"), torch.randn(1, 3, 224, 224)


def residual_kagn() -> tuple[nn.Module, torch.Tensor]:
    return importlib.import_module("kan_models").ResKAGNet(), torch.randn(1, 3, 64, 64)


def vgg_kagn() -> tuple[nn.Module, torch.Tensor]:
    return importlib.import_module("kan_models").VGGKAGN(), torch.randn(1, 3, 64, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "kan_gpt 1.2.0, `gpt-mini`: 6 blocks of width 192, 5000 tokens": kan_gpt,
    "visionkan 0.0.7, `deit_base_patch16_224_KAN`: 12 blocks of width 768": vision_kan,
    "ResKAGNet-18 as in torch-conv-kan (git), ours: widths 64 to 512": residual_kagn,
    "VGG11-KAGN as in torch-conv-kan (git), ours: widths 16 to 128": vgg_kagn,
}
