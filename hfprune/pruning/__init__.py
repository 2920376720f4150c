"""Criteria, scoring, budgets, allocation, refit, the cut itself, and the methods that combine them.

Imported by `evaluation`, `recovery` and every package above them. Imports `data`, `models`, `store`, `runtime`.
"""
