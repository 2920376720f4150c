"""Statistics, tables, figures and pages of what was measured."""
