"""Configuration of exported models. The file travels with each: it imports only transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MdmConfig(PretrainedConfig):
    """Sizes and token ids of a masked-diffusion (or causal) language model.

    Args:
        vocab_size: Number V of real tokens, ids 0..V-1; the logits have V columns.
        mask_token_id: Id of the mask token; default the row after the vocabulary's. An id below V
            gets the logit -inf.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; default `num_attention_heads`.
        head_dim: Width of a head, even; default hidden_size / num_attention_heads.
        intermediate_size: Inner width of the feed-forward layer.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary position embedding.
        max_position_embeddings: Longest sequence that training saw, in tokens.
        tie_word_embeddings: The first V rows of the embedding are the output layer.
        is_causal: Attention sees no later position (an autoregressive baseline).
        qkv_bias: The query, key and value projections have biases.
        qk_norm: Each head's queries and keys pass an RMSNorm before the rotary embedding;
            "width": those of all heads together.
        attention_soft_cap: Cap c of attention scores s, which become c tanh(s / c); None: none.
        attention_sink: Each key and value head has a learned key and value that all tokens see.
        mlp: "swiglu", or "relu2": the square of ReLU between two matrices.
        mlp_bias: The feed-forward layer has biases.
        time_embedding: An embedding of the log-SNR of the noise is added to those of the tokens.
        eos_token_id: Id that ends a document, if any.
        pad_token_id: Id that fills up batches, if any.
        padded_vocab_size: Rows of the vocabulary, at least V; default V. Those from V on stand for
            no token and have no logit.
        unused_token_ids: First id below V that no token uses, and the id after the last one: their
            logits are -inf. A vocabulary that is resized gets them from its rows without a token.
        noise: What takes the place of tokens in training, as `interpolation.read_noise` reads it;
            None: the mask token alone.
        run_ways: How a model runs that was trained for both: `ar`, where `is_causal` is true,
            `mdm`, where it is false, and `prefix`; None: in the one way that `is_causal` says.
        is_shifted: Where attention is not causal, the hidden state of a position predicts the token
            after it all the same, so that the first token of a text has no prediction.
        prefix_lm: With `is_causal`, the tokens of a prompt see each other in generation.
        **kwargs: Fields of `PretrainedConfig`.
    """

    model_type = "megatron_mdm"

    def __init__(
        self,
        vocab_size: int = 50257,
        mask_token_id: int | None = None,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = False,
        is_causal: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool | str = False,
        attention_soft_cap: float | None = None,
        attention_sink: bool = False,
        mlp: str = "swiglu",
        mlp_bias: bool = False,
        time_embedding: bool = False,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        padded_vocab_size: int | None = None,
        unused_token_ids: list[int] | None = None,
        noise: dict[str, Any] | None = None,
        run_ways: list[str] | None = None,
        is_shifted: bool = False,
        prefix_lm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        rows = vocab_size if padded_vocab_size is None else padded_vocab_size
        self.padded_vocab_size = rows
        self.mask_token_id = rows if mask_token_id is None else mask_token_id
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.tie_word_embeddings = tie_word_embeddings
        self.is_causal = is_causal
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.attention_soft_cap = attention_soft_cap
        self.attention_sink = attention_sink
        self.mlp = mlp
        self.mlp_bias = mlp_bias
        self.time_embedding = time_embedding
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.unused_token_ids = unused_token_ids
        self.noise = noise
        self.run_ways = run_ways
        self.is_shifted = is_shifted
        self.prefix_lm = prefix_lm
