"""Evaluation: likelihoods with standard errors, tasks, and tables that a second run repeats."""
