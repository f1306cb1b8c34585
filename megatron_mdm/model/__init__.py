"""Megatron-Core model: specs, attention, head, initial weights."""
