"""Statistics, tables, figures and pages of what was measured.

Imported by `sharing`, `stages`, `experiment` and `cli`. Imports the packages below it.
"""
