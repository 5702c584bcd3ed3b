"""Whether an adapter's directory is whole while it is overwritten, and what saving and loading cost.

    python examples/benchmarks/saving.py
    python examples/benchmarks/saving.py --parts race --seconds 10

Race: a process overwrites one directory with two adapters in turn; another loads it, and compares the output with
theirs. Kills: the process that overwrites is killed by SIGKILL after a random time; then the directory is loaded.
Times: `save_pretrained` over an earlier save, and `PeftModel.from_pretrained`, relative to PEFT's LoRA of about as
many numbers, with and without fsync.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from measuring import clock, interleaved, median_ratio
from peft import LoraConfig, PeftModel, get_peft_model
from reporting import write_atomically
from torch import nn
from tqdm import trange

from peft_lotra import LoTRAConfig

FORK = multiprocessing.get_context("fork")
X = torch.linspace(-1, 1, 20).reshape(10, 2)


def adapted(seed: int, **fields: Any) -> PeftModel:
    torch.manual_seed(0)  # the base
    base = ChebyshevKAN([2, 16, 16, 1], degree=4)
    torch.manual_seed(seed)
    return get_peft_model(
        base, LoTRAConfig(coefficients={"coefficients": "i o d"}, init_weights=False, **{"r": 4, **fields})
    )


def pair(kind: str) -> list[PeftModel]:
    return [adapted(1), adapted(2) if kind == "alike" else adapted(2, r=6, alpha=0.5)]


def overwrite(folder: str, models: list[PeftModel], ready: Any) -> None:
    """Until the process is killed."""
    while True:
        for model in models:
            model.save_pretrained(folder)
            ready.set()


def overwriting(folder: str, models: list[PeftModel]) -> Any:
    """The process that overwrites, after it has saved once. A fork of this one starts at once."""
    ready = FORK.Event()
    process = FORK.Process(target=overwrite, args=(folder, models, ready), daemon=True)
    process.start()
    ready.wait()
    return process


def loaded(folder: str, outputs: list[torch.Tensor]) -> str:
    """What the directory is: one of the two adapters, something else, or an error."""
    base = adapted(0).unload()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a config of the other save is told by a warning
            model = PeftModel.from_pretrained(base, folder)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split()[-6:])}"
    return "one of the two" if any(torch.equal(model(X), output) for output in outputs) else "mixed"


def race(args: argparse.Namespace, kind: str) -> dict[str, int]:
    models, found = pair(kind), Counter[str]()
    outputs = [model(X) for model in models]
    with tempfile.TemporaryDirectory() as folder:
        process = overwriting(folder, models)
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            found[loaded(folder, outputs)] += 1
        process.kill()
        process.join()
    print(f"Race of {args.seconds} s, two adapters {kind}: {dict(found)}")
    return dict(found)


def kills(args: argparse.Namespace) -> dict[str, int]:
    models, found, draw = pair("of other ranks"), Counter[str](), random.Random(0)
    outputs = [model(X) for model in models]
    for _ in trange(args.kills, desc="kills"):
        with tempfile.TemporaryDirectory() as folder:
            process = overwriting(folder, models)
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
            process.join()
            found[loaded(folder, outputs)] += 1
    print(f"{args.kills} kills while overwriting: {dict(found)}")
    return dict(found)


def times(args: argparse.Namespace) -> dict[str, Any]:
    kinds = {"LoTRA": adapted(1)}
    numbers = sum(p.numel() for p in kinds["LoTRA"].parameters() if p.requires_grad)
    linear = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    kinds["LoRA"] = get_peft_model(linear, LoraConfig(r=max(1, numbers // (3 * 64)), target_modules=["0", "1", "2"]))
    bases = {
        "LoTRA": lambda: adapted(0).unload(),
        "LoRA": lambda: nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))),
    }
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:

        def save(name: str, model: PeftModel, synced: bool) -> list[float]:
            with mock.patch.object(os, "fsync", os.fsync if synced else lambda _: None):
                return clock(device, lambda: model.save_pretrained(f"{folder}/{name}"))

        def load(name: str) -> list[float]:
            base = bases[name]()
            return clock(device, lambda: PeftModel.from_pretrained(base, f"{folder}/{name}"))

        runs: dict[str, Any] = {}
        for name, model in kinds.items():
            model.save_pretrained(f"{folder}/{name}")
            runs[f"save {name}"] = lambda name=name, model=model: save(name, model, False)
            runs[f"load {name}"] = lambda name=name: load(name)
        runs["save LoTRA, fsync"] = lambda: save("LoTRA", kinds["LoTRA"], True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # LoRA's base is drawn anew
            seconds = {name: [first for (first,) in rounds] for name, rounds in interleaved(runs, args.rounds).items()}
        sizes = {name: Path(folder, name, "adapter_model.safetensors").stat().st_size for name in kinds}
    ratios = {
        name: median_ratio(seconds[name], seconds[f"{name[:4]} LoRA"]) for name in seconds if not name.endswith("LoRA")
    }
    for name, ratio in ratios.items():
        print(
            f"{name}: {ratio:.2f} × the time of LoRA (median {1e3 * sorted(seconds[name])[args.rounds // 2]:.1f} ms)"
        )
    return {"ratios": ratios, "bytes": sizes}


def run(args: argparse.Namespace) -> None:
    record: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}}
    if "race" in args.parts:
        record["race"] = {kind: race(args, kind) for kind in ("alike", "of other ranks")}
    if "kills" in args.parts:
        record["kills"] = kills(args)
    if "times" in args.parts:
        record["times"] = times(args)
    path = args.output_dir / "saving.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"Written: {path}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser, parts = new_parser(__doc__), ("race", "kills", "times")
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=parts, help="what is measured")
    add("--seconds", type=positive_int, default=60, help="of each race")
    add("--kills", type=positive_int, default=200, help="processes that are killed")
    add("--rounds", type=positive_int, default=31, help="timed rounds, in each of which everything runs once")
    add("--output-dir", type=Path, default=Path("outputs/saving"), help="where the results are written")
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "Nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
