"""Checkpoints: save, load and resume."""
