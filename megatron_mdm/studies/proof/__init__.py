"""Proof on a GPU: what is measured there, what has to travel, what is published of it."""
