"""Tests for KAN layers: `KANLayerTests`, the dense oracle, and `python -m peft_lotra.testing module:factory`."""

from .harness import KANLayerTests
from .oracle import (
    Rounding,
    assert_close,
    assert_differs,
    dense_model,
    forced_order,
    forget_warnings,
    margin,
    rounding_of,
    tensor_at,
)

__all__ = [
    "KANLayerTests",
    "Rounding",
    "assert_close",
    "assert_differs",
    "dense_model",
    "forced_order",
    "forget_warnings",
    "margin",
    "rounding_of",
    "tensor_at",
]
