"""Serve many adapters from one base: requests of several threads, of which each names the adapters of its samples.

    python examples/serve.py
    python examples/serve.py --requests 20000 --adapters 200 --held 20

An adapter is loaded when a request names it; the one that has not been used for longest makes room for it. Adapters
are loaded and deleted between the calls of other threads, so a request sees each adapter whole or not at all. The
command makes adapters, serves random requests, compares every answer, and prints how many were right.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

sys.path.append(str(Path(__file__).parent))
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

from peft_lotra import LoTRAConfig

LAYOUT = {"coefficients": "i o d"}


class Adapters:
    """The adapters that a model holds in memory, of those in a folder.

    Args:
        model: with an adapter of its own, which stays.
        folder: a directory for each adapter, by name.
        most: how many are held, beside those that running requests use.
    """

    def __init__(self, model: PeftModel, folder: Path, most: int) -> None:
        self.model, self.folder, self.most = model, folder, most
        self.loaded = 0  # how often an adapter was read
        self._used: OrderedDict[str, int] = OrderedDict()  # running requests by adapter, the latest last
        self._lock = threading.Lock()

    def answer(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The outputs for samples x, each by the adapter of its name."""
        with self._held(set(names)), torch.no_grad():
            return self.model(x, adapter_names=list(names))

    @contextmanager
    def _held(self, names: set[str]) -> Iterator[None]:
        """While this is entered, these adapters are in memory."""
        with self._lock:
            for name in names:
                if name not in self._used:
                    self.model.load_adapter(self.folder / name, name)
                    self.loaded += 1
                self._used[name] = self._used.pop(name, 0) + 1
            idle = [name for name, running in self._used.items() if not running]
            for name in idle[: max(0, len(self._used) - self.most)]:
                self.model.delete_adapter(name)
                del self._used[name]
        try:
            yield
        finally:
            with self._lock:
                for name in names:
                    self._used[name] -= 1


def make(args: argparse.Namespace) -> tuple[PeftModel, Tensor, dict[str, Tensor]]:
    """A model, samples, and the outputs of the adapters that are saved below the output directory."""
    torch.manual_seed(0)
    base = ChebyshevKAN([2, args.width, args.width, 1], degree=4)
    model = get_peft_model(base, LoTRAConfig(r=4, coefficients=LAYOUT), adapter_name="own").eval()
    x, outputs = 2 * torch.rand(args.batch, 2) - 1, {}
    for k in tqdm(range(args.adapters), desc="adapters", leave=False):
        name = f"task {k}"
        model.add_adapter(name, LoTRAConfig(r=4, coefficients=LAYOUT, init_weights=False))
        model.save_pretrained(str(args.output_dir), selected_adapters=[name])
        with torch.no_grad():
            outputs[name] = model(x, adapter_names=[name] * len(x))
        model.delete_adapter(name)
    return model, x, outputs


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # threads of requests share the cores
    model, x, outputs = make(args)
    adapters = Adapters(model, args.output_dir, args.held)

    def request(number: int) -> str:
        draw = random.Random(number)
        names = draw.choices([*outputs], k=len(x))
        try:
            y = adapters.answer(x, names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        expected = torch.stack([outputs[name][row] for row, name in enumerate(names)])
        return "right" if torch.allclose(y, expected, rtol=1e-4, atol=1e-5) else "wrong"

    found, start, resident = Counter[str](), time.perf_counter(), []
    with ThreadPoolExecutor(args.threads) as pool:
        for outcome in tqdm(
            pool.map(request, range(args.requests)), total=args.requests, desc="requests", leave=False
        ):
            found[outcome] += 1
            if found.total() in (args.requests // 4, args.requests):
                resident.append(psutil.Process().memory_info().rss / 2**20)
    seconds = time.perf_counter() - start
    print(
        f"{args.requests} requests of {args.batch} samples, {args.threads} threads: "
        f"{', '.join(f'{count} {what}' for what, count in found.items())}"
    )
    print(
        f"{args.adapters} adapters, at most {args.held} and those in use in memory; {adapters.loaded} times one was "
        f"loaded; {args.requests / seconds:.0f} requests per second"
    )
    print(f"memory: {resident[0]:.0f} MiB after a quarter of the requests, {resident[-1]:.0f} MiB at the end")
    if {*found} != {"right"}:
        raise SystemExit(1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--requests", type=positive_int, default=1000, help="how many")
    add("--adapters", type=positive_int, default=60, help="in the folder")
    add("--held", type=positive_int, default=40, help="adapters in memory, beside those in use")
    add("--threads", type=positive_int, default=4, help="that make requests")
    add("--batch", type=positive_int, default=8, help="samples of a request")
    add("--width", type=positive_int, default=16, help="of the KAN's hidden layers")
    add("--output-dir", type=Path, default=Path("outputs/serve"), help="where the adapters are")
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "The adapters that were made are kept.")


if __name__ == "__main__":
    sys.exit(main())
