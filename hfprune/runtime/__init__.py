"""The machine: memory, matrix products, GPUs, signals, progress.

Any package may import it. It imports only `errors`.
"""
