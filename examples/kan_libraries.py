"""Try the KAN layers of all libraries that can be imported, and write the table of kan_libraries.md.

    pip install -e ".[test-libraries]" && pip install --no-deps -r tests/libraries.txt
    python examples/kan_libraries.py

Each layer runs alone on a random sample. A registered layout is verified, any other layer is inferred, and what is
found is adapted: the adapter has to change the layer's output, and merging it has to leave that as it is. For
libraries that PyPI does not have, the tests have small layers of ours with the same use of their coefficients. The row
of a layer that is not installed stays as it is. To add a layer, add an `Entry` in library_layers.py.

    python examples/kan_libraries.py --models

infers the layers of the larger models instead, with nothing registered, and writes the second table.
"""

from __future__ import annotations

import copy
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib
import torch
from command_line import new_parser
from library_layers import ENTRIES, MODELS, Entry
from peft import get_peft_model
from reporting import write_atomically
from torch import nn

from peft_lotra import LoTRAConfig, infer_coefficients, verify_coefficients
from peft_lotra.coefficients import known_coefficients, registry
from peft_lotra.preserved import first_tensor
from peft_lotra.standin import PerformanceWarning
from peft_lotra.testing import forget_warnings

HERE = Path(__file__).resolve().parent
START, MODELS_START = "<!-- python examples/kan_libraries.py -->", "<!-- python examples/kan_libraries.py --models -->"
END = "<!-- end -->"
HEAD = ["library, version", "class", "coefficients", "how"]
MODELS_HEAD = ["model", "parameters", "coefficient tensors", "CPU", "passes"]
WRONG = "; NOT adapted right: "
SHORT = {  # reasons as the page says them; what is not here is written in full
    "the forward pass reads it through an alias": "read through an alias",
    "no output responds to it": "unused",
    "its entries cannot be told apart by input feature": "no input axis",
    "its entries cannot be told apart by output": "no output axis",
    "it has one function per input (n_d = 1)": "no basis",
    "it has functions of one input for one output each": "mixes nothing",
    "every input and output has one function": "own functions on edges",
    "its functions φ_d(x_i) differ from output to output": "own functions on edges",
    "the layer is not affine in it": "not linear",
    "its response does not change with the input": "like a bias",
    "it has fewer than four entries": "too few entries",
}


def row(entry: Entry) -> list[str]:
    """The cells of the entry's row, and the passes that this took, forward and backward.

    Raises:
        ImportError, PackageNotFoundError: if its library is not installed, or another one has the module.
    """
    library = f"{entry.library} {entry.version()}".rstrip()
    torch.manual_seed(0)
    base = nn.Sequential(entry.build()).eval()
    x = entry.make_sample()
    registered = bool(known_coefficients(base[0]))
    try:
        found = verify_coefficients(base, x) if registered else infer_coefficients(base, x)
    except ValueError as error:
        return [library, entry.title, "–", reasons(str(error)), "–"]
    how = ("registered" if registered else "inferred") + adapted(base, x, found)
    tensors = ", ".join(described(name, entry) for name, entry in found.items())
    return [library, entry.title, tensors, how, f"{found.forwards} / {found.backwards}"]


def adapted(base: nn.Module, x: torch.Tensor, found: dict[str, Any]) -> str:
    """What there is to say of the adapted layer: nothing, that it is dense, or what is wrong with it."""
    forget_warnings()
    with warnings.catch_warnings(record=True) as noted, torch.no_grad():
        warnings.simplefilter("always")
        config = LoTRAConfig(r=1, init_weights=False, coefficients=found)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        plain, y = (first_tensor(m(x)) for m in (base, model))
        merged = first_tensor(model.merge_and_unload()(x))
    if (y - plain).abs().max() < 1e-4 * plain.abs().max():
        return WRONG + "the adapter has no effect"
    if (y - merged).abs().max() > 1e-4 * y.abs().max():
        return WRONG + "merging changes the output"
    return ", dense" if any(issubclass(w.category, PerformanceWarning) for w in noted) else ""


def described(name: str, entry: dict[str, Any]) -> str:
    path = name.removeprefix("0.")
    part = f"[{entry['slice']}]" if entry.get("slice") else ""
    scale = f" × `{entry['scale']}`" if entry.get("scale") else ""
    return f"`{path}{part}`{scale}: `{entry['layout']}`"


