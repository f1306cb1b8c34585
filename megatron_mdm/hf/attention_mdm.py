"""Attention with rotary positions, over all columns of a batch or over a window of them.

The file travels with every export and imports nothing but its neighbours there.

Shapes: B batch, S sequence, W columns of one pass (S without a cache), H hidden, V vocabulary,
N heads, G groups of heads with one key and value, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mdm import MdmConfig


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
    """Picks some columns of each sequence.

    Args:
        x: [B or 1, W, ...].
        index_BQ: int64 [B, Q].

    Returns:
        [B, Q, ...].
    """
    return x.expand(index_BQ.shape[0], *x.shape[1:])[
        torch.arange(index_BQ.shape[0], device=x.device)[:, None], index_BQ
    ]


def find_visible_keys(
    attention_mask: Tensor | None,
    start: int,
    stop: int,
    num_keys: int,
    is_causal: bool,
    device: torch.device,
) -> Tensor | None:
    """Finds which keys each query of a pass may see.

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


def attention_weights(
    query_BNWD: Tensor,
    key_BGKD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    soft_cap: float | None = None,
    sink_key_GD: Tensor | None = None,
) -> Tensor:
    """Computes the weight of every key, which the attention kernels never write out.

    Args:
        query_BNWD: Rotated queries.
        key_BGKD: Rotated keys; each of the G serves N / G heads.
        mask: See `find_visible_keys`.
        is_causal: Without a mask, query i sees the keys up to i.
        soft_cap: Cap of the scores.
        sink_key_GD: A key of each of the G that all queries see, the last of K + 1; None: none.

    Returns:
        Weights [B, N, W, K or K + 1] that sum to 1 over the keys, in the dtype of the queries.
    """
    repeats, num_keys = query_BNWD.shape[1] // key_BGKD.shape[1], key_BGKD.shape[2]
    if sink_key_GD is not None:
        sink_BG1D = sink_key_GD[None, :, None].expand(key_BGKD.shape[0], -1, -1, -1)
        key_BGKD = torch.cat([key_BGKD, sink_BG1D], dim=2)
    key_BNKD = key_BGKD.repeat_interleave(repeats, dim=1)
    scores_BNWK = query_BNWD @ key_BNKD.transpose(-1, -2) / query_BNWD.shape[-1] ** 0.5
    if soft_cap is not None:
        scores_BNWK = soft_cap * torch.tanh(scores_BNWK / soft_cap)
    if mask is None and is_causal:
        shape = (query_BNWD.shape[2], num_keys)
        mask = torch.ones(shape, dtype=torch.bool, device=key_BGKD.device).tril()
    if mask is not None:
        if sink_key_GD is not None:
            mask = F.pad(mask, (0, 1), value=True)
        scores_BNWK = scores_BNWK.masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(scores_BNWK.dtype, torch.float32)
    return scores_BNWK.softmax(dim=-1, dtype=wide).to(query_BNWD.dtype)


