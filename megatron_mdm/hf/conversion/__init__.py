"""Models in and out: import, export, and the check that both sides give the same logits."""
