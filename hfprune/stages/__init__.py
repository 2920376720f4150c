"""The stages, one module each. A stage declares its parameters and inputs, and the function that writes its artifact.

Only `hfprune.experiment` and `hfprune.cli` import from here. The code that a stage's module imports is part of its
artifacts' keys. So a module imports only what runs to make its artifact.
"""
