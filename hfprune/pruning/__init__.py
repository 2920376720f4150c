"""Criteria, scoring, budgets, allocation, refit and the cut itself."""
