"""Text from a model and numbers about it: generation and evaluation."""
