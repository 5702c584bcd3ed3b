"""The cost of a training step of an adapted KAN convolution, with the kernel's positions whole or with a rank.

    python examples/benchmarks/convolutions.py
    python examples/benchmarks/convolutions.py --channels 64 --kernels 3 --rounds 3

The layer is y = conv(T(tanh x)) with T_0 … T_7 for each channel. The adapters have a tenth of its coefficients: equal
ranks with the positions whole; a third of the positions as a fourth rank; the basis whole; LoRA's shape; and PEFT's
LoRA on the same convolution. FLOPs and bytes saved for the backward pass are counted. Times are medians of ratios to a
step that trains every coefficient. The command writes convolutions.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from command_line import benchmark_arguments, exit_code
from layers import ConvKANLayer
from measuring import clock, count_flops, interleaved, median_ratio, saved_bytes
from peft import LoraConfig, get_peft_model
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.tucker.decomposition import Ranks, parameter_count
from peft_lotra.tucker.ranks import clipped, equal_ranks, ranks_for_budget

BASIS, TENTH, BATCH, SIZE = 8, 0.1, 8, 12
FULL, LORA = "every coefficient", "PEFT's LoRA"
TITLES = {"equal": "positions whole", "positions": "a third of them", "basis": "basis whole", "lora": "LoRA's shape"}


def _basis(shape: Sequence[int], r: int) -> Ranks:
    """The basis whole, one rank for inputs and outputs, which are whole where that takes no more numbers."""
    return _least(shape, r, "d")


def _lora(shape: Sequence[int], r: int) -> Ranks:
    """Inputs and basis whole: LoRA of the flattened coefficients."""
    return _least(shape, r, "id")


def _least(shape: Sequence[int], r: int, whole: str) -> Ranks:
    """Rank r in the modes that are not `whole`, but those whole too where that takes no more numbers."""
    choices = [clipped(tuple([None if mode in whole else r for mode in "iod"]), shape)]
    for ranks in choices:
        for mode in range(3):
            if ranks[mode] is not None:
                choices.append((*ranks[:mode], None, *ranks[mode + 1 :]))
    return min(reversed(choices), key=lambda ranks: parameter_count(shape, ranks))


def _positions(shape: Sequence[int], r: int) -> Ranks:
    """Equal ranks, and of a kernel's positions a third."""
    ranks = equal_ranks(shape, r)
    return (*ranks, max(1, math.prod(shape[3:]) // 3)) if len(shape) > 3 else ranks


RULES: dict[str, Callable[[Sequence[int], int], Ranks]] = {
    "equal": equal_ranks,
    "basis": _basis,
    "lora": _lora,
    "positions": _positions,
}


def models(channels: int, kernel: int, device: torch.device) -> dict[str, nn.Module]:
    """The layer with each adapter, by the adapter's name."""

    def layer() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(ConvKANLayer(channels, channels, kernel, BASIS)).to(device)

    shape = (channels, channels, BASIS, kernel, kernel)
    budget = int(TENTH * math.prod(shape))
    found = {FULL: layer()}
    for rule, title in TITLES.items():
        (ranks,) = ranks_for_budget([shape], budget, RULES[rule])
        found[title] = get_peft_model(layer(), LoTRAConfig(r=ranks))
    r = budget // (channels * BASIS * kernel**2 + channels)
    found[LORA] = get_peft_model(layer(), LoraConfig(r=max(1, r), target_modules=["0.conv"]))
    return found


def measured(channels: int, kernel: int, rounds: int, device: torch.device) -> list[dict[str, object]]:
    x = torch.randn(BATCH, channels, SIZE, SIZE, device=device, requires_grad=True)
    built = models(channels, kernel, device)

    def step(model: nn.Module) -> None:
        model(x).square().mean().backward()

    for model in built.values():
        step(model)  # the first pass makes a plan
    steps = {name: lambda m=model: clock(device, lambda: step(m)) for name, model in built.items()}
    times = interleaved(steps, rounds)
    seconds = {name: [end for (end,) in found] for name, found in times.items()}
    return [
        {
            "channels": channels,
            "kernel": kernel,
            "adapter": name,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "flops": count_flops(lambda m=model: step(m)),
            "saved_bytes": saved_bytes(lambda m=model: m(x), [x, *model.parameters()]),
            "time_ratio": median_ratio(seconds[name], seconds[FULL]),
        }
        for name, model in built.items()
    ]


def run(args: argparse.Namespace) -> None:
    records = []
    for channels in args.channels:
        for kernel in args.kernels:
            rows = measured(channels, kernel, args.rounds, torch.device(args.device))
            full = rows[0]
            print(f"\n{channels} channels, kernel {kernel} × {kernel}{'':<9}trained   FLOPs   saved    time")
            for row in rows:
                ratios = [row["flops"] / full["flops"], row["saved_bytes"] / full["saved_bytes"], row["time_ratio"]]
                print(f"  {row['adapter']:<32}{row['trained']:>9,}", *(f"{value:6.2f} ×" for value in ratios))
            records += rows
    path = args.output_dir / "convolutions.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(records, indent=1) + "\n"))
    print(f"\nRatios to a step that trains every coefficient, {args.device}. Written: {path}")


def main(argv: list[str] | None = None) -> int:
    args = benchmark_arguments(
        argv, __doc__, "convolutions", 15, channels=([16, 64], "in and out"), kernels=([3, 5], "sides")
    )
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
