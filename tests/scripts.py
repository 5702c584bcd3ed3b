"""Scripts of examples/ as from the command line, but in this process: one import for all tests."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[1] / "examples"


class Called(NamedTuple):
    out: str
    err: str


def call(name: str, *arguments: object, code: int = 0) -> Called:
    """What the script of this name (without folder and .py) prints; see also `restored`.

    Args:
        code: the exit code that is expected.
    """
    out, err = StringIO(), StringIO()
    with restored(), redirect_stdout(out), redirect_stderr(err):
        try:
            found = import_module(name).main([*map(str, arguments)])
        except SystemExit as end:
            found = end.code if isinstance(end.code, int) else 1
            print("" if found == end.code else end.code, file=err)
    assert found == code, f"exit code {found}\n{out.getvalue()}\n{err.getvalue()}"
    return Called(out.getvalue(), err.getvalue())


@contextmanager
def restored() -> Iterator[None]:
    """What scripts change in their process is afterwards as it was."""
    folder, environment, path = Path.cwd(), dict(os.environ), list(sys.path)
    numbers, python_numbers = numpy.random.get_state(), random.getstate()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    gradients, precision = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)  # as users' processes begin; tests have fp64
    _forget_processes()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        _forget_processes()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        numpy.random.set_state(numbers)
        random.setstate(python_numbers)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        torch.set_float32_matmul_precision(precision)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")


def _forget_processes() -> None:
    """Else the next `Accelerator` has to have the arguments of the last one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class InThisProcess:
    """`multiprocessing`, but its processes run here, when they are started."""

    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self, method: str) -> None:
        pass

    class Process:
        def __init__(self, target: Callable[..., object], args: Sequence[object]) -> None:
            self.target, self.args = target, args

        def start(self) -> None:
            with restored():
                self.target(*self.args)

        def join(self) -> None:
            pass
