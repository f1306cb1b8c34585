"""Megatron's configuration with what our blocks want to know besides."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class BlockConfig(TransformerConfig):
    """Configuration that Megatron hands to every block.

    Attributes:
        compiled: Do norms, rotary embeddings and activations go through torch.compile?
        norms_whole_width: Do norms of queries and keys span all heads?
        mlp_bias: Has the feed-forward block biases?
        attention_soft_cap: What attention scores stay below; None: nothing bounds them.
        attention_sink: Does each head have a learned key and value besides?
    """

    compiled: bool = False
    norms_whole_width: bool = False
    mlp_bias: bool = False
    attention_soft_cap: float | None = None
    attention_sink: bool = False


def is_compiled(config: TransformerConfig) -> bool:
    """Reads `compiled` from a configuration that may be Megatron's own.

    Args:
        config: What a block was given.

    Returns:
        False for a configuration without the field.
    """
    return isinstance(config, BlockConfig) and config.compiled
