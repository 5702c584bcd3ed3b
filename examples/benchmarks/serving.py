"""The cost of serving adapters: loading an adapter, and a batch in which every sample has its own adapter.

    python examples/benchmarks/serving.py
    python examples/benchmarks/serving.py --parts loading --layers 200 --rounds 3

Loading: the time of `PeftModel.from_pretrained` for an adapter of a model of many KAN layers, relative to PEFT's LoRA
for as many linear layers. Mixed batch: the time of `model(x, adapter_names=[...])` relative to one adapter for all
samples, and the largest difference from running the samples one by one, relative to the largest output. The command
prints medians of ratios, and writes times as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKANLayer
from command_line import check_device, exit_code, make_output_dir, new_parser, positive_int
from layers import KINDS, OneLayer
from measuring import clock, interleaved, median_ratio
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig

SIZE = 16  # inputs and outputs of the layers of the deep models


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of PeftModel.from_pretrained onto a fresh model of `args.layers` layers."""
    kinds: dict[str, tuple[type, PeftConfig]] = {
        "LoRA": (lambda: nn.Linear(SIZE, SIZE), LoraConfig(r=4, target_modules=r"\d+")),
        "LoTRA": (lambda: ChebyshevKANLayer(SIZE, SIZE, 3), LoTRAConfig(r=4, coefficients={"coefficients": "i o d"})),
    }
    with tempfile.TemporaryDirectory() as folder:

        def model(name: str) -> nn.Module:
            torch.manual_seed(0)  # another base would be told from the adapter's own
            return nn.Sequential(*(kinds[name][0]() for _ in range(args.layers))).to(args.device)

        def load(name: str) -> list[float]:
            fresh = model(name)
            return clock(torch.device(args.device), lambda: PeftModel.from_pretrained(fresh, f"{folder}/{name}"))

        for name, (_, config) in kinds.items():
            get_peft_model(model(name), config).save_pretrained(f"{folder}/{name}")
        runs = interleaved({name: lambda name=name: load(name) for name in kinds}, args.rounds)
    seconds = {name: [first for (first,) in rounds] for name, rounds in runs.items()}
    ratio = median_ratio(seconds["LoTRA"], seconds["LoRA"])
    print(f"Loading an adapter of {args.layers} layers: {ratio:.2f} × the time of LoRA")
    return {"seconds": seconds, "ratio": ratio}


@torch.no_grad()
def mixed_batch(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The seconds of a forward pass in which `args.adapters` adapters share the batch."""
    torch.manual_seed(0)
    layer = KINDS[kind].build(args.width, args.width, 8)
    config = LoTRAConfig(
        coefficients=dict(KINDS[kind].coefficients(layer)), r=(8, 8, 4), init_weights=False, alpha=0.1
    )
    names = [f"adapter{k}" for k in range(args.adapters)]
    model = get_peft_model(OneLayer(layer), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.to(args.device).eval()
    x = torch.randn(args.batch, args.width, device=args.device)
    owners = [names[k % len(names)] for k in range(args.batch)]
    runs = {"one adapter": lambda: model(x), "mixed": lambda: model(x, adapter_names=owners)}
    together = runs["mixed"]()
    largest = together.abs().max()
    device = torch.device(args.device)
    times = interleaved({name: lambda run=run: clock(device, run) for name, run in runs.items()}, args.rounds)
    seconds = {name: [first for (first,) in rounds] for name, rounds in times.items()}
    for k, owner in enumerate(owners):
        model.set_adapter(owner)
        together[k] -= model(x[k : k + 1])[0]
    ratio, difference = median_ratio(seconds["mixed"], seconds["one adapter"]), (together.abs().max() / largest).item()
    print(
        f"{kind}, {args.batch} samples of {args.adapters} adapters: {ratio:.2f} × one adapter, "
        f"largest difference from one by one {difference:.1e}"
    )
    return {"seconds": seconds, "ratio": ratio, "difference": difference}


def run(args: argparse.Namespace) -> None:
    record: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}}
    if "loading" in args.parts:
        record["loading"] = loading(args)
    if "mixed" in args.parts:
        record["mixed"] = {kind: mixed_batch(args, kind) for kind in ("efficient", "fastkan", "chebyshev")}
    path = args.output_dir / "serving.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"Written: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=("loading", "mixed"), default=("loading", "mixed"), help="what is measured")
    add("--layers", type=positive_int, default=1000, help="of the model whose adapter is loaded")
    add("--adapters", type=positive_int, default=8, help="in a mixed batch")
    add("--batch", type=positive_int, default=64, help="samples of a mixed batch")
    add("--width", type=positive_int, default=512, help="n = m of the layer in a mixed batch")
    add("--rounds", type=positive_int, default=7, help="timed rounds, in each of which everything runs once")
    add("--output-dir", type=Path, default=Path("outputs/serving"), help="where the times are written")
    add("--device", default="cpu", help="torch device")
    args = parser.parse_args(argv)
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
