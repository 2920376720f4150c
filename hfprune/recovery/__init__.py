"""Training after the cut.

Imported by `reporting` and every package above it. Imports `pruning` and the packages below it, not `evaluation`.
"""
