"""How low is the rank of a full fine-tune's update? Spectra, suggested ranks and extracted adapters on three PDEs.

    python examples/low_rank_updates.py
    python examples/low_rank_updates.py --pde elliptic --energies 0.99 0.9999

The command takes the bases and fully fine-tuned weights that pde_transfer.py has left in --output-dir, or trains them
in the same way. It prints, and writes as JSON: the ranks that keep a share of the energy of A_ft − A_pt; the error of
this update for the ranks of `compression_ratio` and of `suggest_ranks` at the same number of parameters; and the error
of adapters extracted from the fine-tuned model. The picture shows the singular values.

What to expect: the updates that Adam finds here are not of low rank. At the energy 0.99, they take four fifths as many
numbers as there are coefficients. A tenth of the update is still left out, so the errors are 2e-2 to 5e-2. Those of
the fine-tuned models are at most 3e-3. But there are updates of low rank with the same effect: an adapter of a tenth
of the size that is fitted to the outputs of the fine-tuned model is about as good.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, new_parser, positive_int, ratio, training_arguments
from pde_transfer import LEARNING_RATES, WIDTHS, train, trained_base
from pdes import PDES, relative_l2_error
from reporting import write_atomically
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from peft_lotra import LoTRAConfig, extract_adapter
from peft_lotra.analysis import Spectrum, plot_spectrum, suggest_ranks, update_spectrum
from peft_lotra.tucker.decomposition import parameter_count
from peft_lotra.tucker.ranks import choose_ranks

LAYOUT = {"coefficients": "i o d"}
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # the ablation grid: adapter parameters per coefficient
BUDGETS = (1 / 10, 1 / 20)  # at which adapters are extracted
FIT_POINTS = 1000  # points in every iteration of a fit
Ranks = dict[str, tuple[int, int, int]]


def finetuned(args: argparse.Namespace, base: ChebyshevKAN, grid: torch.Tensor) -> ChebyshevKAN:
    """The base after full fine-tuning: from a file of this script or of pde_transfer.py, or by training."""
    width = "x".join(map(str, WIDTHS[args.kan]))
    steps = f"{args.base_steps}+{args.steps}steps"
    own = args.output_dir / f"full_{args.pde}_{args.kan}_{width}_seed{args.seed}_{steps}.safetensors"
    main_job = args.output_dir / f"{args.pde}_{args.kan}.json"
    full = copy.deepcopy(base)
    if own.exists():
        path = own
    elif main_job.exists() and all(
        json.loads(main_job.read_text())["settings"][key] == getattr(args, key)
        for key in ("pde", "kan", "seed", "steps", "base_steps")
    ):
        path = args.output_dir / f"{args.pde}_{args.kan}_full.safetensors"
    else:
        target = PDES[args.pde](PDES[args.pde].target_parameter)
        train(full, target, args.steps, LEARNING_RATES[args.kan]["full"], args.seed + 1, grid, f"{args.pde}, full")
        write_atomically(own, lambda partial: save_file(full.state_dict(), partial))
        return full
    print(f"Fine-tuned: {path}, of an earlier run.")
    full.load_state_dict(load_file(path))
    return full


def update_error(spectra: dict[str, Spectrum], ranks: Ranks) -> float:
    """‖Δ − Δ_r‖ / ‖Δ‖ over all layers, for truncated HOSVD."""
    discarded = sum(spectrum.truncation_error(ranks[name]) ** 2 for name, spectrum in spectra.items())
    return math.sqrt(discarded / sum(spectrum.energy for spectrum in spectra.values()))


def parameters(spectra: dict[str, Spectrum], ranks: Ranks) -> int:
    return sum(parameter_count(spectrum.shape, ranks[name]) for name, spectrum in spectra.items())


def compare_budgets(spectra: dict[str, Spectrum]) -> list[dict]:
    """Uniform and suggested ranks for the budgets in RATIOS."""
    shapes = {name: spectrum.shape for name, spectrum in spectra.items()}
    rows = []
    for share in RATIOS:
        budget = int(share * sum(map(math.prod, shapes.values())))
        row: dict = {"compression_ratio": share, "budget": budget}
        kinds = {
            "uniform": choose_ranks(shapes, {}, None, share),
            "suggested": suggest_ranks(spectra, budget=budget),
        }
        for kind, ranks in kinds.items():
            row[kind] = {
                "ranks": list(ranks.values()),
                "parameters": parameters(spectra, ranks),
                "update_error": update_error(spectra, ranks),
            }
        rows.append(row)
    return rows


def analyse(args: argparse.Namespace) -> tuple[dict, dict[str, Spectrum]]:
    """The analysis of one PDE: a record for the JSON file, and the spectra."""
    family = PDES[args.pde]
    target = family(family.target_parameter)
    grid = target.grid().to(args.device)
    base = trained_base(args, family(family.base_parameter), grid)()
    full = finetuned(args, base, grid)
    spectra = update_spectrum(base, full, LAYOUT)
    zero_shot, full_error = (relative_l2_error(model, target, grid) for model in (base, full))
    choices = {f"energy {energy:g}": {"energy": energy} for energy in args.energies}
    coefficients = sum(math.prod(spectrum.shape) for spectrum in spectra.values())
    choices |= {f"budget 1/{round(1 / share)}": {"budget": int(share * coefficients)} for share in BUDGETS}

    def points(iteration: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(iteration)
        return target.sample(generator, grid.device, interior=FIT_POINTS).interior

    extracted = []
    for name, choice in tqdm(choices.items(), desc=f"{args.pde}, extraction", unit="adapter", dynamic_ncols=True):
        ranks = suggest_ranks(spectra, **choice)
        config = LoTRAConfig(coefficients=LAYOUT, rank_pattern=ranks)
        row = {"choice": name, "ranks": list(ranks.values()), "parameters": parameters(spectra, ranks)}
        for kind, inputs in {"nearest": None, "fitted": points}.items():
            start = time.perf_counter()
            model, errors = extract_adapter(
                copy.deepcopy(base), full, config, inputs=inputs, iterations=args.fit_iterations, progressbar=False
            )
            seconds = time.perf_counter() - start
            error = relative_l2_error(model, target, grid)
            row[kind] = {"update_errors": errors, "error": error, "times_full": error / full_error, "seconds": seconds}
        extracted.append(row)
    record = {
        "pde": args.pde,
        "zero_shot_error": zero_shot,
        "full_error": full_error,
        "singular_values": {
            name: [s.tolist() for s in spectrum.singular_values] for name, spectrum in spectra.items()
        },
        "budgets": compare_budgets(spectra),
        "extraction": extracted,
    }
    return record, spectra


def format_record(record: dict) -> str:
    lines = [
        f"\n{record['pde']}: relative L2 error of the base {record['zero_shot_error']:.2e}, "
        f"fully fine-tuned {record['full_error']:.2e}",
        "\n  ‖Δ − Δ_r‖ / ‖Δ‖ at equal budget       uniform                suggested",
    ]
    for row in record["budgets"]:
        uniform, suggested = row["uniform"], row["suggested"]
        lines.append(
            f"  {row['compression_ratio']:7.4f} ({row['budget']:,} parameters)".ljust(36)
            + f"{uniform['update_error']:.3f} ({uniform['parameters']:,})".rjust(15)
            + f"{suggested['update_error']:.3f} ({suggested['parameters']:,})  ranks ".rjust(30)
            + "  ".join("·".join("all" if k is None else str(k) for k in r) for r in suggested["ranks"])
        )
    lines.append("\n  extracted, relative L2 error (times the fine-tuned model's)")
    lines.append(f"  {'':18}{'parameters':>12}{'nearest update':>22}{'fitted to outputs':>26}")
    for row in record["extraction"]:
        nearest, fitted = row["nearest"], row["fitted"]
        lines.append(
            f"  {row['choice']:<18}{row['parameters']:>12,}{nearest['error']:>12.2e} ({nearest['times_full']:>6.1f} ×)"
            f"{fitted['error']:>12.2e} ({fitted['times_full']:>5.2f} ×, {fitted['seconds']:.0f} s)"
            f"  ranks {'  '.join('·'.join(map(str, r)) for r in row['ranks'])}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    records, panels, marks = [], {}, {}
    for pde in args.pdes:
        record, spectra = analyse(argparse.Namespace(**vars(args) | {"pde": pde}))
        records.append(record)
        print(format_record(record))
        ranks = suggest_ranks(spectra, energy=args.energies[0])
        for number, (name, spectrum) in enumerate(spectra.items(), start=1):
            panel = f"{PDES[pde].title}, layer {number}"
            panels[panel], marks[panel] = spectrum, ranks[name]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    written = args.output_dir / "low_rank_updates"
    text = json.dumps({"settings": settings, "records": records}, indent=2) + "\n"
    write_atomically(written.with_suffix(".json"), lambda partial: partial.write_text(text))
    figure = plot_spectrum(panels, ranks=marks)
    figure.suptitle(
        "Singular values of what full fine-tuning changes, A_ft − A_pt; "
        f"circles: ranks that keep {args.energies[0]:g} of its energy"
    )
    write_atomically(written.with_suffix(".png"), lambda partial: figure.savefig(partial, dpi=90, format="png"))
    print(f"\nWritten: {written}.json, .png")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Check everything that can be checked before minutes of training. Nothing is written before that."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pde", dest="pdes", choices=list(PDES), nargs="+", default=list(PDES), help="families of PDEs")
    add(
        "--energies",
        type=ratio,
        nargs="+",
        default=[0.99, 0.999, 0.9999, 0.99999],
        help="shares of the energy of every layer's update to extract; the first is marked in the picture",
    )
    add("--fit-iterations", type=positive_int, default=20, help="of each fit to the fine-tuned model's outputs")
    add("--steps", type=positive_int, default=2000, help="training steps on the target")
    add("--base-steps", type=positive_int, default=1500, help="training steps of the base")
    return training_arguments(parser, argv, "pde_transfer", kan="chebyshev")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "Only complete files are left, and are used again.")


if __name__ == "__main__":
    sys.exit(main())
