"""Tensors that are elsewhere: sharded over processes, or offloaded."""
