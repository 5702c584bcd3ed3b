"""Work with adapters: swap, convert and extract them, families of tasks, and Slim KANs."""
