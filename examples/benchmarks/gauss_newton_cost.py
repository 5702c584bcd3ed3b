"""Seconds and memory of an iteration of `fit_gauss_newton`, by size, form of the solver and number of processes.

    python examples/benchmarks/gauss_newton_cost.py
    python examples/benchmarks/gauss_newton_cost.py --parts size --widths 24 --residuals 100000 --max-memory 2e9

A Chebyshev KAN of widths (2, W, W, 1) and degree 7 has P = 8W(W + 3) numbers: 1,040 at W = 10, 5,184 at 24, 20,384 at
49. It is fitted to values of a function, or to the Poisson equation. Parts:

- gram: the time of JᵀJ and its factorisation by the lower triangle, relative to the whole matrix; also JᵀJ in fp32.
- passes: CPU seconds for J, for JᵀJ, and for a product with JᵀJ by a pass over the data, which conjugate gradients
  need; measured with few samples.
- steps: CPU seconds of J and δ by each form of the solver at several λ, and how many products conjugate gradients
  take, after six iterations on the first 1,000 points.
- chunks: the time of J with 2²⁸ and 2²⁶ bytes for a chunk of samples, interleaved, as a ratio.
- size: for each bound `max_memory`, the median seconds of an iteration, its CPU seconds (which a busy machine does not
  change), and how far the memory of the process rises during the fit. If there is no room for P² numbers, conjugate
  gradients solve the equation.
- processes: the same with all points in one process, and with a part in each of several processes of one thread.

Every case of the last two parts runs in its own processes. The command writes gauss_newton_cost.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKAN
from command_line import check_device, exit_code, make_output_dir, new_parser, positive_int
from measuring import clock, interleaved, median_ratio, synchronize
from pde_least_squares import residual_functions
from pdes import PDES
from reporting import write_atomically
from torch import distributed
from torch.distributed.run import main as torchrun

from peft_lotra import fit_gauss_newton
from peft_lotra.training import iteration, memory
from peft_lotra.training.conjugate_gradients import ConjugateGradients
from peft_lotra.training.damped_system import Equation, NormalEquations, ResidualSpace
from peft_lotra.training.lower_triangle import LowerTriangle
from peft_lotra.training.problem import Evaluation, Problem

PARTS = ("gram", "passes", "steps", "chunks", "size", "processes")
SAMPLE = 800  # rows of J in the preconditioner of conjugate gradients
FORMS = {form.__name__: form for form in (NormalEquations, ResidualSpace, ConjugateGradients)}
PART = "processes.json"  # from the processes to the one that started them
PDE = PDES["elliptic"](1.3)
PROBLEMS = {
    "values": lambda net, points: net(points) - PDE.exact(points),
    "poisson": residual_functions(PDE)["equation"],
}


def build(width: int, device: str) -> ChebyshevKAN:
    torch.manual_seed(0)
    return ChebyshevKAN((2, width, width, 1), 7).to(device)


def now(device: str) -> float:
    """CPU seconds, which other work does not change; seconds of an accelerator."""
    synchronize(torch.device(device))
    return time.process_time() if torch.device(device).type == "cpu" else time.perf_counter()


def timed(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """The seconds of each of several interleaved runs."""
    for run in runs.values():
        run()
    found = interleaved({name: lambda run=run: clock(torch.device(device), run) for name, run in runs.items()}, rounds)
    return {name: [end for (end,) in ends] for name, ends in found.items()}


def gram(sizes: list[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """The times of JᵀJ for 2,000 rows of J and of its factorisation, relative to the whole matrix in fp64."""
    rows = []
    for size in sizes:
        J = torch.randn(2000, size, dtype=torch.float64, device=device)
        whole, narrow, triangle = J.new_zeros(size, size), J.new_zeros(size, size).float(), LowerTriangle(size, J)
        shift, single = J.new_full((size,), 2000.0), J.float()
        runs = {
            "whole": lambda J=J, whole=whole: whole.addmm_(J.T, J),
            "triangle": lambda J=J, triangle=triangle: triangle.add_products(J),
            "fp32": lambda J=single, narrow=narrow: narrow.addmm_(J.T, J),
        }
        seconds = timed(runs, rounds, device)
        factors = {
            "whole": lambda whole=whole, shift=shift: torch.linalg.cholesky_ex(whole + shift.diag()),
            "triangle": lambda triangle=triangle, shift=shift: triangle.factor(shift),
        }
        of_factor = timed(factors, rounds, device)
        rows.append(
            {
                "numbers": size,
                "triangle": median_ratio(seconds["triangle"], seconds["whole"]),
                "fp32": median_ratio(seconds["fp32"], seconds["whole"]),
                "factor": median_ratio(of_factor["triangle"], of_factor["whole"]),
                "memory": LowerTriangle.numbers(size) / size**2,
                "gflops": 2 * 2000 * size**2 / median(seconds["whole"]) / 1e9,
            }
        )
        print(
            f"P = {size:,}: by the lower triangle JᵀJ takes {rows[-1]['triangle']:.2f} × the time of the whole matrix "
            f"({rows[-1]['gflops']:.0f} GFLOP/s), the factor {rows[-1]['factor']:.2f} ×, the memory "
            f"{rows[-1]['memory']:.2f} ×; the whole matrix in fp32 {rows[-1]['fp32']:.2f} ×"
        )
    return rows


def passes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The CPU seconds for 10⁵ residuals."""
    rows, points = [], drawn(args.samples, args.device)

    def measured(run: Callable[[], object], count: int) -> float:
        run()
        start = now(args.device)
        run()
        return (now(args.device) - start) * 1e5 / count

    for width in args.widths:
        for name in args.problems:
            problem = Problem(
                build(width, args.device), PROBLEMS[name], "least_squares", 0.0, args.max_memory[-1], False
            )
            theta = problem.parameters()
            point = problem.evaluate(theta, points)
            vector, block = (torch.randn(*of, len(theta)).to(args.device).double() for of in ((), (300,)))
            triangle = LowerTriangle(len(theta), vector)
            runs = {
                "rows": (lambda problem=problem, point=point: sum(map(len, problem.rows(point))), args.samples),
                "gram": (lambda m=triangle, b=block: m.add_products(b), len(block)),
                "product": (lambda problem=problem, point=point, v=vector: problem.product(point, v), args.samples),
            }
            rows.append(
                {"numbers": len(theta), "problem": name} | {key: measured(*value) for key, value in runs.items()}
            )
            print(
                f"{name}, P = {len(theta):,}: for 10⁵ residuals J takes {rows[-1]['rows']:.1f} s of the processor, "
                f"JᵀJ {rows[-1]['gram']:.1f} s, a product {rows[-1]['product']:.1f} s",
                flush=True,
            )
    return rows


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The CPU seconds for J, the matrix and δ by each form, and the loss at θ + δ."""
    rows, function = [], PROBLEMS[args.problems[0]]
    for width in args.widths:
        kan = build(width, args.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few points
            fit_gauss_newton(
                kan, function, drawn(1000, args.device), iterations=6, loss_tolerance=0, progressbar=False
            )
        problem = Problem(kan, function, "least_squares", 0.0, 2**32, False)
        for count in args.residuals:
            point = problem.evaluate(problem.parameters(), drawn(count, args.device))
            size = len(point.theta)
            for damping in args.damping:
                row = {"numbers": size, "residuals": count, "damping": damping, "before": point.total.item()}
                forms = [form for form in FORMS if form != "ResidualSpace" or count < size]
                rows.append(row | {form: one_step(problem, point, form, damping) for form in forms})
                told = "; ".join(
                    f"{form} {rows[-1][form]['seconds']:.2f} s, loss {rows[-1][form]['loss']:.2e}" for form in forms
                )
                products = rows[-1]["ConjugateGradients"]["products"]
                print(
                    f"P = {size:,}, R = {count:,}, λ = {damping:g}, loss {row['before']:.2e}: {told}, "
                    f"{products} products",
                    flush=True,
                )
    return rows


def one_step(problem: Problem, point: Evaluation, form: str, damping: float) -> dict[str, float]:
    products = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        products.append(1)
        return problem.product(point, vector)

    device = str(point.theta.device)
    start = now(device)
    equation = Equation(problem.rows(point), point.residuals, problem.rest(point), dtype=point.theta.dtype)
    further = (product, SAMPLE, [len(point.residuals)]) if form == "ConjugateGradients" else ()
    step = FORMS[form](equation, *further).step(damping)
    seconds = now(device) - start
    loss = problem.evaluate(point.theta + step.to(point.theta), point.batch).total.item()
    return {"seconds": seconds, "loss": loss, "products": len(products)}


def chunks(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows, points = [], drawn(args.samples, args.device)
    for width in args.widths:
        for name in args.problems:
            runs = {}
            for size in (2**28, memory._CHUNK_BYTES):
                problem = Problem(build(width, args.device), PROBLEMS[name], "least_squares", 0.0, 2**32, False)
                problem.chunks.budget = size
                point = problem.evaluate(problem.parameters(), points)
                runs[str(size)] = lambda problem=problem, point=point: sum(map(len, problem.rows(point)))
            large, small = timed(runs, args.rounds, args.device).values()
            rows.append({"width": width, "problem": name, "ratio": median_ratio(small, large)})
            print(f"{name}, width {width}: J takes {rows[-1]['ratio']:.2f} × the time with 2²⁶ bytes", flush=True)
    return rows


def fitted(case: dict[str, Any], points: torch.Tensor, across: bool | None = None) -> dict[str, Any]:
    """A fit of the given number of iterations: the seconds of each, and the forms of the solver that were taken."""
    model, marks, forms = build(case["width"], case["device"]), [], []

    def noted(form: Any) -> Callable[..., Any]:
        def make(*args: Any) -> Any:
            forms.append(form.__name__)
            return form(*args)

        return make

    for name, form in FORMS.items():
        setattr(iteration, name, noted(form))

    def mark(result: Any = None) -> None:
        marks.append((time.perf_counter(), time.process_time(), result and result.losses[-1]))

    before = psutil.Process().memory_info().rss
    mark()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases have few points
        fit_gauss_newton(
            model, PROBLEMS[case["problem"]], points, iterations=case["iterations"], max_memory=case["max_memory"],
            loss_tolerance=0, callback=mark, progressbar=False, across_processes=across,
        )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps = [[b - a for a, b in zip(one[:2], next_[:2], strict=True)] for one, next_ in zip(marks, marks[1:])]  # noqa: B905
    # The first iteration also finds out how many samples fit into the memory.
    seconds, cpu_seconds = zip(*(steps[1:] or steps), strict=True)
    return {
        "numbers": sum(p.numel() for p in model.parameters()),
        "form": forms[0],
        "seconds": median(seconds),
        "cpu_seconds": median(cpu_seconds),
        "losses": [loss for *_, loss in marks[1:]],
        "megabytes": max(0, peak - before) / 1e6,
    }


def drawn(count: int, device: str) -> torch.Tensor:
    return (2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(1)) - 1).to(device)


def child(case: dict[str, Any], answer: Connection) -> None:
    torch.set_num_threads(case["threads"])
    fitted(case | {"width": 2, "iterations": 1}, drawn(64, case["device"]))  # what torch loads and allocates once
    answer.send(fitted(case, drawn(case["residuals"], case["device"])))


def size(args: argparse.Namespace) -> list[dict[str, Any]]:
    context, rows = multiprocessing.get_context("spawn"), []
    for width in args.widths:
        for count in args.residuals:
            for problem in args.problems:
                for max_memory in args.max_memory:
                    case = {
                        "width": width, "residuals": count, "problem": problem, "max_memory": max_memory,
                        "iterations": args.iterations, "threads": torch.get_num_threads(), "device": args.device,
                    }  # fmt: skip
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=child, args=(case, sender))
                    process.start()
                    sender.close()
                    try:
                        rows.append(case | receiver.recv())
                    except EOFError:
                        raise RuntimeError(f"the process of {case} has ended without a result") from None
                    process.join()
                    row = rows[-1]
                    print(
                        f"{problem}, P = {row['numbers']:,}, R = {count:,}, {max_memory / 1e9:.3g} GB allowed: "
                        f"{row['form']}, {row['seconds']:.2f} s an iteration ({row['cpu_seconds']:.2f} s of the "
                        f"processor), {row['megabytes']:.0f} MB, loss {row['losses'][-1]:.2e}",
                        flush=True,
                    )
    return rows


def of_processes(args: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """Costs for the largest number of points, in one process and in several."""
    rows = []
    for count in (1, args.processes):
        # --standalone takes a free port.
        start = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"]
        torchrun([*start, __file__, *argv])
        rows.append(json.loads((args.output_dir / PART).read_text()))
        (args.output_dir / PART).unlink()
        assert rows[-1]["processes"] == count, "torchrun has started something else"
    one, several = rows
    several["difference"] = max(abs(a - b) / b for a, b in zip(several["losses"], one["losses"], strict=True))
    print(
        f"{one['problem']}, P = {one['numbers']:,}, R = {one['residuals']:,}, one thread for each process: "
        f"{one['seconds']:.2f} s an iteration in one process, {several['seconds']:.2f} s in {args.processes} "
        f"({one['seconds'] / several['seconds']:.2f} ×; of the processor {one['cpu_seconds']:.2f} and "
        f"{several['cpu_seconds']:.2f} s in each); losses differ by {several['difference']:.1e}"
    )
    return rows


def work(args: argparse.Namespace) -> None:
    """The work of each of several processes. The first one writes the result."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    case = {
        "width": args.widths[0], "residuals": args.residuals[-1], "problem": args.problems[-1],
        "max_memory": args.max_memory[-1], "iterations": args.iterations, "processes": count, "device": "cpu",
    }  # fmt: skip
    row = case | fitted(case, drawn(case["residuals"], "cpu").tensor_split(count)[rank], across=True)
    if rank == 0:
        write_atomically(args.output_dir / PART, lambda path: path.write_text(json.dumps(row)))
    distributed.barrier()
    distributed.destroy_process_group()


