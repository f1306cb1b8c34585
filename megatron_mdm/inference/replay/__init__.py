"""The replay page: how each generated text came about, step by step."""
