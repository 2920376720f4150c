"""Fidelity to the dense model, lm-eval, speed and memory.

Imported by `reporting` and every package above it. Imports `pruning` and the packages below it, not `recovery`.
"""
