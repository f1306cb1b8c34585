"""Arithmetic problems: their answers are generated, extracted and checked."""
