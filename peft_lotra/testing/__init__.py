"""Tests for KAN layers: `KANLayerTests` and the dense oracle."""

from .harness import KANLayerTests
from .oracle import assert_close, assert_differs, dense_model, forget_warnings

__all__ = ["KANLayerTests", "assert_close", "assert_differs", "dense_model", "forget_warnings"]
