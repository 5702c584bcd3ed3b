"""The cost of serving adapters: loading an adapter, a batch in which every sample has its own adapter, and growth.

    python examples/benchmarks/serving.py
    python examples/benchmarks/serving.py --parts loading --layers 200 --rounds 3
    python examples/benchmarks/serving.py --parts growth

Loading: the time of `PeftModel.from_pretrained` for an adapter of a model of many KAN layers, relative to PEFT's LoRA
for as many linear layers. Mixed batch: the time of `model(x, adapter_names=[...])` relative to one adapter for all
samples, and the largest difference from running the samples one by one, relative to the largest output. The command
prints medians of ratios, and writes times as JSON.

Growth is four tables. Held adapters: what a hot swap, loading and adding an adapter cost in a model of four layers
that holds few or many, beside PEFT's LoRA. Depth: the time of `get_peft_model` and `add_adapter` by the number of
layers, with the exponent p of time ≈ c · layersᵖ between the smallest and the largest. Mixed batches: a pass with
several adapters of equal ranks, relative to a pass of the same layer with one adapter merged, at `--growth-width`.
Memory: by how much the resident memory of the process grows for each adapter of four layers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKANLayer
from command_line import check_device, exit_code, make_output_dir, new_parser, positive_int
from layers import KINDS, OneLayer
from measuring import clock, fitted_exponent, interleaved, median_ratio
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as hotswap_lora
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig, hotswap_adapter

SIZE = 16  # inputs and outputs of the layers of the deep models
METHODS: dict[str, tuple[Callable[[], nn.Module], PeftConfig]] = {
    "LoRA": (lambda: nn.Linear(SIZE, SIZE), LoraConfig(r=4, target_modules=r"\d+")),
    "LoTRA": (lambda: ChebyshevKANLayer(SIZE, SIZE, 3), LoTRAConfig(r=4, coefficients={"coefficients": "i o d"})),
}


def deep(method: str, layers: int, device: str) -> nn.Module:
    """A model of this many layers, the same in each call: another base would be told from the adapter's own."""
    torch.manual_seed(0)
    return nn.Sequential(*(METHODS[method][0]() for _ in range(layers))).to(device)


def holding(method: str, layers: int, adapters: int, device: str) -> PeftModel:
    """The model with this many adapters."""
    model = get_peft_model(deep(method, layers, device), copy.deepcopy(METHODS[method][1]))
    for k in range(1, adapters):
        model.add_adapter(f"adapter{k}", copy.deepcopy(METHODS[method][1]))
    return model


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of PeftModel.from_pretrained onto a fresh model of `args.layers` layers."""
    with tempfile.TemporaryDirectory() as folder:

        def load(name: str) -> list[float]:
            fresh = deep(name, args.layers, args.device)
            return clock(torch.device(args.device), lambda: PeftModel.from_pretrained(fresh, f"{folder}/{name}"))

        for name in METHODS:
            holding(name, args.layers, 1, args.device).save_pretrained(f"{folder}/{name}")
        runs = interleaved({name: lambda name=name: load(name) for name in METHODS}, args.rounds)
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


def held_adapters(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of a hot swap, of loading and of adding, by method and by the number of held adapters."""
    device, swaps = torch.device(args.device), {"LoRA": hotswap_lora, "LoTRA": hotswap_adapter}
    with tempfile.TemporaryDirectory() as folder:
        models = {(name, count): holding(name, 4, count, args.device) for name in METHODS for count in args.held}
        for name in METHODS:
            models[name, args.held[0]].save_pretrained(f"{folder}/{name}", selected_adapters=["default"])

        def changes(name: str, count: int) -> list[float]:
            model, found = models[name, count], []
            for change in (
                lambda: swaps[name](model, f"{folder}/{name}", "default"),
                lambda: model.load_adapter(f"{folder}/{name}", "loaded"),
                lambda: model.add_adapter("added", copy.deepcopy(METHODS[name][1])),
            ):
                gc.collect()
                found += clock(device, change)
            for new in ("loaded", "added"):
                model.delete_adapter(new)
            return found

        runs = interleaved({key: lambda key=key: changes(*key) for key in models}, args.rounds)
    found: dict[str, Any] = {}
    for column, what in enumerate(("hot swap", "load_adapter", "add_adapter")):
        for name in METHODS:
            seconds = [[first[column] for first in runs[name, count]] for count in args.held]
            growth = median_ratio(seconds[-1], seconds[0])
            times = ", ".join(f"{1e3 * statistics.median(own):.1f}" for own in seconds)
            print(f"{what} with {args.held} adapters held, {name}: {times} ms, {growth:.2f} × from first to last")
            found[f"{what}, {name}"] = {"seconds": seconds, "growth": growth}
    return found


