"""What is saved of an adapter, under which names, and how it is read and checked."""
