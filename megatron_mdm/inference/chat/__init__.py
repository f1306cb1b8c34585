"""Conversations with a fine-tuned model."""
