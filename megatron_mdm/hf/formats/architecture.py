"""The sizes from which every parameter's name and shape follow, in any format."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConversionError


@dataclass(frozen=True)
class Architecture:
    """The sizes that fix every parameter's shape, and what a config.json needs besides.

    Args:
        num_layers: Number of blocks.
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of query heads, a multiple of `num_query_groups`.
        num_query_groups: Number of key and value heads.
        head_dim: Width of a head, even.
        ffn_hidden_size: Width of the SwiGLU layer.
        vocab_size: Number V of real tokens, ids 0..V-1.
        mask_token_id: Id of the mask token: R, the row after the vocabulary's, or one of these.
        tied: The first V rows of the embedding are the output layer.
        is_causal: An autoregressive baseline.
        max_position_embeddings: Sequence length of training, in tokens.
        rms_norm_eps: Epsilon of every RMSNorm.
        rotary_base: Base of the rotary position embedding.
        embedding_rows: Rows of the training embedding with padding, at least
            max(R, `mask_token_id` + 1).
        head_rows: Rows of the training output layer with padding, at least R.
        qkv_bias: Queries, keys and values have biases.
        qk_norm: Each head's queries and keys pass an RMSNorm.
        padded_vocab_size: Number R of the vocabulary's rows, at least V, of which those from V on
            are never predicted; None: V.

    Raises:
        ConversionError: The sizes contradict each other.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    mask_token_id: int
    tied: bool
    is_causal: bool
    max_position_embeddings: int
    rms_norm_eps: float
    rotary_base: float
    embedding_rows: int
    head_rows: int
    qkv_bias: bool = False
    qk_norm: bool = False
    padded_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"num_query_groups={self.num_query_groups} does not divide "
                f"num_attention_heads={self.num_attention_heads}: correct the architecture."
            )
        if self.head_dim % 2:
            raise ConversionError(
                f"head_dim={self.head_dim} is odd, rotary positions need pairs: use an even one."
            )
        if self.vocabulary_rows < self.vocab_size:
            raise ConversionError(
                f"padded_vocab_size={self.padded_vocab_size} is less than "
                f"vocab_size={self.vocab_size}: correct the architecture."
            )
        if self.embedding_rows < self.exported_embedding_rows:
            raise ConversionError(
                f"embedding_rows={self.embedding_rows} is less than the "
                f"{self.exported_embedding_rows} rows that a vocabulary of {self.vocabulary_rows} "
                f"rows and mask_token_id={self.mask_token_id} need: add the mask token's row."
            )
        if not self.tied and self.head_rows < self.vocabulary_rows:
            raise ConversionError(
                f"head_rows={self.head_rows} is less than the {self.vocabulary_rows} rows of the "
                "vocabulary: correct the architecture."
            )

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the vocabulary: those of its tokens, then those that no token uses."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    @property
    def exported_embedding_rows(self) -> int:
        """Rows of the embedding without padding: the vocabulary's and the mask token's."""
        return max(self.vocabulary_rows, self.mask_token_id + 1)


def architecture_of(model: ModelConfig, *, is_causal: bool, seq_length: int) -> Architecture:
    """The sizes of a configured model.

    Args:
        model: The `model` section of a run's configuration.
        is_causal: Attention sees no later position.
        seq_length: Sequence length of training, in tokens.

    Returns:
        What names and shapes of its parameters follow from.
    """
    return Architecture(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        head_dim=model.head_width,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        mask_token_id=model.mask_id,
        tied=model.tie_embeddings,
        is_causal=is_causal,
        max_position_embeddings=seq_length,
        rms_norm_eps=model.norm_epsilon,
        rotary_base=model.rotary_base,
        embedding_rows=model.embedding_rows,
        head_rows=model.head_rows,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        padded_vocab_size=model.padded_vocab_size,
    )
