"""Coefficient tensors found, and declared layouts verified, by running the layers of a model."""
