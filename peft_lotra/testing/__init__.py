"""Tests for KAN layers: `KANLayerTests`, the dense oracle, and `python -m peft_lotra.testing module:factory`."""

from .harness import KANLayerTests
from .oracle import (
    TOLERANCES,
    assert_close,
    assert_differs,
    dense_model,
    forced_order,
    forget_warnings,
    tensor_at,
)

__all__ = [
    "TOLERANCES",
    "KANLayerTests",
    "assert_close",
    "assert_differs",
    "dense_model",
    "forced_order",
    "forget_warnings",
    "tensor_at",
]
