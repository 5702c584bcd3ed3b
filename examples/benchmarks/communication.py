"""How much data-parallel training of a KAN layer sends, counted between processes, for LoTRA and full fine-tuning.

    python examples/benchmarks/communication.py
    python examples/benchmarks/communication.py --layer efficient --widths 512 --gbit 400 --step-seconds 0.002

The command starts itself by torchrun in several processes, on the CPU with gloo. DistributedDataParallel sends the
gradients of trainable parameters. Before every forward pass it also sends buffers such as grids, unless
`broadcast_buffers=False`. Every tensor that is given to a collective in a step is counted. The time of a step on N
GPUs is then calculated, for a ring all-reduce that overlaps with nothing:

    t(N) = t(1) + 2 (N − 1)/N · bytes / bandwidth + 2 (N − 1) · latency

The command prints a table for each, and writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from accelerate import Accelerator
from command_line import exit_code, make_output_dir, new_parser, positive_int
from layers import KINDS, OneLayer
from methods import FULL, LOTRA, with_lotra
from reporting import write_atomically
from torch.distributed.run import main as torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PART = "processes.json"  # from the processes to the one that started them


class SentBytes(TorchDispatchMode):
    """While this is entered: the bytes of the tensors given to each of torch.distributed's collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.by_collective: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            name = function.__name__.partition(".")[0].strip("_")
            self.by_collective[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def measure(args: argparse.Namespace, width: int, method: str) -> dict[str, Any]:
    """The bytes and the seconds of a step, in one process."""
    accelerator, kind = Accelerator(cpu=True), KINDS[args.layer]
    torch.manual_seed(args.seed)
    layer = kind.build(width, width, args.basis)
    r = tuple(map(min, args.r, (width, width, args.basis)))
    model = with_lotra(layer, kind, r=r) if method == LOTRA else OneLayer(layer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    row = {
        "width": width,
        "method": method,
        "processes": accelerator.num_processes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in trainable),
    }
    optimizer = torch.optim.Adam(trainable, lr=1e-5)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.rand(args.batch, width) * 1.8 - 0.9 + 0.01 * accelerator.process_index

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        optimizer.step()

    for _ in range(3):  # in the second step, DDP sorts its buckets again and tells the others
        step()
    with SentBytes() as sent:
        step()
    seconds = []
    for _ in range(args.steps):
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    # A process must not leave the group while a model of the group is alive.
    model = optimizer = trainable = None
    accelerator.free_memory()
    gc.collect()
    return row | {"sent": dict(sent.by_collective), "seconds": statistics.median(seconds)}


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [measure(args, width, method) for width in args.widths for method in (FULL, LOTRA)]


def work(args: argparse.Namespace) -> None:
    """The work of each of several processes. The first one writes the result."""
    rows = measure_all(args)
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        write_atomically(args.output_dir / PART, lambda path: path.write_text(json.dumps(rows)))
    accelerator.end_training()


def ring_all_reduce(size: int, gpus: int, bandwidth: float, latency: float) -> float:
    """2 (N − 1)/N · bytes / bandwidth + 2 (N − 1) · latency, in seconds."""
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * (gpus - 1) * latency


def format_table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def launch(args: argparse.Namespace, argv: list[str]) -> None:
    alone = measure_all(args)
    # --standalone takes a free port.
    torchrun(["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={args.processes}", __file__, *argv])
    together = json.loads((args.output_dir / PART).read_text())
    (args.output_dir / PART).unlink()
    report(args, alone, together)


def report(args: argparse.Namespace, alone: list[dict[str, Any]], together: list[dict[str, Any]]) -> None:
    """Print and write what one process and several have measured."""
    lines = [("width", "method", "parameters", "trainable", "all-reduced / B", "/ (4 · trainable)", "broadcast / B")]
    lines[0] += ("seconds, 1 process", f"{args.processes} processes", "efficiency")
    for one, row in zip(alone, together, strict=True):
        assert (one["processes"], row["processes"]) == (1, args.processes), "torchrun has started something else"
        row["seconds of one process"] = one["seconds"]
        reduced, broadcast = (row["sent"].get(name, 0) for name in ("allreduce", "broadcast"))
        others = sorted(set(row["sent"]) - {"allreduce", "broadcast", "barrier"})
        assert not others, f"collectives that are not in the table: {others}"
        ratio = f"{reduced / (4 * row['trainable']):.3f}"
        times = f"{one['seconds']:.4f}", f"{row['seconds']:.4f}", f"{one['seconds'] / row['seconds']:.2f}"
        counts = f"{row['parameters']:,}", f"{row['trainable']:,}", f"{reduced:,}", ratio, f"{broadcast:,}"
        lines.append((str(row["width"]), row["method"], *counts, *times))
    print(format_table(lines))
    print(f"\nA step by calculation: {args.gbit} Gbit/s per GPU, {args.latency} s per message; communication (step)")
    lines = [("width", "method", *(f"{gpus} GPUs / ms" for gpus in args.gpus))]
    for row in together:
        own = args.step_seconds or row["seconds of one process"]
        row["communication"] = {
            gpus: ring_all_reduce(row["sent"]["allreduce"], gpus, args.gbit * 1e9 / 8, args.latency)
            for gpus in args.gpus
        }
        cells = [f"{1e3 * t:.3f} ({1e3 * (own + t):.2f})" for t in row["communication"].values()]
        lines.append((str(row["width"]), row["method"], *cells))
    print(format_table(lines))
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    content = json.dumps({"settings": settings, "rows": together}, indent=1)
    write_atomically(args.output_dir / "communication.json", lambda path: path.write_text(content))


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a positive number, got {text!r}")
    return value


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--layer", choices=[kind for kind in KINDS if kind != "pykan"], default="chebyshev")
    add("--widths", type=positive_int, nargs="+", default=[64, 512, 1024], help="n = m")
    add("--basis", type=positive_int, default=8, help="n_d")
    add("--r", type=positive_int, nargs=3, default=[8, 8, 4], help="ranks, at most the modes")
    add("--batch", type=positive_int, default=64, help="samples of each process")
    add("--steps", type=positive_int, default=10, help="timed, after warming up")
    add("--processes", type=positive_int, default=2)
    add("--gpus", type=positive_int, nargs="+", default=[8, 64, 512], help="N of the calculation")
    add("--gbit", type=positive_number, default=100.0, help="Gbit/s that a GPU sends, calculation")
    add("--latency", type=positive_number, default=5e-6, help="seconds of one message, calculation")
    add("--step-seconds", type=positive_number, help="t(1); by default what one process took here")
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, default=Path("outputs/communication"), help="where all numbers are written")
    args = parser.parse_args(argv)
    if args.processes < 2:
        parser.error(f"argument --processes: nothing is sent by {args.processes} process")
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        work(args)
        return 0
    return exit_code(lambda: launch(args, sys.argv[1:] if argv is None else argv), "nothing is left of it")


if __name__ == "__main__":
    sys.exit(main())
