"""The cost of a family of tasks relative to a plain adapter: a step with a task per sample, and a change of task.

    python examples/benchmarks/family_cost.py
    python examples/benchmarks/family_cost.py --widths 64 --rounds 5

A step is forward and backward of one Chebyshev KAN layer. P is the number of polynomials in the parameter. A change of
task puts one task's adapter in the place of another's (`hotswap_adapter_from_state_dict`). Times are medians, and
ratios are from interleaved runs. The command writes family_cost.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from command_line import benchmark_arguments, exit_code
from layers import KINDS, OneLayer
from measuring import clock, count_flops, interleaved, median_ratio
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, at_task
from peft_lotra.adapters.hotswap import hotswap_adapter_from_state_dict

KIND, BASIS, BATCH, RANKS, DEGREE = KINDS["chebyshev"], 8, 256, (8, 8, 4), 4
FLOOR, PLAIN, FAMILY = "frozen layer", "an adapter", "a task for every sample"


def layer(width: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return OneLayer(KIND.build(width, width, BASIS)).to(device)


def adapted(width: int, device: torch.device, **config: object) -> PeftModel:
    base = layer(width, device)
    coefficients = dict(KIND.coefficients(base.layer))
    return get_peft_model(base, LoTRAConfig(r=RANKS, coefficients=coefficients, **config))


def measured(width: int, rounds: int, device: torch.device) -> dict[str, float]:
    x = torch.rand(BATCH, width, device=device, requires_grad=True)
    lam = torch.rand(BATCH, 1, device=device)
    frozen = layer(width, device).requires_grad_(False)
    plain, family = adapted(width, device), adapted(width, device, family={"lam": (0.0, 1.0)}, family_degree=DEGREE)

    def of_family() -> None:
        with at_task(family, lam=lam):
            family(x).square().mean().backward()

    steps = {
        FLOOR: lambda: frozen(x).square().mean().backward(),
        PLAIN: lambda: plain(x).square().mean().backward(),
        FAMILY: of_family,
    }
    for step in steps.values():
        step()  # the first pass makes a plan
    times = interleaved({name: lambda s=step: clock(device, s) for name, step in steps.items()}, rounds)
    seconds = {name: [end for (end,) in found] for name, found in times.items()}
    flops = {name: count_flops(step) for name, step in steps.items()}
    return {
        "width": width,
        "time_ratio": median_ratio(seconds[FAMILY], seconds[PLAIN]),
        "flops_ratio": flops[FAMILY] / flops[PLAIN],
        "thin_ratio": (flops[FAMILY] - flops[FLOOR]) / (flops[PLAIN] - flops[FLOOR]),
        "terms": DEGREE + 1,
        "swap_seconds": swap_seconds(family, rounds, device),
    }


def swap_seconds(model: PeftModel, rounds: int, device: torch.device) -> float:
    """The median time of putting one task's adapter in the place of another's."""
    states = []
    for name, value in (("task", 0.2), ("other", 0.8)):
        adapter_at(model, name, lam=value)
        states.append({k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()})
    config, found = model.peft_config["other"], []
    model.set_adapter("task")
    for number in range(rounds + 1):
        state = dict(states[number % 2])
        start = time.perf_counter()
        hotswap_adapter_from_state_dict(model, state, "task", config)
        found.append(time.perf_counter() - start)
    return median(found[1:])


def run(args: argparse.Namespace) -> None:
    device, records = torch.device(args.device), []
    for width in args.widths:
        records.append(measured(width, args.rounds, device))
        row = records[-1]
        print(
            f"width {width}, P = {row['terms']}: a step with a task for every sample takes {row['time_ratio']:.2f} × "
            f"the time of a plain adapter's and {row['flops_ratio']:.3f} × its FLOPs ({row['thin_ratio']:.2f} × what "
            f"it adds to the frozen layer's); a change of task {1e3 * row['swap_seconds']:.2f} ms"
        )
    path = args.output_dir / "family_cost.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(records, indent=1) + "\n"))
    print(f"Written: {path}")


def main(argv: list[str] | None = None) -> int:
    args = benchmark_arguments(argv, __doc__, "family_cost", 25, widths=([64, 512], "n = m"))
    return exit_code(lambda: run(args), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
