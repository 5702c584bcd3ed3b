"""Runs the layers of a model to find its coefficient tensors, or to verify declared layouts."""
