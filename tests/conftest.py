import os

# One thread for each of pytest's processes, and for the processes that tests start: more would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# gloo would ask for the machine's name, to find an interface.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from peft_lotra.standin import plan
from peft_lotra.standin.cost import DENSE
from peft_lotra.testing import assert_close, forget_warnings
from peft_lotra.testing import assert_differs as assert_different  # noqa: F401
from peft_lotra.testing.oracle import margin
from peft_lotra.tucker.decomposition import MODES, Tucker

# Whether adapted layers are traced by torch.compile; before, they run between graphs.
FULLGRAPH = torch.__version__ >= (2, 13)


# Values are compared in fp64. A test about another precision names it.
torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def _fp64():
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def fp32(_fp64):
    """torch's own default dtype, for code that has data in it."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _recompile():
    """What another test has compiled counts toward torch's limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _forget_warnings():
    forget_warnings()


@contextmanager
def forced_order(order):
    """A context in which contractions use this order if they can. Yields an object whose `times` counts such plans.

    Args:
        order: one of `peft_lotra.standin.cost.ORDERS`, or `DENSE`.
    """
    taken, counted = SimpleNamespace(times=0), plan.cheapest_order

    def forced(work, _):
        possible = order == DENSE or set(order) <= set(work.on_x)
        taken.times += possible
        return order if possible else ""

    plan.cheapest_order = forced
    plan._plan.cache_clear()
    try:
        yield taken
    finally:
        plan.cheapest_order = counted
        plan._plan.cache_clear()


@pytest.fixture
def order(request):
    """Force the order of every contraction. "counted" keeps the order that counts as the cheapest."""
    with nullcontext() if request.param == "counted" else forced_order(request.param):
        yield request.param


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """`assert_close` of values in fp64, or of equal bits. `rounding.Rounding` compares in lower precision."""
    exact = tolerance == 0 or not (expected.is_floating_point() or expected.is_complex())
    assert exact or expected.dtype in (torch.float64, torch.complex128), f"{expected.dtype} is compared by `Rounding`"
    assert_close(actual, expected, tolerance)


def within(tolerance: float) -> float:
    """A tolerance, divided by `margin`, for comparisons written out."""
    return tolerance / margin()


def approx(expected: object, rel: float = 1e-9, abs: float = 0.0) -> object:
    """`pytest.approx` with a tolerance that `margin` divides."""
    return pytest.approx(expected, rel=within(rel), abs=within(abs))


def tucker(core, *factors):
    """A tensor in Tucker form, from its core and the factors of i, o, d, k; None where the mode is whole."""
    return Tucker(core, {mode: U for mode, U in zip(MODES, factors, strict=False) if U is not None})


def parts(tensor):
    """The core and the factors of i, o, d, k of a tensor in Tucker form; None where the mode is whole."""
    return tensor.core, *[tensor.factors.get(mode) for mode in MODES]
