"""The exported model: a masked-diffusion (or causal) transformer in plain torch.

The file imports only torch, transformers and its neighbours in the export folder. It is loaded from
there by transformers; the package itself never imports it.

Shapes: B batch, S sequence, W columns of one pass (S without a cache), H hidden, V vocabulary,
N heads, G groups of heads with one key and value, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from .caching_mdm import CacheWindow
from .configuration_mdm import MdmConfig
from .generation_mdm import MdmGeneration


def rotary_angles(position_ids_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Computes the cosines and sines of the rotary embedding in float32.

    They are computed in every forward pass rather than kept in a buffer: a buffer that is not
    saved is lost when a model is built without memory and then loaded.

    Args:
        position_ids_BS: Positions [B, S] or [1, S], integers.
        head_dim: Width D of a head, even.
        theta: Base of the frequencies.

    Returns:
        cos and sin, each [B, 1, S, D], float32, the sines of the first half with a minus sign.

    Source:
        Su et al. 2021, "RoFormer", eq. 15; half-split layout as in Megatron-Core.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids_BS.device).float() / head_dim
    inv_freq = 1.0 / (theta**exponents)
    angles = position_ids_BS[:, None, :, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to queries or keys, in float32 or wider.

    Args:
        x_BNSD: Queries or keys [B, N, S, D].
        cos: Cosines that broadcast to x; see `rotary_angles`.
        sin: Sines with their signs.

    Returns:
        The rotated tensor, in the dtype of x.
    """
    wide_BNSD = x_BNSD.to(torch.promote_types(x_BNSD.dtype, cos.dtype))
    first, second = wide_BNSD.chunk(2, dim=-1)
    # In place after the copy: memory traffic is what this costs.
    result_BNSD = torch.cat([second, first], dim=-1).mul_(sin).addcmul_(wide_BNSD, cos)
    return result_BNSD.to(x_BNSD.dtype)


def pick(x: Tensor, index_BQ: Tensor) -> Tensor:
    """Takes some columns of each sequence.

    Args:
        x: [B or 1, W, ...].
        index_BQ: int64 [B, Q].

    Returns:
        [B, Q, ...].
    """
    return x.expand(index_BQ.shape[0], *x.shape[1:])[
        torch.arange(index_BQ.shape[0], device=x.device)[:, None], index_BQ
    ]


def visible_keys(
    attention_mask: Tensor | None,
    start: int,
    stop: int,
    num_keys: int,
    is_causal: bool,
    device: torch.device,
) -> Tensor | None:
    """Tells which keys each query of a pass may see.

    Args:
        attention_mask: [B, S] with S at least `num_keys`, 1 real, 0 padding; or [B, W, `num_keys`],
            1 where a query sees a key, which is then all that counts; None: no padding.
        start: First column of the queries.
        stop: Column after the last query.
        num_keys: Number of key columns, which start at column 0.
        is_causal: A query sees no later column.
        device: Where the result lies.

    Returns:
        Bool [B or 1, 1, W, `num_keys`], or None where plain attention (causal, if there are as
        many queries as keys) is the same.
    """
    if attention_mask is None and (not is_causal or start == 0 or stop - start == 1):
        return None
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask[:, None].bool()
    queries_W1 = torch.arange(start, stop, device=device)[:, None]
    keys_K = torch.arange(num_keys, device=device)
    # A row without any key (padding on the left of a causal model) would be undefined.
    itself_WK = keys_K == queries_W1
    seen_WK = keys_K <= queries_W1 if is_causal else torch.ones_like(itself_WK)
    if attention_mask is None:
        return (seen_WK | itself_WK)[None, None]
    return (attention_mask[:, None, None, :num_keys].bool() & seen_WK) | itself_WK


