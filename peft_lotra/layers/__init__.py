"""The layers that hold adapters, and what they show of the layers that they wrap."""
