"""The cost of a training step of one KAN layer: LoTRA, a frozen layer, full fine-tuning and LoRA.

    python examples/benchmarks/step_cost.py
    python examples/benchmarks/step_cost.py --layers fastkan --widths 512 1024 --parts step
    python examples/benchmarks/step_cost.py --layers linear --widths 512 1024 --parts step   # as LoRA's own layers
    python examples/benchmarks/step_cost.py --device cuda --parts step --widths 512 1024 2048 4096 \\
        --batches 1024 8192 65536 --dtypes fp32 tf32 bf16 --modes eager compile graphs

All methods are measured in turn in one run, and compared by ratios. A step is a forward and backward pass with the
gradient to the layer's input. The step of the frozen layer (the "floor") is the least that an adapter can cost. The
command prints tables, and writes all numbers as JSON (after each case) and a picture.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from command_line import check_device, exit_code, make_output_dir, new_parser, positive_int
from cost_report import Row, draw, format_growth, format_rows
from layers import KINDS, SPLINE_ORDER, OneLayer
from measuring import clock, count_flops, device_name, fitted_exponent, interleaved, peak_bytes, saved_bytes, steady
from methods import (
    FULL,
    Trained,
    captured,
    inference_methods,
    lotra_and_floor,
    training_methods,
    with_lotra,
)
from reporting import write_atomically
from torch import nn
from tqdm import tqdm

from peft_lotra import initialize_lotra_weights

PARTS = ("step", "inference", "initialization", "growth")
DTYPES = ("fp32", "tf32", "bf16")  # for matrix products; bf16 by autocast, with parameters in fp32
MODES = ("eager", "compile", "graphs")
GROWTH = (1, 2, 4, 8)  # the factors by which the part "growth" enlarges one size at a time
GROWTH_BATCH = 64  # the largest batch to start from


class Case:
    """One layer of one size with its input, on a device, and the costs of the methods on it."""

    def __init__(
        self, args: argparse.Namespace, kind: str, width: int, batch: int, dtype: str = "fp32", mode: str = "eager",
        **sizes: Any,
    ) -> None:  # fmt: skip
        self.kind, self.seconds, self.device = KINDS[kind], args.seconds, torch.device(args.device)
        self.bf16, self.mode = dtype == "bf16", mode
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        basis = self.kind.basis or sizes.get("basis", args.basis)
        self.sizes = (width, width, basis)
        self.r = tuple(map(min, sizes.get("r", args.r), self.sizes))
        row = partial(Row, layer=kind, width=width, basis=basis, batch=batch, r=list(self.r))
        self.row = partial(row, dtype=dtype, mode=mode)
        torch.manual_seed(args.seed)
        # Inside the range of every basis.
        self.x = (torch.rand(batch, width, device=self.device) * 1.8 - 0.9).requires_grad_()
        self.gradient = torch.randn(batch, width, device=self.device)

    def layer(self) -> nn.Module:
        # nn.Module's own `to`, because pykan's `to` accepts only a device, and remembers it.
        return nn.Module.to(self.kind.build(*self.sizes), self.device)

    def step(self) -> list[Row]:
        return self._trained("step", training_methods(self.layer(), self.kind, self.sizes, self.r))

    def lotra_beyond_floor(self, adapters: int) -> tuple[int, float]:
        """The FLOPs and median seconds of a step minus those of the frozen layer's step."""
        floor, lotra = self._trained("growth", lotra_and_floor(self.layer(), self.kind, self.r, adapters))
        seconds = [a - b for a, b in zip(lotra.seconds, floor.seconds, strict=True)]
        return lotra.flops - floor.flops, statistics.median(seconds)

    def initialization(self) -> list[Row]:
        """Gradient-aligned initialisation by one forward and backward pass, relative to a step of full fine-tuning."""
        layer = self.layer()
        full = Trained(OneLayer(copy.deepcopy(layer)))
        model = with_lotra(layer.requires_grad_(False), self.kind, r=self.r, init_weights=True)

        def callback() -> None:
            model(self.x).backward(self.gradient)

        def initialize() -> None:
            initialize_lotra_weights(model, callback, adapter_name="0", progressbar=False)

        def step() -> None:
            full.forward_backward(self.x, self.gradient)
            full.update()

        return self._called("initialization", {FULL: step, "gradient initialisation": initialize}, clock)

    @torch.no_grad()
    def inference(self) -> list[Row]:
        models = inference_methods(self.layer(), self.kind, self.r)
        return self._called("inference", {name: partial(model, self.x) for name, model in models.items()}, steady)

    def _called(
        self, part: str, calls: dict[str, Callable[[], object]], clock: Callable[..., list[float]]
    ) -> list[Row]:
        runs = {name: partial(clock, self.device, call) for name, call in calls.items()}
        seconds = interleaved(runs, seconds=self.seconds)
        return [
            self.row(part, method=name, flops=count_flops(call), seconds=[ends[0] for ends in seconds[name]])
            for name, call in calls.items()
        ]

    def _trained(self, part: str, methods: dict[str, Trained | str]) -> list[Row]:
        """A row for each method: its costs, or the reason why it is not possible."""
        methods = dict(methods)
        runs = {}
        for name, method in methods.items():
            if isinstance(method, Trained):
                try:
                    runs[name] = partial(steady, self.device, *self._stages(method))
                    runs[name]()
                except torch.OutOfMemoryError as error:
                    methods[name] = str(error).splitlines()[0]
                    runs.pop(name, None)
                    method.clear(self.x)
        seconds = interleaved(runs, seconds=self.seconds)
        return [
            self.row(part, method=name, refused=method)
            if isinstance(method, str)
            else self._trained_row(part, name, method, seconds[name])
            for name, method in methods.items()
        ]

    def _stages(self, method: Trained) -> list[Callable[[], object]]:
        """The two stages of a training step: forward with backward, and Adam."""
        if self.mode == "compile":
            method.model.compile()
        stages = [partial(method.forward_backward, self.x, self.gradient, self.bf16), method.update]
        return captured(stages) if self.mode == "graphs" else stages

    def _trained_row(self, part: str, name: str, method: Trained, seconds: list[list[float]]) -> Row:
        row = self.row(
            part,
            method=name,
            trainable=method.trainable,
            seconds=[first for first, _ in seconds],
            seconds_with_adam=[last for _, last in seconds],
        )
        if self.mode == "eager":

            def step() -> None:
                method.forward_backward(self.x, self.gradient, self.bf16)
                method.update()

            method.clear(self.x)
            row.peak_bytes = peak_bytes(step, [*method.tensors(), self.x, self.gradient], self.device)
            row.flops = count_flops(step)
            method.clear(self.x)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                row.saved_bytes = saved_bytes(partial(method.model, self.x), method.model.parameters())
        return row


