"""Standalone Hugging Face model, export and import. The model file imports nothing of ours."""
