"""Text from a model and numbers about it: generation, likelihoods with standard errors, tasks."""
