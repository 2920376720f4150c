"""Models, texts and tasks from the hub, a wheel or a path; readers, token sequences, contamination.

Imported by `pruning` and every package above it. Imports `models`, `store`, `runtime`.
"""
