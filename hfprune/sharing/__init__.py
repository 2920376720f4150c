"""Model cards, export and upload of checkpoints.

Imported by `stages`, `experiment` and `cli`. Imports `reporting` and the packages below it.
"""
