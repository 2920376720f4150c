"""Checkpoints: which are sound, loading, prunable units, saving, and the proof that a saved checkpoint reloads.

Imported by `data` and every package above it. Imports `store` and `runtime`.
"""
