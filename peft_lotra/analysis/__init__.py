"""Shows what fine-tuning changed in a KAN: coefficients, updates, their spectra, functions on edges, and plots."""

from ..tucker.ranks import suggest_ranks
from ..tucker.spectrum import Spectrum
from .plots import plot_activations, plot_spectrum
from .updates import activation_curves, coefficient_updates, effective_coefficients, update_spectrum

__all__ = [
    "Spectrum",
    "activation_curves",
    "coefficient_updates",
    "effective_coefficients",
    "plot_activations",
    "plot_spectrum",
    "suggest_ranks",
    "update_spectrum",
]
