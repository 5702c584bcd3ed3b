"""Where a KAN layer keeps its coefficient tensor A, and how A lies there."""

from .registry import known_coefficients, known_matrices, register_kan_layer, registered_kan_layers
from .spec import CoefficientSpec, Layout

__all__ = [
    "CoefficientSpec",
    "Layout",
    "known_coefficients",
    "known_matrices",
    "register_kan_layer",
    "registered_kan_layers",
]
