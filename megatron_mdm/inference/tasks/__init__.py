"""Tasks of lm-evaluation-harness, with recipes and the noise of their metrics."""
