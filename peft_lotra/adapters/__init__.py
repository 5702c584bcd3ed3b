"""Work with adapters: swap, convert and extract them, and families of tasks."""