def depth(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of get_peft_model and add_adapter, by method and by the number of layers."""

    def adapt(name: str, layers: int) -> list[float]:
        base, config, device = deep(name, layers, args.device), METHODS[name][1], torch.device(args.device)
        gc.collect()
        model: list[PeftModel] = []
        first = clock(device, lambda: model.append(get_peft_model(base, copy.deepcopy(config))))
        gc.collect()
        return [*first, *clock(device, lambda: model[0].add_adapter("second", copy.deepcopy(config)))]

    keys = [(name, layers) for name in METHODS for layers in args.depths]
    runs = interleaved({key: lambda key=key: adapt(*key) for key in keys}, args.rounds)
    found: dict[str, Any] = {}
    for column, what in enumerate(("get_peft_model", "add_adapter")):
        for name in METHODS:
            seconds = [[first[column] for first in runs[name, layers]] for layers in args.depths]
            medians = [statistics.median(own) for own in seconds]
            exponent = fitted_exponent([args.depths[0], args.depths[-1]], [medians[0], medians[-1]])
            times = ", ".join(f"{1e3 * median:.0f}" for median in medians)
            print(f"{what} of {args.depths} layers, {name}: {times} ms, exponent {exponent:.2f}")
            found[f"{what}, {name}"] = {"seconds": seconds, "exponent": exponent}
    return found


@torch.no_grad()
def many_adapters(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The seconds of a pass with several adapters, and of a pass with one that is merged."""
    torch.manual_seed(0)
    layer = KINDS[kind].build(args.growth_width, args.growth_width, 8)
    config = LoTRAConfig(coefficients=dict(KINDS[kind].coefficients(layer)), r=(8, 8, 4), init_weights=False)
    model = get_peft_model(OneLayer(layer), copy.deepcopy(config), adapter_name="adapter0")
    for k in range(1, max(args.together)):
        model.add_adapter(f"adapter{k}", copy.deepcopy(config))
    model.to(args.device).eval()
    merged, x = copy.deepcopy(model), torch.randn(args.batch, args.growth_width, device=args.device)
    merged.merge_adapter()
    runs: dict[Any, Callable[[], object]] = {"merged": lambda: merged(x), "one, not merged": lambda: model(x)}
    for count in args.together:
        owners = [f"adapter{k % count}" for k in range(args.batch)]
        runs[count] = lambda owners=owners: model(x, adapter_names=owners)
    device = torch.device(args.device)
    times = interleaved({name: lambda run=run: clock(device, *[run] * 10) for name, run in runs.items()}, args.rounds)
    seconds = {name: [ends[-1] / 10 for ends in rounds] for name, rounds in times.items()}
    ratios = {name: median_ratio(own, seconds["merged"]) for name, own in seconds.items()}
    told = ", ".join(f"{name}: {ratio:.2f} ×" for name, ratio in ratios.items() if name != "merged")
    print(f"{kind}, {args.batch} samples at width {args.growth_width}, to a merged pass, by adapters: {told}")
    return {
        "seconds": {str(name): own for name, own in seconds.items()},
        "ratios": {str(k): v for k, v in ratios.items()},
    }


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of resident memory for each adapter of four layers; those of LoRA from a tenth as many."""
    found = {}
    for name, count in (("LoRA", args.count // 10), ("LoTRA", args.count)):
        model = holding(name, 4, 10, args.device)
        gc.collect()
        before = resident()
        for k in range(count):
            model.add_adapter(f"more{k}", copy.deepcopy(METHODS[name][1]))
        gc.collect()
        found[name] = (resident() - before) / max(count, 1)
        print(f"Memory of each of {count} adapters of 4 layers, {name}: {found[name] / 1e3:.1f} kB")
    return found


def resident() -> int:
    """The bytes of memory that the process has now, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(args: argparse.Namespace) -> None:
    record: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}}
    if "loading" in args.parts:
        record["loading"] = loading(args)
    if "mixed" in args.parts:
        record["mixed"] = {kind: mixed_batch(args, kind) for kind in ("efficient", "fastkan", "chebyshev")}
    if "growth" in args.parts:
        record["memory"] = memory(args)  # first, while the process has freed little
        record["held"] = held_adapters(args)
        record["depth"] = depth(args)
        record["together"] = {kind: many_adapters(args, kind) for kind in ("efficient", "fastkan", "chebyshev")}
    path = args.output_dir / "serving.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"Written: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    parts = ("loading", "mixed", "growth")
    add("--parts", nargs="+", choices=parts, default=("loading", "mixed"), help="what is measured")
    add("--layers", type=positive_int, default=1000, help="of the model whose adapter is loaded")
    add("--adapters", type=positive_int, default=8, help="in a mixed batch")
    add("--batch", type=positive_int, default=64, help="samples of a mixed batch")
    add("--width", type=positive_int, default=512, help="n = m of the layer in a mixed batch")
    add("--held", nargs="+", type=positive_int, default=(10, 300), help="numbers of held adapters (growth)")
    add("--depths", nargs="+", type=positive_int, default=(96, 192, 384), help="numbers of layers (growth)")
    add("--together", nargs="+", type=positive_int, default=(1, 16, 48), help="adapters in one batch (growth)")
    add("--growth-width", type=positive_int, default=32, help="n = m of the layer in the batches of growth")
    add("--count", type=positive_int, default=1000, help="adapters whose memory is measured (growth)")
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
