"""Try the KAN layers of all libraries that can be imported, and write the table of kan_libraries.md.

    pip install -e ".[test-libraries]" && pip install --no-deps -r tests/libraries.txt
    python examples/kan_libraries.py

Each layer runs alone on a random sample. A registered layout is verified, any other layer is inferred, and what is found
is adapted: the adapter has to change the layer's output, and merging it has to leave that as it is. The layers of
libraries that PyPI does not have are small ones of ours with the same use of their coefficients, from the tests. The row
of a layer that is not installed stays as it is. To add a layer, add an `Entry`.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from command_line import new_parser
from peft import get_peft_model
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig, PerformanceWarning, infer_coefficients, verify_coefficients
from peft_lotra.coefficients import known_coefficients
from peft_lotra.layer import first_tensor
from peft_lotra.testing import forget_warnings

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))
START, END = "<!-- python examples/kan_libraries.py -->", "<!-- end -->"
WRONG = "; NOT adapted right: "
HEAD = ["| library, version | class | coefficients | how | passes |", "|---|---|---|---|---|"]


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


IMAGE, KANDITIONED = (2, 4, 6, 6), {"init": "random_normal", "num_control_points": 8}
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


def row(entry: Entry) -> list[str]:
    """The cells of the entry's row.

    Raises:
        ImportError, PackageNotFoundError: if its library is not installed, or another one has the module.
    """
    library = f"{entry.library} {entry.version()}".rstrip()
    torch.manual_seed(0)
    base = nn.Sequential(entry.build()).eval()
    x = entry.make_sample()
    registered = bool(known_coefficients(base[0]))
    try:
        found = verify_coefficients(base, x) if registered else infer_coefficients(base, x)
    except ValueError as error:
        return [library, entry.title, "–", reasons(str(error)), "–"]
    how = ("registered" if registered else "inferred") + adapted(base, x, found)
    tensors = ", ".join(described(name, entry) for name, entry in found.items())
    return [library, entry.title, tensors, how, f"{found.forwards} / {found.backwards}"]


def adapted(base: nn.Module, x: torch.Tensor, found: dict[str, Any]) -> str:
    """What there is to say of the adapted layer: nothing, that it is dense, or what is wrong with it."""
    forget_warnings()
    with warnings.catch_warnings(record=True) as noted, torch.no_grad():
        warnings.simplefilter("always")
        config = LoTRAConfig(r=1, init_weights=False, coefficients=found)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        plain, y = (first_tensor(m(x)) for m in (base, model))
        merged = first_tensor(model.merge_and_unload()(x))
    if (y - plain).abs().max() < 1e-4 * plain.abs().max():
        return WRONG + "the adapter has no effect"
    if (y - merged).abs().max() > 1e-4 * y.abs().max():
        return WRONG + "merging changes the output"
    return ", dense" if any(issubclass(w.category, PerformanceWarning) for w in noted) else ""


def described(name: str, entry: dict[str, Any]) -> str:
    path = name.removeprefix("0.")
    part = f"[{entry['slice']}]" if entry.get("slice") else ""
    scale = f" × `{entry['scale']}`" if entry.get("scale") else ""
    return f"`{path}{part}`{scale}: `{entry['layout']}`"


def reasons(text: str) -> str:
    """Why each parameter is left out; biases and other vectors only if there is nothing else."""
    found = re.findall(r"^ {4}(.*): left out, (.*)$", text, re.MULTILINE)
    telling = [
        (paths, reason) for paths, reason in found if "vector" not in reason and "fewer than four" not in reason
    ]
    if not found:
        return f"does not run: {text.rpartition('device: ')[2]}"
    return "refused: " + "; ".join(f"`{paths}`: {reason}" for paths, reason in telling or found)


def key(cells: list[str]) -> tuple[str, str]:
    """What a row is known by: library, without the version, and class."""
    return re.sub(r" [0-9][^ ]*$", "", cells[0]), cells[1]


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries do on import is undone: they change the folder, print, and choose windows for their pictures."""
    folder, use = Path.cwd(), matplotlib.use
    try:
        matplotlib.use = lambda *_, **__: None
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        matplotlib.use = use
        os.chdir(folder)


def table(entries: list[Entry], before: dict[tuple[str, str], list[str]]) -> tuple[list[list[str]], list[str]]:
    """The rows of the entries, and what was not tried, with the reason; that keeps its row from `before`."""
    rows, left = [], []
    for entry in entries:
        try:
            with quiet():
                rows.append(row(entry))
        except (ImportError, PackageNotFoundError) as error:
            left.append(f"{entry.library}, {entry.title}: {type(error).__name__}: {error}")
            kept = before.get((entry.library, entry.title))
            rows += [kept] if kept else []
        except Exception as error:  # of the library
            text = str(error).splitlines()[0]
            name = f"{entry.library} {entry.version()}".rstrip()
            rows.append([name, entry.title, "–", f"does not run: {type(error).__name__}: {text}", "–"])
    return rows, left


def read(text: str) -> dict[tuple[str, str], list[str]]:
    """The rows of the page."""
    lines = text.partition(START)[2].partition(END)[0].strip().splitlines()[len(HEAD) :]
    rows = [re.split(r" \| ", line.strip("| ")) for line in lines]
    return {key(cells): cells for cells in rows}


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--page", type=Path, default=HERE / "kan_libraries.md", help="the page with the table")
    parser.add_argument("--only", metavar="NAME", help="libraries whose names have this in them")
    args = parser.parse_args()
    text = args.page.read_text()
    before = read(text)
    entries = [entry for entry in ENTRIES if args.only is None or args.only in entry.library]
    rows, left = table(entries, before)
    fresh = {key(cells): cells for cells in rows}
    order = [(entry.library, entry.title) for entry in ENTRIES]
    everything = [fresh.get(name) or before[name] for name in order if name in fresh or name in before]
    lines = [*HEAD, *(f"| {' | '.join(cells)} |" for cells in everything)]
    for cells in rows:
        print(" | ".join(cells))
    start, end = text.index(START) + len(START), text.index(END)
    written = f"{text[:start]}\n" + "\n".join(lines) + f"\n{text[end:]}"
    write_atomically(args.page, lambda path: path.write_text(written))
    print("\nNot tried, rows kept as they were:", *(left or ["none"]), sep="\n    ")
    wrong = [cells for cells in rows if WRONG in cells[3]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
