"""LoTRAConfig: plain data, its checks, and how its names and patterns are read."""
