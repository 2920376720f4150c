"""Model cards, export and upload of checkpoints."""
