"""The experiment's config, and the artifacts that follow from it: stages, plan, estimate, what the store holds."""