def reasons(text: str) -> str:
    """Why parameters are left out, in short; biases and other vectors only if there is nothing else."""
    found = re.findall(r"^ {4}(.*): left out, (.*)$", text, re.MULTILINE)
    telling = [
        (paths, reason) for paths, reason in found if "vector" not in reason and "fewer than four" not in reason
    ]
    if not found:
        return f"does not run: {text.rpartition('device: ')[2].partition(':')[0]}"
    return "refused: " + ", ".join(dict.fromkeys(in_short(reason) for _, reason in telling or found))


def in_short(reason: str) -> str:
    return next((short for start, short in SHORT.items() if reason.startswith(start)), reason)


def key(cells: list[str]) -> tuple[str, str]:
    """What a row is known by: library, without the version, and class; or the model."""
    return (cells[0], "") if cells[0] in MODELS else (re.sub(r" [0-9][^ ]*$", "", cells[0]), cells[1])


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries do on import is undone: they change the folder, print, and choose windows for their pictures."""
    folder, use = Path.cwd(), matplotlib.use
    try:
        matplotlib.use = lambda *_, **__: None
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        matplotlib.use = use
        os.chdir(folder)


def table(entries: list[Entry], before: dict[tuple[str, str], list[str]]) -> tuple[list[list[str]], list[str]]:
    """The rows of the entries, and what was not tried, with the reason; that keeps its row from `before`."""
    rows, left = [], []
    for entry in entries:
        try:
            with quiet():
                rows.append(row(entry))
        except (ImportError, PackageNotFoundError) as error:
            left.append(f"{entry.library}, {entry.title}: {type(error).__name__}: {error}")
            kept = before.get((entry.library, entry.title))
            rows += [kept] if kept else []
        except Exception as error:  # of the library
            name = f"{entry.library} {entry.version()}".rstrip()
            rows.append([name, entry.title, "–", f"does not run: {type(error).__name__}", "–"])
    return rows, left


def read(text: str, start: str = START) -> dict[tuple[str, str], list[str]]:
    """The rows of one of the page's tables."""
    lines = text.partition(start)[2].partition(END)[0].strip().splitlines()[2:]
    rows = [re.split(r" \| ", line.strip("| ")) for line in lines]
    return {key(cells): cells for cells in rows}


def write(page: Path, start: str, head: list[str], rows: list[list[str]]) -> None:
    """Put the rows in the place of those between `start` and the next `END`."""
    before, _, after = page.read_text().partition(start)
    lines = [start, f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    text = before + "\n".join(lines) + f"\n{END}" + after.partition(END)[2]
    write_atomically(page, lambda path: path.write_text(text))


def model_row(name: str) -> list[str]:
    """What the inference of one of the larger models takes, on one core.

    Raises:
        ImportError: if its library is not installed.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with quiet():
        model, x = MODELS[name]()
        begin = time.process_time()
        with patch.dict(registry._REGISTRY, clear=True):
            found = infer_coefficients(model.eval(), x)
    spent = time.process_time() - begin
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return [name, f"{parameters:.1f} M", str(len(found)), f"{spent:.0f} s", f"{found.forwards} / {found.backwards}"]


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--page", type=Path, default=HERE / "kan_libraries.md", help="the page with the tables")
    parser.add_argument("--only", metavar="NAME", default="", help="libraries, or models, with this in their names")
    parser.add_argument("--models", action="store_true", help="infer the larger models")
    args = parser.parse_args(argv)
    text, rows, left = args.page.read_text(), [], []
    if args.models:
        start, head, order = MODELS_START, MODELS_HEAD, [(name, "") for name in MODELS]
        for name in (name for name in MODELS if args.only in name):
            try:
                rows.append(model_row(name))
            except ImportError as error:
                left.append(f"{name}: {error}")
    else:
        start, head, order = START, HEAD, [(entry.library, entry.title) for entry in ENTRIES]
        rows, left = table([entry for entry in ENTRIES if args.only in entry.library], read(text))
    for cells in rows:
        print(" | ".join(cells))
    known = read(text, start) | {key(cells): cells for cells in rows}
    write(args.page, start, head, [known[name][: len(head)] for name in order if name in known])
    print("\nNot tried, rows kept as they were:", *(left or ["none"]), sep="\n    ")
    return 1 if any(WRONG in cell for cells in rows for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
