"""Formats of models: the names of their tensors, and their conversion to ours and back."""
