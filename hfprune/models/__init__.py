"""Checkpoints: loading, the units that can be cut, saving, the proof that a saved checkpoint reloads."""