class AttentionInputs(NamedTuple):
    """What attention needs of a pass besides the hidden states of its columns.

    Attributes:
        rotary: Cosines and sines of their positions.
        mask: See `find_visible_keys`.
        store: Takes the keys and values of the window and gives those of all columns; None: the
            window is all there is.
        picked_BQ: Columns of the window that ask, int64; None: all.
        weights: Takes the attention weights [B, N, W, K] at its end, without that of a sink; None:
            they are not computed.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    picked_BQ: Tensor | None = None
    weights: list[Tensor] | None = None


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
        self.norms_whole_width = config.qk_norm == "width"
        self.q_norm = self._make_norm(config, query_size)
        self.k_norm = self._make_norm(config, group_size)
        self.soft_cap = config.attention_soft_cap
        self.sink_key = self._make_sink(config)
        self.sink_value = self._make_sink(config)

    def forward(self, hidden_BWH: Tensor, inputs: AttentionInputs) -> Tensor:
        """Attends within each sequence.

        Args:
            hidden_BWH: Normed hidden states.
            inputs: What else the pass has.

        Returns:
            What the block adds to the residual stream, [B, W, H], or [B, Q, H].
        """
        rotary, mask, store, picked_BQ, weights = inputs
        asking, angles = hidden_BWH, rotary
        if picked_BQ is not None:
            asking = pick(hidden_BWH, picked_BQ)
            cos, sin = (pick(angle[:, 0], picked_BQ)[:, None] for angle in rotary)
            angles = (cos, sin)
            mask = None if mask is None else pick(mask[:, 0], picked_BQ)[:, None]
        query_BNWD = rotate(self._split_normed(self.q_proj(asking), self.q_norm), *angles)
        key_BGKD = rotate(self._split_normed(self.k_proj(hidden_BWH), self.k_norm), *rotary)
        value_BGKD = self._split_heads(self.v_proj(hidden_BWH))
        if store is not None:
            key_BGKD, value_BGKD = store(key_BGKD, value_BGKD)
        if picked_BQ is not None and self.is_causal and mask is None:
            # The kernels' causal mask assumes queries of all columns, so write it out.
            first = key_BGKD.shape[2] - hidden_BWH.shape[1]
            keys_K = torch.arange(key_BGKD.shape[2], device=picked_BQ.device)
            mask = (keys_K <= first + picked_BQ[:, :, None])[:, None]
        is_square = query_BNWD.shape[2] == key_BGKD.shape[2]
        is_causal = self.is_causal and mask is None and is_square
        if self.soft_cap is not None or self.sink_key is not None:
            found = self._attend_by_scores(query_BNWD, key_BGKD, value_BGKD, mask, is_causal)
            if weights is not None:
                weights.append(found[1])
            return self.o_proj(found[0].transpose(1, 2).flatten(2))
        repeats = self.num_heads // self.num_groups
        if repeats > 1 and query_BNWD.is_cuda:
            # On GPUs only torch's kernel without masks, in half precision, takes groups of heads.
            key_BGKD = key_BGKD.repeat_interleave(repeats, dim=1)
            value_BGKD = value_BGKD.repeat_interleave(repeats, dim=1)
        if weights is not None:
            weights.append(attention_weights(query_BNWD, key_BGKD, mask, is_causal))
        mixed_BNWD = F.scaled_dot_product_attention(
            query_BNWD,
            key_BGKD,
            value_BGKD,
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=query_BNWD.shape[1] > key_BGKD.shape[1],
        )
        return self.o_proj(mixed_BNWD.transpose(1, 2).flatten(2))

    def _attend_by_scores(
        self,
        query_BNWD: Tensor,
        key_BGKD: Tensor,
        value_BGKD: Tensor,
        mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attends as no kernel of torch does; gives also the weights [B, N, W, K] of the tokens."""
        num_keys, repeats = key_BGKD.shape[2], self.num_heads // self.num_groups
        weights = attention_weights(
            query_BNWD, key_BGKD, mask, is_causal, self.soft_cap, self.sink_key
        )
        mixed = weights[..., :num_keys] @ value_BGKD.repeat_interleave(repeats, dim=1)
        if self.sink_value is not None:
            sink_N1D = self.sink_value.repeat_interleave(repeats, dim=0)[:, None]
            mixed = mixed + weights[..., num_keys:] * sink_N1D
        return mixed, weights[..., :num_keys]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _split_normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        return self._split_heads(norm(x)) if self.norms_whole_width else norm(self._split_heads(x))

    @staticmethod
    def _make_norm(config: MdmConfig, width: int) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        whole = config.qk_norm == "width"
        return nn.RMSNorm(width if whole else config.head_dim, eps=config.rms_norm_eps)

    @staticmethod
    def _make_sink(config: MdmConfig) -> nn.Parameter | None:
        if not config.attention_sink:
            return None
        return nn.Parameter(torch.zeros(config.num_key_value_heads, config.head_dim))
