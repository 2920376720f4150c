"""Training after the cut."""
