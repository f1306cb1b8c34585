"""Parameter, FLOP and memory counts."""
