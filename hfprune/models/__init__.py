"""Checkpoints: loading, prunable units, saving, and the check that a saved checkpoint reloads."""