def batches_of(args: argparse.Namespace, kind: str) -> list[int]:
    return [args.pykan_batch] if kind == "pykan" else args.batches


def growth(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """The cost of LoTRA beyond the frozen layer, over one size at a time, and p of the fit cost ≈ c · sizeᵖ."""
    start = {"width": args.widths[0], "basis": args.basis, "batch": min(GROWTH_BATCH, batches_of(args, kind)[0])}
    start |= {"rank": max(1, args.r[0] // 2), "adapters": 1}
    if KINDS[kind].basis is not None:
        del start["basis"]
    records = []
    for name, first in start.items():
        sizes, flops, seconds = [first * factor for factor in GROWTH], [], []
        for size in sizes:
            now = start | {name: size}
            r = (now["rank"], now["rank"], args.r[2])
            case = Case(args, kind, now["width"], now["batch"], basis=now.get("basis"), r=r)
            case.seconds /= 4  # there are many sizes
            own = case.lotra_beyond_floor(now["adapters"])
            flops.append(own[0])
            seconds.append(own[1])
        exponents = {"flops_exponent": fitted_exponent(sizes, flops)}
        exponents |= {"seconds_exponent": fitted_exponent(sizes, seconds)}
        record = {"part": "growth", "layer": kind, "over": name, "start": start, "sizes": sizes}
        records.append(record | {"flops": flops, "seconds": seconds} | exponents)
    return records


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = {"torch": torch.__version__, "device": device_name(args.device), "threads": torch.get_num_threads()}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    rows: list[Row] = []
    growths: list[dict[str, Any]] = []
    print(f"torch {environment['torch']} on {environment['device']}, {environment['threads']} threads")

    def write() -> None:
        record = {"environment": environment, "settings": settings, "rows": list(map(asdict, rows)), "growth": growths}
        write_atomically(args.output_dir / "step_cost.json", lambda p: p.write_text(json.dumps(record, indent=1)))

    settings_of_step = [(dtype, mode) for dtype in args.dtypes for mode in args.modes]
    settings_of = {part: settings_of_step if part == "step" else [("fp32", "eager")] for part in PARTS[:-1]}
    cases = [
        (width, batch, kind, part, setting)
        for width in args.widths
        for kind in args.layers
        for batch in batches_of(args, kind)
        for part in PARTS[:-1]
        if part in args.parts
        for setting in settings_of[part]
    ]
    growing = args.layers if "growth" in args.parts else []
    with tqdm(total=len(cases) + len(growing), unit="case", dynamic_ncols=True) as bar:
        title = None
        for width, batch, kind, part, setting in cases:
            bar.set_description(f"{kind} {width} {part}")
            torch.compiler.reset()
            table = getattr(Case(args, kind, width, batch, *setting), part)()
            rows += table
            write()
            if title != table[0].title:
                title = table[0].title
                bar.write(f"\n{title}")
            bar.write(f"\n{format_rows(table)}")
            bar.update()
        for kind in growing:
            bar.set_description(f"{kind} growth")
            growths += (records := growth(args, kind))
            write()
            bar.write(f"\n{KINDS[kind].title}\n\n{format_growth(records)}")
            bar.update()
    files = "step_cost.json"
    if steps := [row for row in rows if row.part == "step" and (row.dtype, row.mode) == settings_of_step[0]]:
        batch_of = {row.layer: row.batch for row in reversed(steps)}
        figure = draw([row for row in steps if row.batch == batch_of[row.layer]])
        picture = args.output_dir / "step_cost.png"
        write_atomically(picture, lambda p: figure.savefig(p, dpi=120, format="png"))
        files += ", step_cost.png"
    print(f"\nWritten to {args.output_dir}: {files}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--layers", nargs="+", choices=list(KINDS), help="default: all KAN layers; pykan only if installed")
    add("--widths", type=positive_int, nargs="+", default=[64, 256], help="n = m; growth starts from the first")
    add("--basis", type=positive_int, default=8, help=f"basis functions n_d, more than {SPLINE_ORDER}")
    add("--batches", type=positive_int, nargs="+", default=[256], help="batch sizes; the picture has the first")
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], help="of a step's products; bf16 is autocast")
    add("--modes", nargs="+", choices=MODES, default=["eager"], help="of a step; graphs are CUDA's")
    # pykan forms a dozen tensors of batch × n × m values.
    add("--pykan-batch", type=positive_int, default=16, help="batch size for pykan, whose memory grows as batch·n·m")
    add("--r", type=positive_int, nargs=3, default=(8, 8, 4), help="LoTRA's ranks: input output basis")
    add("--seconds", type=float, default=0.8, help="of a table's timed rounds, which are five at least")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    add(
        "--threads", type=positive_int, help="of the CPU; one gives steadier times on a busy machine; default: torch's"
    )
    add("--seed", type=int, default=0, help="of weights and inputs")
    add("--output-dir", type=Path, default=Path("outputs/step_cost"), help="where everything is written")
    add("--device", default="cpu", help="torch device")
    args = parser.parse_args(argv)
    if args.basis <= SPLINE_ORDER:
        parser.error(
            f"argument --basis: should be more than {SPLINE_ORDER}, the order of the splines; got {args.basis}"
        )
    if args.layers is None:
        kan_layers = [kind for kind in KINDS if KINDS[kind].basis is None]
        args.layers = [kind for kind in kan_layers if kind != "pykan" or importlib.util.find_spec("kan")]
    elif "pykan" in args.layers and not importlib.util.find_spec("kan"):
        parser.error("argument --layers: pykan cannot be imported; pip install 'peft-lotra[pykan]'")
    if not 0 <= args.seconds < math.inf:
        parser.error(f"argument --seconds: should be a number from 0 on, got {args.seconds}")
    check_device(parser, args)
    if "graphs" in args.modes and torch.device(args.device).type != "cuda":
        parser.error(f"argument --modes: graphs need --device cuda, got {args.device!r}")
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "step_cost.json has the cases that were done.")


if __name__ == "__main__":
    sys.exit(main())
