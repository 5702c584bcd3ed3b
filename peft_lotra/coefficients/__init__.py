"""Describes where a KAN layer stores its coefficient tensor A, and in which layout."""

from .layout import Layout
from .registry import Copy, copy_of, known_coefficients, known_matrices, register_kan_layer, registered_kan_layers
from .spec import CoefficientSpec

__all__ = [
    "CoefficientSpec",
    "Copy",
    "Layout",
    "copy_of",
    "known_coefficients",
    "known_matrices",
    "register_kan_layer",
    "registered_kan_layers",
]
