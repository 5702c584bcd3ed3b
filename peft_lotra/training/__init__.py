"""Initialisation, learning rates and second-order fitting of adapters."""
