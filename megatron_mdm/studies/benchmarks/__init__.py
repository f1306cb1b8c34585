"""Benchmarks that time the project's own entry points against what they replace."""
