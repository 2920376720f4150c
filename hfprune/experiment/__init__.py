"""The config of an experiment, and what follows from it: the plan of its jobs, their estimate, what the store holds.

Imported by `cli` and the Snakefile alone. Imports everything else.
"""