def run(args: argparse.Namespace, argv: list[str]) -> None:
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    results: dict[str, Any] = {"settings": settings, "threads": torch.get_num_threads()}
    if "gram" in args.parts:
        results["gram"] = gram([8 * width * (width + 3) for width in args.widths], args.rounds, args.device)
    if "passes" in args.parts:
        results["passes"] = passes(args)
    if "steps" in args.parts:
        results["steps"] = steps(args)
    if "chunks" in args.parts:
        results["chunks"] = chunks(args)
    if "size" in args.parts:
        results["size"] = size(args)
    if "processes" in args.parts:
        results["processes"] = of_processes(args, argv)
    path = args.output_dir / "gauss_newton_cost.json"
    write_atomically(path, lambda partial: partial.write_text(json.dumps(results, indent=1) + "\n"))
    print(f"Written: {path}")


def number_of_bytes(text: str) -> int:
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"should be a positive number of bytes, got {text!r}")
    return value


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    add("--widths", type=positive_int, nargs="+", default=[10, 24, 49], help="W; processes have the first")
    add("--residuals", type=positive_int, nargs="+", default=[10_000, 100_000], help="R; processes have the last")
    add("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="processes have the last")
    add("--max-memory", type=number_of_bytes, nargs="+", default=[2 * 10**9, 8 * 10**9], help="bytes, as 2e9")
    add("--damping", type=float, nargs="+", default=[0.3, 1e-2, 1e-4], help="λ of steps")
    add("--iterations", type=positive_int, default=3, help="of each fit; the first is not timed where there are more")
    add("--rounds", type=positive_int, default=5, help="of gram, interleaved")
    add("--samples", type=positive_int, default=1000, help="of passes")
    add("--processes", type=positive_int, default=2, help="beside one")
    add("--threads", type=positive_int, help="of the CPU in gram and size; default: torch's")
    add("--smoke", action="store_true", help="small sizes, to see that all of it runs")
    add("--device", default="cpu", help="torch device of all parts but processes")
    add("--output-dir", type=Path, default=Path("outputs/gauss_newton_cost"), help="where everything is written")
    args = parser.parse_args(argv)
    if args.smoke:
        args.widths, args.residuals, args.max_memory, args.rounds = [10], [1500], [9_000_000, 2**32], 1
        args.problems, args.iterations, args.samples = ["values"], 2, 100
    if args.threads:
        torch.set_num_threads(args.threads)
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if "RANK" in os.environ:
        work(args)
        return 0
    return exit_code(lambda: run(args, sys.argv[1:] if argv is None else argv), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
