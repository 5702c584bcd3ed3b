"""The cost of `infer_coefficients` on a Transformer-KAN with equal blocks: passes, CPU seconds, memory.

    python examples/benchmarks/inference.py
    python examples/benchmarks/inference.py --widths 384 --blocks 12 --rounds 3

Each block is x + KAN(KAN(norm(x))): two layers of the hidden size with eight basis functions, of a class that is not
registered. The sample has 32 tokens. Memory is the most bytes that tensors take at one time during the search, without
the model's parameters, relative to one pass of the model with gradients plus one layer's parameters. The command
writes inference.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from command_line import benchmark_arguments, exit_code
from layers import KINDS
from measuring import peak_bytes
from reporting import write_atomically
from torch import nn

from peft_lotra import infer_coefficients

BASIS, TOKENS = 8, 32
LAYERS = ("efficient", "fastkan", "chebyshev")


class Block(nn.Module):
    def __init__(self, kind: str, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = (KINDS[kind].build(width, width, BASIS) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)))


def measured(kind: str, width: int, blocks: int, rounds: int, device: torch.device) -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(kind, width) for _ in range(blocks)]).to(device)
    x = torch.randn(TOKENS, width, device=device)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        found = infer_coefficients(model, x)
        seconds.append(time.process_time() - start)
    parameters = list(model.parameters())
    held = sum(p.nbytes for p in parameters)
    spent = peak_bytes(lambda: infer_coefficients(model, x), parameters, device) - held
    forward = peak_bytes(lambda: model(x), parameters, device) - held
    layer = sum(p.nbytes for p in model[0].up.parameters())
    return {
        "layer": kind,
        "width": width,
        "layers": len(found),
        "forward_passes": found.forwards,
        "backward_passes": found.backwards,
        "cpu_seconds": statistics.median(seconds),
        "memory": spent,
        "memory_of_forward": forward,
        "memory_of_layer": layer,
        "memory_ratio": spent / (forward + layer),
    }


def run(args: argparse.Namespace) -> None:
    records = []
    for width in args.widths:
        for blocks in args.blocks:
            for kind in LAYERS:
                row = measured(kind, width, blocks, args.rounds, torch.device(args.device))
                print(
                    f"{KINDS[kind].title}, {row['layers']} layers of width {width}: {row['cpu_seconds']:.2f} s, "
                    f"{row['forward_passes']} forward and {row['backward_passes']} backward passes of single layers, "
                    f"memory {row['memory_ratio']:.2f} × that of a pass and a layer"
                )
                records.append(row)
    path = args.output_dir / "inference.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(records, indent=1) + "\n"))
    print(f"Medians of {args.rounds} rounds, {args.device}. Written: {path}")


def main(argv: list[str] | None = None) -> int:
    args = benchmark_arguments(
        argv, __doc__, "inference", 3, widths=([384], "hidden sizes"), blocks=([12], "of two layers each")
    )
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
