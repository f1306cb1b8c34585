"""The exported model: a masked-diffusion (or causal) transformer in plain torch.

The file imports only torch, transformers and its two neighbours in the export folder. It is loaded
from there by transformers; the package itself never imports it.

Shapes: B batch, S sequence, H hidden, V vocabulary, N heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_mdm import MdmConfig
from .samplers import sample, sample_left_to_right, sequence_seeds


def rotary_angles(position_ids_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Computes the cosines and sines of the rotary embedding in float32.

    They are computed in every forward pass rather than kept in a buffer: a buffer that is not
    saved is lost when a model is built without memory and then loaded.

    Args:
        position_ids_BS: Positions [B, S] or [1, S], integers.
        head_dim: Width D of a head, even.
        theta: Base of the frequencies.

    Returns:
        cos and sin, each [B, 1, S, D], float32.

    Source:
        Su et al. 2021, "RoFormer", eq. 15; half-split layout as in Megatron-Core.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids_BS.device).float() / head_dim
    inv_freq = 1.0 / (theta**exponents)
    angles = position_ids_BS[:, None, :, None].float() * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to queries or keys, in float32 or wider.

    Args:
        x_BNSD: Queries or keys [B, N, S, D].
        cos: Cosines that broadcast to x.
        sin: Sines that broadcast to x.

    Returns:
        The rotated tensor, in the dtype of x.
    """
    first, second = x_BNSD.chunk(2, dim=-1)
    turned_BNSD = torch.cat([-second, first], dim=-1)
    return (x_BNSD * cos + turned_BNSD * sin).to(x_BNSD.dtype)


class MdmAttention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions and no biases."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.is_causal = config.is_causal
        query_size = self.num_heads * self.head_dim
        group_size = self.num_groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, group_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, group_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_BSH: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Attends within each sequence; `mask` is bool, True where a query may see a key."""
        query = rotate(self._heads(self.q_proj(hidden_BSH)), *rotary)
        key = rotate(self._heads(self.k_proj(hidden_BSH)), *rotary)
        value = self._heads(self.v_proj(hidden_BSH))
        repeats = self.num_heads // self.num_groups
        if repeats > 1:
            key = key.repeat_interleave(repeats, dim=1)
            value = value.repeat_interleave(repeats, dim=1)
        mixed_BNSD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.is_causal and mask is None
        )
        return self.o_proj(mixed_BNSD.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MdmMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Maps [B, S, H] to [B, S, H]."""
        return self.down_proj(F.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH))


class MdmLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MdmAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MdmMlp(config)

    def forward(
        self, hidden_BSH: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Maps [B, S, H] to [B, S, H]."""
        hidden_BSH = hidden_BSH + self.self_attn(self.input_layernorm(hidden_BSH), rotary, mask)
        return hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH))


class MdmBackbone(nn.Module):
    """Embedding, blocks and final norm. The embedding has a row for the mask token."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.config = config
        num_rows = max(config.vocab_size, config.mask_token_id + 1)
        self.embed_tokens = nn.Embedding(num_rows, config.hidden_size)
        self.layers = nn.ModuleList(MdmLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Maps tokens [B, S] to normed hidden states [B, S, H]."""
        seq_length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seq_length, device=input_ids.device)[None]
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None, :].bool().expand(-1, 1, seq_length, -1)
            if self.config.is_causal:
                mask = mask.tril()
            # A row without any key (padding on the left of a causal model) would be undefined.
            mask = mask | torch.eye(seq_length, dtype=torch.bool, device=mask.device)
        hidden_BSH = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH, rotary, mask)
        return self.norm(hidden_BSH)


class MdmForMaskedLM(PreTrainedModel):
    """Masked-diffusion language model: logits of the original token at every position.

    With `config.is_causal` the same class holds an autoregressive baseline, whose logits are those
    of the next token.
    """

    config_class = MdmConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["MdmLayer"]  # noqa: RUF012

    def __init__(self, config: MdmConfig) -> None:
        super().__init__(config)
        self.model = MdmBackbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding, which has one row more than the output layer for the mask."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the output layer, or None when the embedding takes its place."""
        return None if self.config.tie_word_embeddings else self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predicts the token at every position (of the next one if the model is causal).

        Args:
            input_ids: Tokens [B, S], int64, in 0..V-1 or `mask_token_id`.
            attention_mask: [B, S], 1 real, 0 padding, which real tokens never see; None: no
                padding. Logits at padding mean nothing.
            labels: Targets [B, S], int64, compared position by position (shift them yourself for
                a causal model); -100 is left out.
            position_ids: Rotary positions [B, S] or [1, S]; default 0..S-1.

        Returns:
            `logits` [B, S, V], with -inf for a mask token inside the vocabulary, and `loss`, the
            cross entropy averaged over the labels, in nats, if there are labels.
        """
        hidden_BSH = self.model(input_ids, attention_mask, position_ids)
        if self.config.tie_word_embeddings:
            head_VH = self.model.embed_tokens.weight[: self.config.vocab_size]
        else:
            head_VH = self.lm_head.weight
        logits_BSV = F.linear(hidden_BSH, head_VH)
        if self.config.mask_token_id < self.config.vocab_size:
            mask_id = torch.tensor(self.config.mask_token_id, device=logits_BSV.device)
            logits_BSV = logits_BSV.index_fill(-1, mask_id, -torch.inf)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits_BSV)

    @torch.no_grad()
    def infill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_steps: int | None = None,
        order: str = "confidence",
        temperature: float = 0.0,
        guidance_scale: float = 0.0,
        prompt_mask: Tensor | None = None,
        block_length: int | None = None,
        seed: int = 0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Fills every mask token; see `samplers.sample` for the orders.

        Args:
            input_ids: Tokens [B, S], int64, with any pattern of `config.mask_token_id`.
            attention_mask: [B, S], 1 real, 0 padding.
            num_steps: Most forward passes; default one per mask of the fullest sequence.
            order: Which positions are revealed first.
            temperature: 0 picks the best token; above 0 samples.
            guidance_scale: Weight w of classifier-free guidance; 0 is off.
            prompt_mask: Bool [B, S], what guidance hides from the unconditional pass; default
                every token given.
            block_length: Fill blocks of this many masks from left to right.
            seed: Sequence i draws from a stream of (seed, i), whatever the batch size.
            callback: Called after every step with its index and a copy of the tokens.

        Returns:
            Filled tokens [B, S].

        Raises:
            ValueError: The model is causal, the sequence too long or an option out of range.
        """
        if self.config.is_causal:
            raise ValueError(
                "is_causal=True: an autoregressive model cannot fill masks, use generate without "
                "a suffix."
            )
        self._check_length(input_ids.shape[1])
        is_mask = input_ids == self.config.mask_token_id
        most_masks = int(is_mask.sum(dim=1).max()) if is_mask.numel() else 0
        return sample(
            lambda x: self(x, attention_mask=attention_mask).logits,
            input_ids,
            mask_token_id=self.config.mask_token_id,
            num_steps=max(most_masks, 1) if num_steps is None else num_steps,
            order=order,
            temperature=temperature,
            vocab_size=self.config.vocab_size,
            guidance_scale=guidance_scale,
            prompt_mask_BS=~is_mask if prompt_mask is None else prompt_mask,
            block_length=block_length,
            seeds=sequence_seeds(seed, input_ids.shape[0]),
            callback=callback,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 64,
        suffix_ids: Tensor | None = None,
        num_steps: int | None = None,
        order: str = "confidence",
        temperature: float = 0.0,
        guidance_scale: float = 0.0,
        block_length: int | None = None,
        seed: int = 0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Continues a prompt, or fills the middle between a prompt and a suffix.

        Mask tokens are put after the prompt and filled by `infill`. A causal model samples from
        left to right instead, stops at `config.eos_token_id` and takes no suffix; `num_steps`,
        `order` and `block_length` then mean nothing.

        Args:
            input_ids: Prompt [B, P], int64, P at least 0 (1 if causal); may hold mask tokens.
            max_new_tokens: Number of tokens to generate, at least 1.
            suffix_ids: Tokens [B, Q] that follow the generated ones.
            num_steps: See `infill`.
            order: See `infill`.
            temperature: See `infill`.
            guidance_scale: See `infill`.
            block_length: See `infill`.
            seed: See `infill`.
            callback: See `infill`.

        Returns:
            Prompt, new tokens and suffix, [B, P + `max_new_tokens` + Q]; shorter if every
            sequence of a causal model ended.

        Raises:
            ValueError: The sequence is too long or an option does not fit the model.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
        if self.config.is_causal:
            if suffix_ids is not None or guidance_scale != 0.0:
                raise ValueError(
                    "is_causal=True: an autoregressive model takes neither a suffix nor guidance."
                )
            self._check_length(input_ids.shape[1] + max_new_tokens)
            return sample_left_to_right(
                lambda x: self(x).logits,
                input_ids,
                max_new_tokens=max_new_tokens,
                mask_token_id=self.config.mask_token_id,
                temperature=temperature,
                vocab_size=self.config.vocab_size,
                eos_token_id=self.config.eos_token_id,
                seeds=sequence_seeds(seed, input_ids.shape[0]),
                callback=callback,
            )
        masks = input_ids.new_full((input_ids.shape[0], max_new_tokens), self.config.mask_token_id)
        parts = [input_ids, masks] if suffix_ids is None else [input_ids, masks, suffix_ids]
        return self.infill(
            torch.cat(parts, dim=1),
            num_steps=num_steps,
            order=order,
            temperature=temperature,
            guidance_scale=guidance_scale,
            block_length=block_length,
            seed=seed,
            callback=callback,
        )

    def _check_length(self, seq_length: int) -> None:
        if seq_length > self.config.max_position_embeddings:
            raise ValueError(
                f"The sequence has {seq_length} tokens, more than "
                f"max_position_embeddings={self.config.max_position_embeddings}: generate fewer "
                "tokens or shorten the prompt."
            )
