"""The refits by name. `refit.py` makes them; configs and command lines read the names without loading torch."""

SEQUENTIAL = ("sequential", "trained", "local_search")  # parts see what is cut and refitted below them
SOLVED = ("least_squares", *SEQUENTIAL)  # they solve for weights, near the old ones by `ridge`
REFITS = ("none", "bias", *SOLVED)
RIDGE = 0.4  # the default, see docs/pruning.md
IN_EXPERTS = {  # of a mixture of experts, those that go with a structure
    "mlp": ("least_squares", "sequential"),
    "mlp+experts": ("least_squares", "sequential"),
    "experts": ("sequential",),
    "layers": ("sequential",),
}
IN_DEPTH = ("least_squares", "sequential")  # those that go with whole sublayers and layers
