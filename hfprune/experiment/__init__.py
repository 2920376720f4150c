"""The experiment's config, and what follows from it: the plan of its jobs, their estimate, what the store holds."""
