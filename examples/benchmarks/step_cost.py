"""What a training step of one KAN layer costs: LoTRA beside a frozen layer, full fine-tuning and LoRA.

    python examples/benchmarks/step_cost.py
    python examples/benchmarks/step_cost.py --layers fastkan --widths 512 1024 --parts step

Everything is measured in one run, the methods in turn, and given as ratios. A step is a forward and backward pass with
the gradient to the layer's input; the frozen layer's (the "floor") is the least that any adapter can cost. Prints
tables, and writes all numbers as JSON (after each layer and width) and a picture.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from command_line import check_device, exit_code, make_output_dir, new_parser, positive_int
from cost_report import Row, draw, format_growth, format_rows
from layers import KINDS, SPLINE_ORDER, OneLayer
from measuring import clock, count_flops, fitted_exponent, interleaved, peak_bytes, saved_bytes
from methods import (
    FULL,
    Trained,
    inference_methods,
    lotra_and_floor,
    slim_and_dense,
    training_methods,
    with_lotra,
)
from reporting import write_atomically
from torch import nn
from tqdm import tqdm

from peft_lotra import initialize_lotra_weights

PARTS = ("step", "inference", "slim", "initialization", "growth")
SLIM_RATIO = 0.1  # factors of a Slim layer per coefficient of the dense one
GROWTH = (1, 2, 4, 8)  # the factors by which the part "growth" enlarges one size at a time
GROWTH_BATCH = 64  # at most, to begin with


class Case:
    """One layer of one size with its input, on a device; the costs of the methods on it."""

    def __init__(self, args: argparse.Namespace, kind: str, width: int, **sizes: Any) -> None:
        self.kind, self.pairs, self.device = KINDS[kind], args.pairs, torch.device(args.device)
        basis, batch = sizes.get("basis", args.basis), sizes.get("batch", batch_of(args, kind))
        self.sizes = (width, width, basis)
        self.r = tuple(map(min, sizes.get("r", args.r), self.sizes))
        self.row = partial(Row, layer=kind, width=width, basis=basis, batch=batch, r=list(self.r))
        torch.manual_seed(args.seed)
        # Inside the range of every basis.
        self.x = (torch.rand(batch, width, device=self.device) * 1.8 - 0.9).requires_grad_()
        self.gradient = torch.randn(batch, width, device=self.device)

    def layer(self) -> nn.Module:
        # By nn.Module's own `to`: pykan's remembers its argument, and knows no other than a device.
        return nn.Module.to(self.kind.build(*self.sizes), self.device)

    def step(self) -> list[Row]:
        return self._trained("step", training_methods(self.layer(), self.kind, self.sizes, self.r))

    def slim(self) -> list[Row]:
        methods = slim_and_dense(self.layer(), self.kind, SLIM_RATIO)
        rows = self._trained("slim", methods)
        for row in rows:
            names = (self.kind.parameter, "lotra_")  # both of which a Slim layer has
            tensors = [p for name, p in methods[row.method].model.named_parameters() if any(n in name for n in names)]
            row.coefficient_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return rows

    def lotra_beyond_floor(self, adapters: int) -> tuple[int, float]:
        """FLOPs and median seconds that a step takes longer than the frozen layer's."""
        floor, lotra = self._trained("growth", lotra_and_floor(self.layer(), self.kind, self.r, adapters))
        seconds = [a - b for a, b in zip(lotra.seconds, floor.seconds, strict=True)]
        return lotra.flops - floor.flops, statistics.median(seconds)

    def initialization(self) -> list[Row]:
        """Gradient-aligned initialisation from one forward and backward pass, beside a step of full fine-tuning."""
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

        calls = {FULL: step, "gradient initialisation": initialize}
        seconds = interleaved({name: partial(clock, self.device, call) for name, call in calls.items()}, self.pairs)
        return [
            self.row(
                "initialization", method=name, flops=count_flops(call), seconds=[ends[0] for ends in seconds[name]]
            )
            for name, call in calls.items()
        ]

    @torch.no_grad()
    def inference(self) -> list[Row]:
        models = inference_methods(self.layer(), self.kind, self.r)
        calls = {name: partial(model, self.x) for name, model in models.items()}
        seconds = interleaved({name: partial(clock, self.device, call) for name, call in calls.items()}, self.pairs)
        return [
            self.row("inference", method=name, flops=count_flops(call), seconds=[ends[0] for ends in seconds[name]])
            for name, call in calls.items()
        ]

    def _trained(self, part: str, methods: dict[str, Trained | str]) -> list[Row]:
        """A row for each method; with the reason instead of costs where there is only that."""
        runs = {name: partial(self._timed_step, m) for name, m in methods.items() if isinstance(m, Trained)}
        seconds = interleaved(runs, self.pairs)
        return [
            self.row(part, method=name, refused=method)
            if isinstance(method, str)
            else self._trained_row(part, name, method, seconds[name])
            for name, method in methods.items()
        ]

    def _timed_step(self, method: Trained) -> list[float]:
        method.clear(self.x)
        return clock(self.device, partial(method.forward_backward, self.x, self.gradient), method.update)

    def _trained_row(self, part: str, name: str, method: Trained, seconds: list[list[float]]) -> Row:
        def step() -> None:
            method.forward_backward(self.x, self.gradient)
            method.update()

        method.clear(self.x)
        held = [*method.tensors(), self.x, self.gradient]
        peak = peak_bytes(step, held, self.device)
        method.clear(self.x)
        flops = count_flops(step)
        method.clear(self.x)
        saved = saved_bytes(partial(method.model, self.x), method.model.parameters())
        return self.row(
            part,
            method=name,
            trainable=method.trainable,
            flops=flops,
            saved_bytes=saved,
            peak_bytes=peak,
            seconds=[first for first, _ in seconds],
            seconds_with_adam=[last for _, last in seconds],
        )


