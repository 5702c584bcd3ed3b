"""What one does with adapters: swap, convert, extract, and models that are adapters alone."""
