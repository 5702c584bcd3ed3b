"""Adapt a KAN that solves one PDE to another PDE of the same family, by LoTRA and by full fine-tuning.

    python examples/pde_transfer.py --pde elliptic
    python examples/pde_transfer.py --pde hyperbolic --kan pykan --r 8 8 4
    python examples/pde_transfer.py --pde hyperbolic --optimizer lm

The command trains the base (or loads the base that an earlier run has left in --output-dir) and adapts copies of it to
the target. It saves the adapter, loads and merges it into a fresh base, and checks that the merged KAN computes the
same as the adapted KAN. It prints a table, and writes it as JSON, with a picture, the adapter and the fully fine-tuned
weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from chebyshev_kan import ChebyshevKAN
from command_line import check_device, check_seed, exit_code, make_output_dir, new_parser, positive_int, ratio
from pde_least_squares import fit
from pdes import PDE, PDES, relative_l2_error
from peft import PeftModel, get_peft_model
from reporting import Row, draw, format_table, write_atomically
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer

WIDTHS = {"chebyshev": (2, 32, 32, 1), "pykan": (2, 16, 16, 1)}
NAMES = {"chebyshev": "Chebyshev KAN", "pykan": "pykan"}
# Learning rates at the start of the cosine decay, the best of a few tried for each.
LEARNING_RATES = {
    "chebyshev": {"base": 3e-3, "full": 1e-3, "lotra": 2e-2},
    "pykan": {"base": 1e-2, "full": 3e-3, "lotra": 2e-2},
}
STEPS = {"adam": 2000, "lm": 50}
MERGE_TOLERANCE = 1e-5  # relative; float32 sums taken in another order differ by about 1e-7


def build_kan(kind: str, seed: int) -> nn.Module:
    """An untrained KAN, (N, 2) → (N, 1); the same weights for the same seed."""
    torch.manual_seed(seed)
    if kind == "chebyshev":
        return ChebyshevKAN(WIDTHS[kind], degree=7)
    from kan import MultKAN  # imported here: optional, and slow to import

    # `width` is a list that MultKAN rewrites in place. The parts that are switched off are for plots and symbolic
    # regression.
    kan = MultKAN(list(WIDTHS[kind]), grid=5, k=3, seed=seed, symbolic_enabled=False, save_act=False, auto_save=False)
    kan.symbolic_fun.requires_grad_(False)
    return kan


def attach_lotra(kan: nn.Module, r: list[int] | None, compression_ratio: float, **family: Any) -> PeftModel:
    """The KAN with an adapter that changes nothing yet. pykan's layers are registered; for ours the layout is given.

    `family`: fields of `LoTRAConfig` for a family of tasks.
    """
    coefficients = {"coefficients": "i o d"} if isinstance(kan, ChebyshevKAN) else {}
    ranks = {"r": r[0] if len(r) == 1 else tuple(r)} if r else {"compression_ratio": compression_ratio}
    return get_peft_model(kan, LoTRAConfig(coefficients=coefficients, **ranks, **family))


def train(
    model: nn.Module, pde: PDE, steps: int, learning_rate: float, seed: int, grid: Tensor, label: str
) -> tuple[list[tuple[int, float]], float]:
    """Adam with cosine decay on fresh points at every step; an adapter's factors are kept orthonormal.

    Returns:
        The course of the error as (step, relative L2 error), and the seconds of the training.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, PeftModel):
        optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=learning_rate, orthonormal=True)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    course = [(0, relative_l2_error(model, pde, grid))]
    every = max(1, steps // 50)
    start = time.perf_counter()
    with tqdm(range(1, steps + 1), desc=label, unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            optimizer.zero_grad()
            pde.loss(model, pde.sample(generator, grid.device)).backward()
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == steps:
                course.append((step, relative_l2_error(model, pde, grid)))
                if not math.isfinite(course[-1][1]):
                    raise SystemExit(f"{label}: the error is {course[-1][1]} at step {step}, training has diverged.")
                bar.set_postfix_str(f"error {course[-1][1]:.2e}", refresh=False)
    return course, time.perf_counter() - start


def adapt(
    args: argparse.Namespace, model: nn.Module, pde: PDE, part: str, grid: Tensor
) -> tuple[list[tuple[int, float]], float]:
    """Fit to the target by the chosen optimizer. Return the course of the error and the seconds, as `train` does.

    The seed, and with it the points, is the same for every model.
    """
    if args.optimizer == "lm":
        marks = fit(model, pde, args.steps, args.seed + 1, grid, part)
        return [(mark.step, mark.error) for mark in marks], marks[-1].seconds
    return train(model, pde, args.steps, LEARNING_RATES[args.kan][part], args.seed + 1, grid, part)


def trained_base(args: argparse.Namespace, pde: PDE, grid: Tensor) -> Callable[[], nn.Module]:
    """Train and save the base unless its file exists. Return a function that builds a copy of it.

    The copy is read from the file. ``copy.deepcopy`` would fail on the activations of the last batch that pykan keeps.
    """
    width = "x".join(map(str, WIDTHS[args.kan]))
    path = args.output_dir / f"base_{args.pde}_{args.kan}_{width}_seed{args.seed}_{args.base_steps}steps.pt"
    if path.exists():
        print(f"Base: {path}, trained by an earlier run.")
    else:
        kan = build_kan(args.kan, args.seed).to(args.device)
        train(kan, pde, args.base_steps, LEARNING_RATES[args.kan]["base"], args.seed, grid, "base")
        write_atomically(path, lambda partial: torch.save(kan.state_dict(), partial))

    def load() -> nn.Module:
        kan = build_kan(args.kan, args.seed)
        kan.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return kan.to(args.device)

    return load


@torch.no_grad()
def check_merged(load_base: Callable[[], nn.Module], adapter: Path, adapted: nn.Module, grid: Tensor) -> float:
    """‖merged − adapted‖₂ / ‖adapted‖₂, where merged = fresh base + adapter from its file.

    Raises:
        SystemExit: if this difference is above MERGE_TOLERANCE.
    """
    merged = PeftModel.from_pretrained(load_base(), adapter).merge_and_unload()
    expected = adapted(grid)
    difference = (torch.linalg.vector_norm(merged(grid) - expected) / torch.linalg.vector_norm(expected)).item()
    if not difference <= MERGE_TOLERANCE:  # written so that NaN fails
        raise SystemExit(f"The merged KAN differs from the adapted one by {difference:.1e}, above {MERGE_TOLERANCE}.")
    return difference


def run(args: argparse.Namespace) -> None:
    family = PDES[args.pde]
    source, target = family(family.base_parameter), family(family.target_parameter)
    grid = target.grid().to(args.device)
    name = f"{args.pde}_{args.kan}{'_lm' if args.optimizer == 'lm' else ''}"
    load_base = trained_base(args, source, grid)

    full = load_base()
    base_size = sum(p.numel() for p in full.parameters() if p.requires_grad)
    full_course, full_seconds = adapt(args, full, target, "full", grid)
    full_file = args.output_dir / f"{name}_full.safetensors"
    state = {key: value.contiguous() for key, value in full.state_dict().items()}
    write_atomically(full_file, lambda partial: save_file(state, partial))

    adapted = attach_lotra(load_base(), args.r, args.compression_ratio)
    course, seconds = adapt(args, adapted, target, "lotra", grid)
    adapter = args.output_dir / f"{name}_lotra"
    adapted.save_pretrained(adapter)
    adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    difference = check_merged(load_base, adapter, adapted, grid)

    zero_shot, numbers = full_course[0][1], adapted.get_nb_trainable_parameters()[0]
    rows = [
        Row("base, zero-shot", 0, 0.0, zero_shot),
        Row("full fine-tuning", base_size, 1.0, full_course[-1][1], full_seconds, full_file.stat().st_size),
        Row("LoTRA", numbers, numbers / base_size, course[-1][1], seconds, adapter_bytes),
    ]
    title = f"{target.title}, {target.symbol} = {source.parameter} → {target.parameter}; {NAMES[args.kan]}"
    print(f"\n{title} {list(WIDTHS[args.kan])}, {base_size:,} parameters, {args.steps} steps\n")
    print(format_table(rows))
    print(f"\nMerged into a fresh base, the KAN differs from the adapted one by {difference:.1e} (relative).")

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"settings": settings, "rows": [asdict(row) for row in rows], "merge_difference": difference}
    write_atomically(args.output_dir / f"{name}.json", lambda p: p.write_text(json.dumps(record, indent=2) + "\n"))
    with torch.no_grad():
        size = math.isqrt(len(grid))
        fields = [field.reshape(size, size).cpu() for field in (target.exact(grid), adapted(grid))]
    courses = {f"full fine-tuning ({base_size:,})": full_course, f"LoTRA ({numbers:,})": course}
    figure = draw(target, *fields, courses, "LM" if args.optimizer == "lm" else "Adam", zero_shot, title)
    write_atomically(args.output_dir / f"{name}.png", lambda p: figure.savefig(p, dpi=120, format="png"))
    print(f"Written: {args.output_dir / name}.png, .json, adapter {adapter}/, full weights {full_file}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Check everything that can be checked before minutes of training. Nothing is written before that."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pde", choices=list(PDES), default="elliptic", help="family of PDEs")
    add("--kan", choices=list(WIDTHS), default="chebyshev", help="ours, or the original pykan (slower)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--compression-ratio", type=ratio, default=0.1, help="adapter parameters per coefficient")
    size.add_argument("--r", type=positive_int, nargs="+", help="Tucker rank, or three: input output basis")
    add("--optimizer", choices=list(STEPS), default="adam", help="Adam, or Levenberg–Marquardt, for the target")
    add("--steps", type=positive_int, help=f"training steps on the target, for each method; default: {STEPS}")
    add("--base-steps", type=positive_int, default=1500, help="training steps of the base")
    add("--seed", type=int, default=0, help="of weights and points")
    add("--output-dir", type=Path, default=Path("outputs/pde_transfer"), help="where everything is written")
    add("--device", help="torch device; default: an accelerator if there is one")
    args = parser.parse_args(argv)
    args.steps = args.steps or STEPS[args.optimizer]
    if args.r and len(args.r) not in (1, 3):
        parser.error(f"argument --r: one or three numbers, got {len(args.r)}")
    check_seed(parser, args)
    if not args.device:
        args.device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    check_device(parser, args)
    try:
        attach_lotra(build_kan(args.kan, args.seed), args.r, args.compression_ratio)
    except ImportError as error:
        parser.error(f"argument --kan: {args.kan} cannot be imported ({error}); pip install 'peft-lotra[pykan]'")
    except ValueError as error:  # ranks that do not fit this KAN
        parser.error(str(error))
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(
        lambda: run(parse_arguments(argv)), "Only complete files are left; the base, if it was done, is used again."
    )


if __name__ == "__main__":
    sys.exit(main())
