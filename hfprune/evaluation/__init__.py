"""Fidelity to the dense model, lm-eval, speed and memory."""
