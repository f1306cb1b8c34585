"""Arithmetic problems: answers that are generated, found in their texts and checked."""
