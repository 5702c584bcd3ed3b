"""The cost of LoTRA on small KANs, where calls cost more than arithmetic: calls, kernels, instructions, PINN steps.

    python examples/benchmarks/small_layers.py
    python examples/benchmarks/small_layers.py --parts steps --widths 64

calls         calls of Python functions of peft_lotra in a layer's forward pass, by the interpreter's profiling hook.
kernels       operations of torch that compute in a forward and backward pass of a layer of each width: frozen, full
              fine-tuning, A + Δ by hand, LoTRA.
instructions  instructions of a forward pass beyond those of the frozen base layer, by valgrind's callgrind. This takes
              ten minutes, and is left out if valgrind is not installed.
steps         time of Adam on a PDE with second derivatives, relative to full fine-tuning. "last layer": only the
              coefficients of that layer are trained, without an adapter. No adapter of all three layers can cost less.
constants     the times that `peft_lotra/standin/cost.py` assumes, measured on this device.

All numbers are printed, and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKAN
from command_line import check_device, exit_code, make_output_dir, new_parser, positive_int
from layers import KINDS, OneLayer
from measuring import CountedKernels, interleaved, median_ratio, steady
from methods import DENSE, FLOOR, FULL, LOTRA, training_methods, with_lotra
from pdes import Elliptic, Points
from peft import get_peft_model
from reporting import write_atomically
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import peft_lotra
from peft_lotra import LoTRAConfig

SMALL, BATCH, BASIS, RANK = 8, 16, 8, 4  # of the layers whose calls and instructions are counted
LAYERS = ("chebyshev", "fastkan", "efficient")
LAST = "last layer"


def layers(kind: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = KINDS[kind].build(SMALL, SMALL, BASIS).requires_grad_(False)
    adapted = with_lotra(KINDS[kind].build(SMALL, SMALL, BASIS), KINDS[kind], r=RANK)
    return {"base": OneLayer(base), LOTRA: adapted.base_model.model}  # without PEFT's own wrappers


def calls(args: argparse.Namespace) -> dict[str, int]:
    """The calls in the second pass. (The first pass makes the plan.)"""
    package, counts = str(Path(peft_lotra.__file__).parent), {}
    for kind in LAYERS:
        model, x = layers(kind)[LOTRA], torch.rand(BATCH, SMALL)
        model(x)
        count = 0

        def profile(frame: Any, event: str, _: object) -> None:
            nonlocal count
            count += event == "call" and frame.f_code.co_filename.startswith(package)

        sys.setprofile(profile)
        try:
            model(x)
        finally:
            sys.setprofile(None)
        counts[kind] = count
        print(f"{KINDS[kind].title}: {count} calls of Python functions in a forward pass")
    return counts


def kernels(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each is a kernel on an accelerator, or a few of them. Views and the optimizer are not counted."""
    rows = []
    for kind in LAYERS:
        for width in args.widths:
            torch.manual_seed(0)
            layer, sizes, x = (
                KINDS[kind].build(width, width, BASIS),
                (width, width, BASIS),
                torch.rand(args.batch, width),
            )
            methods = training_methods(layer, KINDS[kind], sizes, (RANK, RANK, RANK))
            counts = {
                name: _kernels(methods[name], x.clone().requires_grad_()) for name in (FLOOR, FULL, DENSE, LOTRA)
            }
            rows.append({"layer": kind, "width": width, "kernels": counts})
            print(f"{KINDS[kind].title}, width {width}: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    return rows


def _kernels(trained: Any, x: torch.Tensor) -> int:
    trained.forward_backward(x, torch.ones_like(x))  # makes the plan
    with CountedKernels() as counted:
        trained.forward_backward(x, torch.ones_like(x))
    return counted.number


def instructions(args: argparse.Namespace) -> dict[str, int]:
    """The instructions of a pass with gradients to the adapter, as in training. valgrind runs a process of its own."""
    counts: dict[str, int] = {}
    if shutil.which("valgrind") is None:
        print("Instructions are not counted: valgrind is not installed")
        return counts
    here = str(Path(__file__).parent)
    for kind in tqdm(LAYERS, desc="valgrind", dynamic_ncols=True):
        executed = {}
        for name in ("base", LOTRA):
            setup = f"import sys; sys.path[:0] = [{here!r}, {str(Path(here).parent)!r}]; import torch\n"
            setup += f"from small_layers import layers; model = layers({kind!r})[{name!r}]\n"
            setup += f"x = torch.rand({BATCH}, {SMALL}); [model(x) for _ in range(10)]"
            timer = Timer("model(x)", setup, num_threads=1)
            counted = timer.collect_callgrind(number=20, collect_baseline=False)
            executed[name] = counted.counts(denoise=False) // 20
        counts[kind] = executed[LOTRA] - executed["base"]
        tqdm.write(f"{KINDS[kind].title}: {counts[kind] / 1e6:.2f} million instructions beyond the base layer's")
    return counts


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The time of a step of a Chebyshev KAN with three layers on an elliptic problem: loss, gradients and Adam."""
    rows, device = [], torch.device(args.device)
    problem = Elliptic(1.3)
    points = Points(*(p.to(device) for p in problem.sample(torch.Generator().manual_seed(0))))
    points = Points(points.interior[: args.batch], points.boundary[: args.batch // 4])
    for width in tqdm(args.widths, desc="steps", dynamic_ncols=True):

        def build(width: int = width) -> nn.Module:
            torch.manual_seed(0)
            return ChebyshevKAN((2, width, width, 1), degree=BASIS - 1).to(device)

        coefficients = {"coefficients": "i o d"}
        config = LoTRAConfig(coefficients=coefficients, compression_ratio=0.1, init_weights=False, alpha=0.1)
        models = {FULL: build(), LOTRA: get_peft_model(build(), config), LAST: build().requires_grad_(False)}
        list(models[LAST].parameters())[-1].requires_grad_(True)
        runs = {name: _training(model, problem, points, device) for name, model in models.items()}
        seconds = {
            name: [first for (first,) in rounds] for name, rounds in interleaved(runs, seconds=args.seconds).items()
        }
        over = {name: median_ratio(seconds[name], seconds[FULL]) for name in (LOTRA, LAST)}
        ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        rows.append({"width": width, "batch": args.batch, "ms": ms, "over full": over, "seconds": seconds})
        tqdm.write(
            f"width {width}: full fine-tuning {ms[FULL]:.2f} ms, LoTRA {over[LOTRA]:.3f} ×, only the last layer's "
            f"coefficients {over[LAST]:.3f} ×"
        )
    return rows


def _training(model: nn.Module, problem: Elliptic, points: Points, device: torch.device) -> Callable[[], list[float]]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        problem.loss(model, points).backward()
        optimizer.step()

    return lambda: steady(device, step, seconds=0.3)


def constants(args: argparse.Namespace) -> dict[str, float]:
    """Multiply-adds per second of a large product, and how many take as long as a call of torch or moving a number."""
    device, n = torch.device(args.device), 512
    a, b = (torch.randn(8 * n, 8 * n, device=device) for _ in range(2))
    gemm = n * 8 * n * n / _median(args, lambda: a[:n] @ b[:, :n])
    small = torch.randn(4, 4, device=device, requires_grad=True)
    x, chain = torch.randn(4, 4, device=device), 50

    def chained() -> None:
        y = x
        for _ in range(chain):
            y = nn.functional.linear(y, small)
        y.sum().backward()

    call = _median(args, chained) / chain / 3
    result = {"multiply-adds per second": gemm, "call": call * gemm}
    print(f"{gemm / 1e9:.0f} G multiply-adds per second with {torch.get_num_threads()} threads")
    print(f"A third of a call, forward and backward: {1e6 * call:.1f} µs, {call * gemm:,.0f} multiply-adds")
    for name, numbers in {"of a megabyte": 2**18, "of 64 megabytes": 2**24}.items():
        first, second = (torch.randn(numbers, device=device) for _ in range(2))
        move = _median(args, lambda a=first, b=second: a + b) / (3 * numbers)  # two are read, one is written
        result[name] = move * gemm
        print(f"To read or write a number in tensors {name}: {move * gemm:.1f} multiply-adds")
    return result


def _median(args: argparse.Namespace, run: Callable[[], object]) -> float:
    seconds = interleaved({"": lambda: steady(torch.device(args.device), run)}, seconds=min(args.seconds, 2))[""]
    return statistics.median(first for (first,) in seconds)


PARTS = {part.__name__: part for part in (calls, kernels, instructions, steps, constants)}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    start, results = time.perf_counter(), {"torch": torch.__version__, "threads": args.threads}
    results["device"] = args.device
    for part in args.parts:
        results[part] = PARTS[part](args)
        text = json.dumps(results, indent=1)
        write_atomically(args.output_dir / "small_layers.json", lambda p, text=text: p.write_text(text))
    print(f"Written to {args.output_dir}: small_layers.json, after {time.perf_counter() - start:.0f} s")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    add(
        "--widths",
        type=positive_int,
        nargs="+",
        default=[8, 32, 64, 128, 256],
        help="of layers whose kernels are counted, and of the PINN",
    )
    add("--batch", type=positive_int, default=256, help="points inside of the PINN's domain")
    add("--seconds", type=positive_int, default=20, help="of the timed rounds for each width")
    add("--threads", type=positive_int, default=1, help="of the CPU")
    add("--output-dir", type=Path, default=Path("outputs/small_layers"), help="where everything is written")
    add("--device", default="cpu", help="torch device of steps and constants")
    args = parser.parse_args(argv)
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "small_layers.json has the parts that were done.")


if __name__ == "__main__":
    sys.exit(main())
