"""The model's shape, from a preset or field by field."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_mdm.config.presets import expand_preset, list_presets
from megatron_mdm.config.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)
from megatron_mdm.core.errors import join_problems


class ModelConfig(Section):
    """Size and shape of the transformer. A preset fills whatever is not given."""

    preset: str | None = Field(
        default=None, description="A row of a published family: smdm-170M, dc-425M, ..."
    )
    num_layers: PositiveInt = Field(description="Transformer layers.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    num_attention_heads: PositiveInt = Field(description="Query heads.")
    num_query_groups: PositiveInt | None = Field(
        default=None, description="Key and value heads; default: as many as query heads."
    )
    head_dim: PositiveInt | None = Field(
        default=None, description="Width of a head; default: hidden_size / num_attention_heads."
    )
    ffn_hidden_size: PositiveInt = Field(description="Inner width of the feed-forward block.")
    vocab_size: PositiveInt = Field(
        description="Tokens of the tokenizer, V, which the head predicts."
    )
    padded_vocab_size: PositiveInt | None = Field(
        default=None,
        description="Rows of the vocabulary, at least V: published models may have more than their "
        "tokenizer has tokens. Those from V on are kept and never predicted; default: V.",
    )
    mask_token_id: NonNegativeInt | None = Field(
        default=None,
        description="Input id of the mask token; default: a row after those of the vocabulary.",
    )
    vocab_padding_multiple: PositiveInt = Field(
        default=128,
        description="Embedding and head rows are padded to a multiple of this in any layout.",
    )
    tie_embeddings: bool = Field(default=False, description="Share embedding and head weights.")
    qkv_bias: bool = Field(
        default=False, description="Biases on queries, keys and values, as Qwen2 has them."
    )
    qk_norm: Literal[False, True, "width"] = Field(
        default=False,
        description="RMSNorm on each head's queries and keys, as Qwen3 has it; width: on those of "
        "all heads together.",
    )
    attention_soft_cap: PositiveFloat | None = Field(
        default=None,
        description="Bends attention scores s to c tanh(s / c), which stays below the cap c; "
        "default: they are as they are.",
    )
    attention_sink: bool = Field(
        default=False,
        description="A learned key and value in each key and value head, which all tokens see.",
    )
    mlp: Literal["swiglu", "relu2"] = Field(
        default="swiglu",
        description="Feed-forward block: swiglu, silu(gate) * up, of three matrices; relu2, the "
        "square of ReLU, of two.",
    )
    mlp_bias: bool = Field(default=False, description="Biases of the feed-forward block.")
    time_embedding: bool = Field(
        default=False,
        description="Add an embedding of the noise level, its log-SNR ln(a / (1 - a)) with a the "
        "chance that a token is clean, to the embeddings of the tokens; with hybrid or uniform "
        "noise.",
    )
    rotary_base: PositiveFloat = Field(default=10000.0, description="Base of the rotary angles.")
    norm_epsilon: PositiveFloat = Field(default=1e-5, description="Epsilon of RMSNorm.")
    hidden_dropout: Probability = Field(default=0.0, description="Dropout on block outputs.")
    attention_dropout: Probability = Field(default=0.0, description="Dropout on attention weights.")
    stochastic_depth: Probability = Field(
        default=0.0,
        description="Chance of a sample to pass by the last block in training, attention and MLP "
        "together; those before have less, in proportion to their number.",
    )
    init_std: PositiveFloat | None = Field(
        default=None, description="Standard deviation of initial weights; default: sqrt(2/(5d))."
    )
    output_init_std: PositiveFloat | None = Field(
        default=None,
        description="The same for attention output and MLP down projections; "
        "default: 1/(sqrt(d) * num_layers).",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("preset") is None:
            return fields
        if fields["preset"] not in list_presets():
            # Lines of an error are sentences.
            raise ValueError("preset:" + " ".join(str(fields["preset"]).split()))
        given = {key: value for key, value in fields.items() if value is not None}
        return {**expand_preset(fields["preset"]), **given}

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        problems = []
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}: choose a divisor or set model.head_dim."
            )
        elif self.head_width % 2:
            problems.append(
                f"model.head_dim={self.head_width} is odd, but rotary embeddings rotate pairs: "
                "choose an even head_dim."
            )
        if self.num_attention_heads % self.query_groups:
            problems.append(
                f"model.num_query_groups={self.num_query_groups} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}: choose a divisor."
            )
        if self.vocabulary_rows < self.vocab_size:
            problems.append(
                f"model.padded_vocab_size={self.padded_vocab_size} has no rows for all of "
                f"model.vocab_size={self.vocab_size}: use at least as many, or leave it out."
            )
        if self.mask_token_id is not None and self.mask_token_id > self.vocabulary_rows:
            field = "vocab_size" if self.padded_vocab_size is None else "padded_vocab_size"
            problems.append(
                f"model.mask_token_id={self.mask_token_id} lies beyond the embedding: use at most "
                f"model.{field}={self.vocabulary_rows}, or leave it out."
            )
        if problems:
            raise ValueError(join_problems(problems))
        return self

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def has_scores(self) -> bool:
        """Does attention do with its scores what fused kernels do not?"""
        return self.attention_soft_cap is not None or self.attention_sink

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the vocabulary: those of its tokens, then those that no token uses."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    @property
    def mask_id(self) -> int:
        """Input id of the mask token."""
        return self.vocabulary_rows if self.mask_token_id is None else self.mask_token_id

    @property
    def num_text_tokens(self) -> int:
        """Tokens that text may hold: the vocabulary without the mask token."""
        return self.vocab_size - (self.mask_id < self.vocab_size)

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embedding: vocabulary and mask token, padded."""
        return self._pad(self.vocabulary_rows + 1)

    @property
    def head_rows(self) -> int:
        """Rows of the output head: the vocabulary, padded; the embedding's rows when tied."""
        return self.embedding_rows if self.tie_embeddings else self._pad(self.vocabulary_rows)

    @property
    def weight_std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.init_std or math.sqrt(2 / (5 * self.hidden_size))

    @property
    def output_weight_std(self) -> float:
        """Standard deviation of the initial weights that write to the residual stream."""
        return self.output_init_std or 1 / (math.sqrt(self.hidden_size) * self.num_layers)

    def _pad(self, rows: int) -> int:
        return -(-rows // self.vocab_padding_multiple) * self.vocab_padding_multiple
