"""The machine: memory, matrix products, GPUs, signals, progress. Any room may import it; it imports none."""
