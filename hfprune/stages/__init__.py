"""The stages, one module each: what an artifact's parameters and inputs are, and what makes it.

Only `hfprune.experiment` and `hfprune.cli` import from here. The code of a stage's module is part of its artifacts'
keys, so a module imports nothing that making its artifact does not run.
"""
