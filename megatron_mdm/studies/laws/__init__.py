"""Scaling laws: their forms, and fits to finished runs."""