class MdmAttention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions."""

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.is_causal = config.is_causal
        query_size = self.num_heads * self.head_dim
        group_size = self.num_groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, group_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, group_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = self._head_norm(config)
        self.k_norm = self._head_norm(config)

    def forward(
        self,
        hidden_BWH: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        picked_BQ: Tensor | None = None,
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            hidden_BWH: Normed hidden states.
            rotary: Cosines and sines of their positions.
            mask: See `visible_keys`.
            store: Takes the keys and values of the window and gives those of all columns; None:
                the window is all there is.
            picked_BQ: Columns of the window that ask, int64; None: all.

        Returns:
            What the block adds to the residual stream, [B, W, H], or [B, Q, H].
        """
        asking, angles = hidden_BWH, rotary
        if picked_BQ is not None:
            asking = pick(hidden_BWH, picked_BQ)
            cos, sin = (pick(angle[:, 0], picked_BQ)[:, None] for angle in rotary)
            angles = (cos, sin)
            mask = None if mask is None else pick(mask[:, 0], picked_BQ)[:, None]
        query_BNWD = rotate(self.q_norm(self._heads(self.q_proj(asking))), *angles)
        key_BGKD = rotate(self.k_norm(self._heads(self.k_proj(hidden_BWH))), *rotary)
        value_BGKD = self._heads(self.v_proj(hidden_BWH))
        if store is not None:
            key_BGKD, value_BGKD = store(key_BGKD, value_BGKD)
        if picked_BQ is not None and self.is_causal and mask is None:
            # The kernels' own causal order is that of all columns.
            first = key_BGKD.shape[2] - hidden_BWH.shape[1]
            keys_K = torch.arange(key_BGKD.shape[2], device=picked_BQ.device)
            mask = (keys_K <= first + picked_BQ[:, :, None])[:, None]
        repeats = self.num_heads // self.num_groups
        if repeats > 1 and query_BNWD.is_cuda:
            # Of torch's kernels for GPUs only that without masks, in half precision, takes groups.
            key_BGKD = key_BGKD.repeat_interleave(repeats, dim=1)
            value_BGKD = value_BGKD.repeat_interleave(repeats, dim=1)
        is_square = query_BNWD.shape[2] == key_BGKD.shape[2]
        mixed_BNWD = F.scaled_dot_product_attention(
            query_BNWD,
            key_BGKD,
            value_BGKD,
            attn_mask=mask,
            is_causal=self.is_causal and mask is None and is_square,
            enable_gqa=query_BNWD.shape[1] > key_BGKD.shape[1],
        )
        return self.o_proj(mixed_BNWD.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @staticmethod
    def _head_norm(config: MdmConfig) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        return nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)


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
        self,
        hidden_BWH: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        picked_BQ: Tensor | None = None,
    ) -> Tensor:
        """Maps [B, W, H] to [B, W, H], or to the picked columns [B, Q, H]."""
        normed_BWH = self.input_layernorm(hidden_BWH)
        mixed = self.self_attn(normed_BWH, rotary, mask, store, picked_BQ)
        hidden = hidden_BWH if picked_BQ is None else pick(hidden_BWH, picked_BQ)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class MdmBackbone(nn.Module):
    """Embedding, blocks and final norm. The embedding has a row for the mask token.

    Attributes:
        takes_key_masks: Masks may say which keys each query sees.
    """

    takes_key_masks = True

    def __init__(self, config: MdmConfig) -> None:
        super().__init__()
        self.config = config
        num_rows = max(config.padded_vocab_size, config.mask_token_id + 1)
        self.embed_tokens = nn.Embedding(num_rows, config.hidden_size)
        self.layers = nn.ModuleList(MdmLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        window: CacheWindow | None = None,
        picked_BQ: Tensor | None = None,
    ) -> Tensor:
        """Computes the hidden states of all columns, or of a window of them.

        Args:
            input_ids: Tokens [B, W], of the columns from `window.start` on.
            attention_mask: [B, S] over all columns, 1 real, 0 padding; or [B, W, K], 1 where a
                column of the window sees one of the K columns; None: no padding.
            position_ids: Rotary positions [B or 1, W]; default: the columns.
            window: Holds the keys and values of the other columns, and takes those of these. None:
                there are no other columns.
            picked_BQ: Columns of the window, int64, whose hidden states are wanted: of the others
                the last block computes keys and values alone. None: all.

        Returns:
            Normed hidden states [B, W, H], or [B, Q, H].
        """
        start = 0 if window is None else window.start
        stop = start + input_ids.shape[1]
        num_keys = stop if window is None else window.num_keys
        if position_ids is None:
            position_ids = torch.arange(start, stop, device=input_ids.device)[None]
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        mask = visible_keys(
            attention_mask, start, stop, num_keys, self.config.is_causal, input_ids.device
        )
        hidden_BWH = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            store = None if window is None else partial(window.store, index)
            is_last = index == len(self.layers) - 1
            hidden_BWH = layer(hidden_BWH, rotary, mask, store, picked_BQ if is_last else None)
        return self.norm(hidden_BWH)


class MdmForMaskedLM(MdmGeneration):
    """Masked-diffusion language model: logits of the original token at every position.

    With `config.is_causal` the same class holds an autoregressive baseline, whose logits are those
    of the next token. `generate` and `infill` are described in `generation_mdm`.
    """

    config_class = MdmConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["MdmLayer"]  # noqa: RUF012

    def __init__(self, config: MdmConfig) -> None:
        super().__init__(config)
        self.model = MdmBackbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
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
        logits_BSV = self.output_logits(self.model(input_ids, attention_mask, position_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits_BSV)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Maps normed hidden states [.., H] to logits [.., V], -inf for a mask token among them."""
        if self.config.tie_word_embeddings:
            head = self.model.embed_tokens.weight
        else:
            head = self.lm_head.weight
        # What stands beyond V is the mask's row or no token's.
        logits = F.linear(hidden, head[: self.config.vocab_size])
        if self.config.mask_token_id < self.config.vocab_size:
            mask_id = torch.tensor(self.config.mask_token_id, device=logits.device)
            logits.index_fill_(-1, mask_id, -torch.inf)
        return logits
