"""Adapt a KAN to another PDE in several processes, with accelerate and checkpoints from which a killed run goes on.

    accelerate launch --config_file examples/accelerate/cpu_2_processes.yaml examples/accelerate_pde.py --cpu
    accelerate launch --config_file examples/accelerate/multi_gpu_ddp.yaml examples/accelerate_pde.py --init gradient
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        examples/accelerate_pde.py --cpu

Every step has one batch of points, whatever the number of processes. Each process takes its share, with what is left
over by an uneven number, so 2 or 3 processes train what 1 process trains, up to rounding. With --family, one adapter
is for a range of the PDE's parameter, and every point has its own parameter. After an interruption, the same command
goes on from the last checkpoint in --output-dir, which all machines should share; it holds what is trained, not the
frozen base. The last of the commands above restarts by itself (without the variable, new processes often meet
addresses of dead ones). Mixed precision is an option of the launcher: `--mixed_precision bf16`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, tqdm
from command_line import check_seed, exit_code, make_output_dir, new_parser, positive_int, ratio
from filelock import FileLock, Timeout
from pde_family import RANGES, family_points, family_residuals
from pde_least_squares import batch as kinds
from pde_transfer import LEARNING_RATES, attach_lotra, build_kan, trained_base
from pdes import PDE, PDES, Points, relative_l2_error
from peft import PeftModel
from processes import check_processes, complete_directory, load_checkpoint, save_checkpoint
from reporting import Row, format_table, write_atomically
from torch import Tensor, nn

from peft_lotra import at_task, initialize_lotra_weights

PER_SIDE = 8  # interior points of a step for each point on a side


class Problem(nn.Module):
    """A forward pass is the loss of a network on a PDE for points, or the error on a grid.

    A wrapper for several processes acts when the wrapped module's forward begins and ends. The loss contains
    derivatives of the network by its input. If only the network were wrapped, they would be taken outside, through
    what the wrapper has put into the graph. DDP with `static_graph=True` then gives wrong gradients without an error.
    """

    def __init__(self, network: PeftModel, pde: PDE) -> None:
        super().__init__()
        self.network, self.pde = network, pde

    def forward(
        self, points: Tensor, boundary: Tensor | None = None, weights: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        if boundary is not None:
            return self.pde.loss(self.network, Points(points, boundary), weights)
        with torch.autocast(points.device.type, enabled=False):
            return torch.tensor(relative_l2_error(self.network, self.pde, points))


class Values(Problem):
    """The same with the mean squared error of the network's values as the loss, which has no derivatives in it."""

    def forward(self, points: Tensor, boundary: Tensor | None = None, weights: Any = (1.0, 1.0)) -> Tensor:
        if boundary is not None:
            return weights[0] * (self.network(points) - self.pde.exact(points)).square().mean()
        return super().forward(points)


class FamilyProblem(nn.Module):
    """The same for a family: the loss for points with a parameter each, or the errors at a few parameters."""

    def __init__(self, network: PeftModel, pde: PDE) -> None:
        super().__init__()
        self.network, self.family = network, type(pde)

    def forward(self, points: dict[str, tuple[Tensor, Tensor, float]] | Tensor) -> Tensor:
        if isinstance(points, dict):
            residuals = family_residuals(self.network, self.family)
            losses = [
                weight * residuals[kind](self.network, (x, values)).square().mean()
                for kind, (x, values, weight) in points.items()
            ]
            return torch.stack(losses).sum()
        with torch.autocast(points.device.type, enabled=False):
            return torch.tensor([error for _, error in family_errors(self.network, self.family, points)])


def family_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"family": {"parameter": RANGES[args.pde]}} if args.family else {}


def family_errors(network: PeftModel, family: type[PDE], grid: Tensor) -> list[tuple[float, float]]:
    """(parameter, relative L2 error) at a few parameters within the range."""
    low, high = RANGES[family.__name__.lower()]
    errors = []
    for parameter in [round(low + (high - low) * share, 4) for share in (0.05, 0.35, 0.65, 0.95)]:
        with at_task(network, parameter=parameter):
            errors.append((parameter, relative_l2_error(network, family(parameter), grid)))
    return errors


