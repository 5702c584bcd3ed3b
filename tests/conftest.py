import os

# One thread for each of pytest's processes, and for the processes that tests start: more would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# gloo would ask for the machine's name, to find an interface.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import sys
from contextlib import nullcontext

import pytest
import torch

from peft_lotra.testing import forced_order, forget_warnings

# Whether adapted layers are traced by torch.compile; before, they run between graphs.
FULLGRAPH = torch.__version__ >= (2, 13)

# Relative tolerances of "equal", by dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


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


@pytest.fixture
def order(request):
    """Force the order of every contraction. "counted" keeps the order that counts as the cheapest."""
    with nullcontext() if request.param == "counted" else forced_order(request.param):
        yield request.param


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """‖actual − expected‖∞ ≤ tolerance · ‖expected‖∞, with the same dtype; 0 demands equal bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if tolerance is None:
        tolerance = TOLERANCE[actual.dtype]
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), f"error {error}"


def assert_different(actual: torch.Tensor, other: torch.Tensor) -> None:
    """The two differ by more than any tolerance of `assert_equal` in fp32, so that a later "equal" is not trivial."""
    assert (actual - other).abs().max() > 1e-3 * other.abs().max()
