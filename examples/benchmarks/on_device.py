"""All costs on one device, as one page: steps, small layers, serving, and fits of second order.

    python examples/benchmarks/on_device.py --device cuda
    python examples/benchmarks/on_device.py --smoke

Runs the benchmarks of this folder that an accelerator changes, each in its turn, and writes what they print to
page.md, with the device's name, torch's version and the precision of matrix products. Steps are timed by events, after
warm-up; on CUDA they are also captured as graphs and replayed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
import gauss_newton_cost
import serving
import small_layers
import step_cost
from command_line import check_device, exit_code, make_output_dir, new_parser
from measuring import device_name
from reporting import write_atomically
from tqdm import tqdm

# Script, its arguments, and those of a short run.
BENCHMARKS = {
    "Steps of one layer": (step_cost, ["--parts", "step", "inference"], ["--widths", "16", "--seconds", "0"]),
    "Small layers": (small_layers, ["--parts", "steps", "constants"], ["--widths", "8", "--seconds", "1"]),
    "Serving": (serving, [], ["--layers", "5", "--rounds", "2", "--width", "16", "--batch", "6", "--adapters", "2"]),
    "Fits of second order": (gauss_newton_cost, ["--parts", "passes", "steps"], ["--smoke"]),
}


class Told(io.StringIO):
    """What is printed, kept and shown."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        return super().write(text)


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    page = [
        f"# Costs on {args.device}",
        f"{device_name(device)}, {torch.get_num_threads()} threads; torch {torch.__version__}; products in fp32: "
        f"{torch.get_float32_matmul_precision()!r} (TF32 unless 'highest').",
    ]
    for title, (script, arguments, short) in tqdm(BENCHMARKS.items(), desc="benchmarks", dynamic_ncols=True):
        folder = args.output_dir / script.__name__
        options = ["--device", args.device, "--output-dir", str(folder), *arguments, *(short if args.smoke else [])]
        if script is step_cost and device.type == "cuda":
            options += ["--modes", "eager", "graphs"]
        start, told = time.perf_counter(), Told()
        with contextlib.redirect_stdout(told):
            code = script.main(options)
        if code:
            raise SystemExit(code)
        command = f"python examples/benchmarks/{script.__name__}.py {' '.join(options)}"
        said = f"```\n{told.getvalue().strip()}\n```"
        page += [f"## {title}", f"`{command}`, {time.perf_counter() - start:.0f} s", said]
        text = "\n\n".join(page) + "\n"
        write_atomically(args.output_dir / "page.md", lambda path, text=text: path.write_text(text))
    print(f"Written: {args.output_dir / 'page.md'}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that all of it runs")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/on_device"))
    args = parser.parse_args(argv)
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "page.md has the benchmarks that were done.")


if __name__ == "__main__":
    sys.exit(main())