def start(args: argparse.Namespace) -> Accelerator:
    """The Accelerator, after checks.

    Raises:
        SystemExit: if the processes cannot train together.
    """
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"  # DeepSpeed finds the device itself
    accelerator = Accelerator(
        cpu=args.cpu or not (torch.accelerator.is_available() or sharded),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # A step has the same batch for any number of processes. Otherwise the schedule takes a step for each process.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=args.log_with,
        project_config=ProjectConfiguration(logging_dir=str(args.output_dir / "logs")),
    )
    check_processes(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if not args.values:
            raise SystemExit(
                "DeepSpeed's ZeRO-3 frees parameters that second derivatives still need: use DDP, FSDP2 or --values."
            )
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # there is no DataLoader
    processes, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if args.points // PER_SIDE < processes * accumulation:
        raise SystemExit(
            f"--points {args.points} has {args.points // PER_SIDE} points for each side, fewer than {processes} "
            f"processes × {accumulation} accumulation steps: take {PER_SIDE * processes * accumulation} or more."
        )
    return accelerator


Part = tuple[Tensor, Tensor, tuple[float, float]]


def batch(accelerator: Accelerator, pde: PDE, seed: int, step: int, number: int) -> list[Part]:
    """This process's share of a step's points, one part for each accumulation step.

    The points depend on the seed and the step alone, so there is no state to save. A part's weights say how many of
    the whole batch's residuals it has, times the number of parts, so the mean of the parts' losses is the loss of the
    whole batch.
    """
    points = pde.sample(torch.Generator().manual_seed(1_000_003 * seed + step), "cpu", number, number // PER_SIDE)

    def counts(points: Points) -> tuple[int, int]:
        equation, *conditions = map(len, kinds(pde, points).values())
        return equation, sum(conditions)

    rank, processes = accelerator.process_index, accelerator.num_processes
    parts = processes * accelerator.gradient_accumulation_steps
    own = [Points(*(p[i::parts] for p in points)) for i in range(rank, parts, processes)]
    weights = [[parts * k / n for k, n in zip(counts(part), counts(points), strict=True)] for part in own]
    device = accelerator.device
    return [(p.interior.to(device), p.boundary.to(device), (a, b)) for p, (a, b) in zip(own, weights, strict=True)]


def family_batch(
    accelerator: Accelerator, pde: PDE, seed: int, step: int, number: int
) -> list[tuple[dict[str, tuple[Tensor, Tensor, float]]]]:
    """The same as `batch`, by kind of residual, with a parameter and a weight for each point."""
    bounds = RANGES[type(pde).__name__.lower()]
    whole = family_points(type(pde), bounds, seed, str(accelerator.device), (number, number // PER_SIDE, 1))(step)
    rank, processes = accelerator.process_index, accelerator.num_processes
    parts = processes * accelerator.gradient_accumulation_steps

    def part(i: int) -> dict[str, tuple[Tensor, Tensor, float]]:
        shown = {kind: (x[i::parts], values[i::parts], len(x)) for kind, (x, values) in whole.items()}
        return {kind: (x, values, parts * len(x) / n) for kind, (x, values, n) in shown.items()}

    return [(part(i),) for i in range(rank, parts, processes)]


def train(
    accelerator: Accelerator, problem: Problem | FamilyProblem, pde: PDE, args: argparse.Namespace
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Adam with cosine decay, from the last checkpoint on.

    Returns:
        The network's state on the main process, and the course of training as [step, loss, relative L2 error].
    """
    optimizer = torch.optim.Adam(
        [p for p in problem.parameters() if p.requires_grad], lr=LEARNING_RATES["chebyshev"]["lotra"]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    problem, optimizer, schedule = accelerator.prepare(problem, optimizer, schedule)
    share = family_batch if args.family else batch
    names = ("pde", "values", "steps", "points", "base_steps", "seed", "r", "compression_ratio", "init")
    settings = {name: getattr(args, name) for name in names}
    folder = args.output_dir / f"{args.pde}{'_family' * args.family}_checkpoints"
    progress = load_checkpoint(accelerator, folder, settings) or {"settings": settings, "step": 0, "course": []}
    grid, every = pde.grid(33).to(accelerator.device), max(1, args.steps // 50)
    steps = range(progress["step"] + 1, args.steps + 1)
    for step in tqdm(steps, desc="LoTRA", unit="step", initial=progress["step"], total=args.steps, dynamic_ncols=True):
        loss = torch.zeros((), device=accelerator.device)
        for part in share(accelerator, pde, args.seed + 1, step, args.points):
            with accelerator.accumulate(problem):
                part_loss = problem(*part)
                accelerator.backward(part_loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            loss += part_loss.detach() / accelerator.gradient_accumulation_steps
        progress["step"] = step
        if step % every == 0 or step == args.steps:
            with torch.no_grad():
                values = accelerator.reduce(loss, "mean").item(), problem(grid).mean().item()
            if not all(map(math.isfinite, values)):
                raise SystemExit(f"loss and error are {values} at step {step}: training has diverged.")
            progress["course"].append([step, *values])
            accelerator.log(dict(zip(("loss", "error"), values, strict=True)), step)
        if step % args.checkpoint_every == 0 or step == args.steps:
            save_checkpoint(accelerator, folder, progress)
    state = accelerator.get_state_dict(problem) or {}  # with ZeRO-3, the first process alone has it
    return {name.removeprefix("network."): value for name, value in state.items()}, progress["course"]


def run(accelerator: Accelerator, args: argparse.Namespace) -> None:
    family = PDES[args.pde]
    source, target = family(family.base_parameter), family(family.target_parameter)
    args.device = accelerator.device
    grid = target.grid().to(args.device)
    accelerator.init_trackers(args.pde, {"pde": args.pde, "steps": args.steps, "seed": args.seed})
    with accelerator.main_process_first(), redirect_stdout(sys.stdout if accelerator.is_main_process else None):
        load_base = trained_base(args, source, grid)  # the main process trains it, the others find its file
    network = attach_lotra(load_base(), args.r, args.compression_ratio, **family_settings(args))
    problem = (FamilyProblem if args.family else Values if args.values else Problem)(network, target)
    if args.init == "gradient":  # before DDP wraps the network; each process adds its share of the gradient
        parts = (family_batch if args.family else batch)(accelerator, target, args.seed + 1, 0, args.points)

        def train_step() -> None:
            for part in parts:
                (problem(*part) / len(parts)).backward()

        initialize_lotra_weights(network, train_step, progressbar=False)
    state, course = train(accelerator, problem, target, args)

    adapter = args.output_dir / f"{args.pde}_{'family' if args.family else 'lotra'}"
    with complete_directory(accelerator, adapter) as partial:
        if accelerator.is_main_process:
            network.save_pretrained(partial, state_dict=state)
    if accelerator.is_main_process:
        report(accelerator.num_processes, load_base, adapter, course, target, grid)


def report(
    processes: int, load_base: Callable[[], nn.Module], adapter: Path, course: list, target: PDE, grid: Tensor
) -> None:
    """Load the saved adapter into a fresh base, print its errors, and write them as JSON."""
    base = load_base()
    size, zero_shot = sum(p.numel() for p in base.parameters()), relative_l2_error(base, target, grid)
    adapted = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    numbers = adapted.get_nb_trainable_parameters()[0]
    record: dict[str, Any] = {"processes": processes, "course": course}
    if adapted.peft_config["default"].family:
        record["errors"] = family_errors(adapted, type(target), grid)
        print(f"LoTRA, {numbers:,} numbers for all {target.symbol}. Relative L2 errors:")
        print("\n".join(f"  {target.symbol} = {parameter:.3f}: {error:.1e}" for parameter, error in record["errors"]))
    else:
        error = relative_l2_error(adapted, target, grid)
        print(format_table([Row("base, zero-shot", 0, 0.0, zero_shot), Row("LoTRA", numbers, numbers / size, error)]))
        record |= {"zero_shot": zero_shot, "error": error}
    write_atomically(adapter.with_suffix(".json"), lambda p: p.write_text(json.dumps(record) + "\n"))
    print(f"Written: adapter {adapter}/, {adapter}.json")


def tracker(name: str) -> str:
    """Check that a tracker is installed, because accelerate would silently leave it out."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if name not in installed:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not installed, or is no tracker of accelerate; here are {installed}"
        )
    return name


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pde", choices=list(PDES), default="elliptic", help="family of PDEs")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--compression-ratio", type=ratio, default=0.1, help="adapter parameters per coefficient")
    size.add_argument("--r", type=positive_int, nargs="+", help="Tucker rank, or three: input output basis")
    add("--family", action="store_true", help="one adapter for a range of the PDE's parameter")
    add("--values", action="store_true", help="fit values of the solution, not the equation; for ZeRO-3")
    add("--init", choices=["random", "gradient"], default="random", help="of the adapter's factors")
    add("--steps", type=positive_int, default=2000, help="training steps on the target")
    add("--points", type=positive_int, default=256, help="of a step inside; an eighth as many on each side")
    add("--base-steps", type=positive_int, default=1500, help="training steps of the base")
    add("--gradient-accumulation-steps", type=positive_int, default=1, help="parts of a process's share of a batch")
    add("--checkpoint-every", type=positive_int, default=200, help="steps between checkpoints")
    add("--log-with", type=tracker, metavar="NAME", help="tracker of accelerate, such as tensorboard; default: none")
    add("--cpu", action="store_true", help="on the CPU even if there is an accelerator")
    add("--seed", type=int, default=0, help="of weights and points")
    add("--output-dir", type=Path, default=Path("outputs/accelerate_pde"), help="where everything is written")
    args = parser.parse_args(argv)
    args.kan = "chebyshev"
    if args.family and args.values:
        parser.error("argument --values: not with --family")
    if args.r and len(args.r) not in (1, 3):
        parser.error(f"argument --r: one or three numbers, got {len(args.r)}")
    check_seed(parser, args)
    try:
        attach_lotra(build_kan(args.kan, args.seed), args.r, args.compression_ratio, **family_settings(args))
    except ValueError as error:  # ranks that do not fit this KAN
        parser.error(str(error))
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    accelerator = start(args)
    lock = FileLock(args.output_dir / ".lock")
    try:
        if accelerator.is_main_process:  # workers may outlive a killed launcher: two runs must not share checkpoints
            lock.acquire(blocking=False)
        code = exit_code(lambda: run(accelerator, args), "The same command goes on from the last checkpoint.")
    except Timeout:
        raise SystemExit(f"{args.output_dir}: another run is at work here.") from None
    if code == 0:  # in this order: ending the group while DDP's objects are alive can hang
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())
