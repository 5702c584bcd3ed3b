"""Serve many adapters, and many tasks of a family, from one base: requests of several threads.

    python examples/serve.py
    python examples/serve.py --requests 20000 --adapters 200 --codes 200 --held 20

Each request names the adapters of its samples, or their tasks in the family, of which each is a code of two numbers.
What a request names is loaded; what has not been used for longest makes room for it. Both happen between the calls of
other threads, so a request sees an adapter or a code whole or not at all. The command makes adapters and codes,
serves random requests, compares every answer, and prints how many were right.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch

sys.path.append(str(Path(__file__).parent))
from chebyshev_kan import ChebyshevKAN
from command_line import exit_code, make_output_dir, new_parser, positive_int
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

from peft_lotra import LoTRAConfig, add_task, load_task, remove_task, save_task

LAYOUT = {"coefficients": "i o d"}
FAMILY = "family"  # the adapter of which the codes are tasks


class Held:
    """What a model holds in memory, of what lies in files: the latest that requests have named.

    Args:
        load, remove: bring something into the model by its name, and take it out again.
        most: how many are held, beside those that running requests use.
    """

    def __init__(self, load: Callable[[str], object], remove: Callable[[str], object], most: int) -> None:
        self.load, self.remove, self.most = load, remove, most
        self.loaded = 0  # how often something was read
        self._used: OrderedDict[str, int] = OrderedDict()  # running requests by name, the latest last
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, names: set[str]) -> Iterator[None]:
        """While this is entered, these are in memory."""
        with self._lock:
            for name in names:
                if name not in self._used:
                    self.load(name)
                    self.loaded += 1
                self._used[name] = self._used.pop(name, 0) + 1
            idle = [name for name, running in self._used.items() if not running]
            for name in idle[: max(0, len(self._used) - self.most)]:
                self.remove(name)
                del self._used[name]
        try:
            yield
        finally:
            with self._lock:
                for name in names:
                    self._used[name] -= 1


def make(args: argparse.Namespace) -> tuple[PeftModel, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A model, samples, and their outputs with each adapter and each code that is saved in the output directory."""
    torch.manual_seed(0)
    base = ChebyshevKAN([2, args.width, args.width, 1], degree=4).double()  # rounding is no wrong answer
    config = partial(LoTRAConfig, r=4, coefficients=LAYOUT, init_weights=False)
    model = get_peft_model(base, config(family=["a", "b"], family_code=2), adapter_name=FAMILY).eval()
    x, by_adapter, by_code = 2 * torch.rand(args.batch, 2, dtype=torch.float64) - 1, {}, {}
    for k in tqdm(range(args.adapters), desc="adapters", leave=False):
        name = f"adapter {k}"
        model.add_adapter(name, config())
        model.save_pretrained(str(args.output_dir), selected_adapters=[name])
        with torch.no_grad():
            by_adapter[name] = model(x, adapter_names=[name] * len(x))
        model.delete_adapter(name)
    for k in tqdm(range(args.codes), desc="codes", leave=False):
        name = f"task {k}"
        add_task(model, name, family=FAMILY, code=torch.randn(2, dtype=torch.float64))
        save_task(args.output_dir / f"{name}.safetensors", model, name, family=FAMILY)
        with torch.no_grad():
            by_code[name] = model(x, adapter_names=[FAMILY] * len(x), lotra_task=name)
        remove_task(model, name, family=FAMILY)
    return model, x, by_adapter, by_code


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # threads of requests share the cores
    model, x, by_adapter, by_code = make(args)
    folder = args.output_dir
    adapters = Held(lambda name: model.load_adapter(folder / name, name), model.delete_adapter, args.held)
    codes = Held(
        lambda name: load_task(folder / f"{name}.safetensors", model, name, family=FAMILY),
        lambda name: remove_task(model, name, family=FAMILY),
        args.held,
    )

    def request(number: int) -> str:
        of_family = number % 2 == 1
        expected, held = (by_code, codes) if of_family else (by_adapter, adapters)
        names = random.Random(number).choices([*expected], k=len(x))
        named = {"adapter_names": [FAMILY] * len(x), "lotra_task": names} if of_family else {"adapter_names": names}
        try:
            with held({*names}), torch.no_grad():
                y = model(x, **named)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        rows = torch.stack([expected[name][row] for row, name in enumerate(names)])
        return "right" if torch.allclose(y, rows) else "wrong"

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
        f"{args.adapters} adapters and {args.codes} codes, at most {args.held} of each and those in use in memory; "
        f"{adapters.loaded} times an adapter was loaded, {codes.loaded} times a code; "
        f"{args.requests / seconds:.0f} requests per second"
    )
    print(f"memory: {resident[0]:.0f} MiB after a quarter of the requests, {resident[-1]:.0f} MiB at the end")
    if {*found} != {"right"}:
        raise SystemExit(1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--requests", type=positive_int, default=1000, help="how many")
    add("--adapters", type=positive_int, default=60, help="in the folder")
    add("--codes", type=positive_int, default=60, help="in the folder, tasks of one family")
    add("--held", type=positive_int, default=40, help="adapters, and codes, in memory, beside those in use")
    add("--threads", type=positive_int, default=4, help="that make requests")
    add("--batch", type=positive_int, default=8, help="samples of a request")
    add("--width", type=positive_int, default=16, help="of the KAN's hidden layers")
    add("--output-dir", type=Path, default=Path("outputs/serve"), help="where the adapters and codes are")
    args = parser.parse_args(argv)
    make_output_dir(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_arguments(argv)), "What was made is kept.")


if __name__ == "__main__":
    sys.exit(main())
