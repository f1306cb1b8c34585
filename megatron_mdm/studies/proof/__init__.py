"""One borrowed GPU: that everything runs there, and how fast."""
