"""Core attention whose scores are capped, or with a learned key that all queries see.

PyTorch's fused kernels do neither. On a GPU FlexAttention computes both without a matrix of scores;
on a CPU, with dropout, and for heads that are too narrow for it, the scores of a window or of a
segment are written out.

Shapes: S sequence, B batch, N heads, G key and value heads, R = N / G, K keys, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from megatron_mdm.model.attention import ScaledDotProductCoreAttention, run_flex_attention
from megatron_mdm.model.attention_mask import suits_flex_attention
from megatron_mdm.model.block_config import BlockConfig


class ScoredCoreAttention(ScaledDotProductCoreAttention):
    """Core attention with scores c tanh(s / c) for a cap c, and a sink.

    The sink is a key and a value of each of the G heads, without a position. It takes part in the
    softmax like those of a token that every query sees.

    Args:
        config: Says which of both there is.
        *args: As those of the base class.
        **kwargs: As those of the base class.

    Source:
        The cap: arXiv 2408.00118, section 2. The sink: arXiv 2512.10858, published code.
    """

    def __init__(self, config: BlockConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._cap = config.attention_soft_cap
        self.sink_key: torch.nn.Parameter | None = None
        self.sink_value: torch.nn.Parameter | None = None
        if config.attention_sink:
            num_groups = config.num_query_groups or config.num_attention_heads
            shape = (num_groups // config.tensor_model_parallel_size, config.kv_channels)
            self.sink_key = torch.nn.Parameter(torch.zeros(shape))
            self.sink_value = torch.nn.Parameter(torch.zeros(shape))

    def _attend(
        self,
        q_BNSD: Tensor,
        k_BGKD: Tensor,
        v_BGKD: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        dropout: float,
    ) -> Tensor:
        has_mask = mask is not None or is_causal
        if not has_mask and suits_flex_attention(q_BNSD.device, q_BNSD.shape[-1], dropout):
            return self._attend_blocks(q_BNSD, k_BGKD, v_BGKD, None)
        num_keys = k_BGKD.shape[2]
        scores_BGRSK = self._score(q_BNSD, k_BGKD)
        if is_causal:
            mask = mask_later_keys(scores_BGRSK)
        if mask is not None:
            scores_BGRSK = scores_BGRSK.masked_fill(~mask.unsqueeze(-3), -torch.inf)
        if self.sink_key is not None:
            sink_BGRS1 = self._score(q_BNSD, self.sink_key.unsqueeze(1))
            scores_BGRSK = torch.cat([scores_BGRSK, sink_BGRS1], dim=-1)
        wide = torch.promote_types(scores_BGRSK.dtype, torch.float32)
        weights_BGRSK = scores_BGRSK.softmax(dim=-1, dtype=wide).to(q_BNSD.dtype)
        weights_BGRSK = F.dropout(weights_BGRSK, dropout)
        out_BGRSD = weights_BGRSK[..., :num_keys] @ v_BGKD.unsqueeze(2)
        if self.sink_value is not None:
            out_BGRSD = out_BGRSD + weights_BGRSK[..., num_keys:] * self.sink_value[:, None, None]
        return out_BGRSD.flatten(1, 2)

    def _attend_blocks(
        self, q_BNSD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: BlockMask | None
    ) -> Tensor:
        out_BNSD, found = run_flex_attention(
            q_BNSD,
            k_BGKD,
            v_BGKD,
            score_mod=None if self._cap is None else _make_score_mod(self._cap),
            block_mask=mask,
            enable_gqa=self._grouped,
            return_aux=AuxRequest(lse=True),
        )
        if self.sink_key is None or self.sink_value is None:
            return out_BNSD
        # The sink's part of the softmax over itself and what the kernel has summed up.
        sink_BNS1 = self._score(q_BNSD, self.sink_key.unsqueeze(1)).flatten(1, 2)
        share_BNS1 = torch.sigmoid(sink_BNS1 - found.lse.unsqueeze(-1)).to(out_BNSD.dtype)
        values_N1D = self.sink_value.repeat_interleave(out_BNSD.shape[1] // len(self.sink_value), 0)
        return torch.lerp(out_BNSD, values_N1D.unsqueeze(1).expand_as(out_BNSD), share_BNS1)

    def _score(self, q_BNSD: Tensor, k_GKD: Tensor) -> Tensor:
        """Scores of keys [..., G, K, D] under the cap: [B, G, R, S, K]."""
        q_BGRSD = q_BNSD.unflatten(1, (k_GKD.shape[-3], -1))
        scores = q_BGRSD * q_BNSD.shape[-1] ** -0.5 @ k_GKD.unsqueeze(-3).mT
        return scores if self._cap is None else cap_scores(scores, self._cap)


def cap_scores(scores: Tensor, cap: float) -> Tensor:
    """Bends scores so that they stay between -cap and cap."""
    return cap * torch.tanh(scores / cap)


def mask_later_keys(scores: Tensor) -> Tensor:
    """Bool [1, S, K], True where query i meets a key up to i, for scores [..., S, K]."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None]


@functools.cache
def _make_score_mod(cap: float) -> Callable[..., Tensor]:
    # One function for each cap: PyTorch compiles a kernel for every function that it meets.
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return cap_scores(score, cap)

    return score_mod
