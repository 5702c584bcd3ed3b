"""Tests for KAN layers: `KANLayerTests`, the dense oracle, and `python -m peft_lotra.testing module:factory`."""

from .harness import KANLayerTests
from .oracle import assert_close, assert_differs, dense_model, forget_warnings

__all__ = ["KANLayerTests", "assert_close", "assert_differs", "dense_model", "forget_warnings"]