def batch_of(args: argparse.Namespace, kind: str) -> int:
    return args.pykan_batch if kind == "pykan" else args.batch


def growth(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """What LoTRA costs beyond the frozen layer, over one size at a time, and p of the fit cost ≈ c · sizeᵖ."""
    start = {"width": args.widths[0], "basis": args.basis, "batch": min(GROWTH_BATCH, batch_of(args, kind))}
    start |= {"rank": max(1, args.r[0] // 2), "adapters": 1}
    records = []
    for name, first in start.items():
        sizes, flops, seconds = [first * factor for factor in GROWTH], [], []
        for size in sizes:
            now = start | {name: size}
            r = (now["rank"], now["rank"], args.r[2])
            case = Case(args, kind, now["width"], basis=now["basis"], batch=now["batch"], r=r)
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

    parts = [part for part in PARTS[:-1] if part in args.parts]
    cases = [(kind, width) for width in args.widths for kind in args.layers if parts]
    growing = args.layers if "growth" in args.parts else []
    with tqdm(total=len(cases) + len(growing), unit="case", dynamic_ncols=True) as bar:
        for kind, width in cases:
            bar.set_description(f"{kind} {width}")
            case = Case(args, kind, width)
            tables = {part: getattr(case, part)() for part in parts}
            rows += [row for table in tables.values() for row in table]
            write()
            title = next(iter(tables.values()))[0].title
            bar.write("\n\n".join(["", title, *map(format_rows, tables.values())]))
            bar.update()
        for kind in growing:
            bar.set_description(f"{kind} growth")
            growths += (records := growth(args, kind))
            write()
            bar.write(f"\n{KINDS[kind].title}\n\n{format_growth(records)}")
            bar.update()
    files = "step_cost.json"
    if "step" in parts:
        figure = draw([row for row in rows if row.part == "step"])
        picture = args.output_dir / "step_cost.png"
        write_atomically(picture, lambda p: figure.savefig(p, dpi=120, format="png"))
        files += ", step_cost.png"
    print(f"\nWritten to {args.output_dir}: {files}")


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.processor() or platform.machine()})"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--layers", nargs="+", choices=list(KINDS), help="default: all; pykan only if it is installed")
    add("--widths", type=positive_int, nargs="+", default=[64, 256, 512], help="n = m; growth starts from the first")
    add("--basis", type=positive_int, default=8, help=f"basis functions n_d, more than {SPLINE_ORDER}")
    add("--batch", type=positive_int, default=256, help="batch size")
    # pykan forms batch × n × m values a dozen times over.
    add("--pykan-batch", type=positive_int, default=16, help="batch size for pykan, whose memory grows as batch·n·m")
    add("--r", type=positive_int, nargs=3, default=(8, 8, 4), help="LoTRA's ranks: input output basis")
    add("--pairs", type=positive_int, default=20, help="timed rounds, in each of which every method runs once")
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
        args.layers = [kind for kind in KINDS if kind != "pykan" or importlib.util.find_spec("kan")]
    elif "pykan" in args.layers and not importlib.util.find_spec("kan"):
        parser.error("argument --layers: pykan cannot be imported; pip install pykan")
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def main() -> int:
    return exit_code(lambda: run(parse_arguments()), "step_cost.json has the cases that were done.")


if __name__ == "__main__":
    sys.exit(main())
