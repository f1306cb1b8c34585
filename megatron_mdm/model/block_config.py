"""Megatron's configuration with what our blocks want to know besides."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class BlockConfig(TransformerConfig):
    """Configuration that Megatron hands to every block.

    Attributes:
        compiled: Do norms, rotary embeddings and SwiGLU go through torch.compile?
    """

    compiled: bool = False


def is_compiled(config: TransformerConfig) -> bool:
    """Reads `compiled` from a configuration that may be Megatron's own.

    Args:
        config: What a block was given.

    Returns:
        False for a configuration without the field.
    """
    return isinstance(config, BlockConfig) and config.compiled
