"""What a config means for a model: which tensors, which ranks, which names."""
