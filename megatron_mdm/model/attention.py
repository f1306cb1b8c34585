"""Core attention on PyTorch's fused kernels.

Shapes: S sequence, B batch, N heads, D head width. Megatron is [S, B, ...] outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_mdm.model.attention_mask import AttentionMask
from megatron_mdm.model.elementwise import Rotation, rotate


class AttentionInputs(NamedTuple):
    """What every layer of a forward pass needs to know of positions; Megatron hands it through.

    Attributes:
        mask: Bool [B, 1, 1, S] or [B, 1, S, S], True where a key may be seen, or a BlockMask, which
            excludes dropout; a mask says all there is to causality. None: all keys, or if causal
            those not after the query.
        rotation: Rotary embedding of at least S positions.
    """

    mask: AttentionMask
    rotation: Rotation


class ScaledDotProductCoreAttention(torch.nn.Module):
    """Core attention on PyTorch's fused kernels; no S x S matrix of scores is kept.

    Args:
        config: Megatron's configuration.
        layer_number: Not used; Megatron passes it.
        attn_mask_type: `causal` for AR, `no_mask` for masked diffusion.
        attention_type: Not used; Megatron passes it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **_: Any,
    ) -> None:
        super().__init__()
        self._is_causal = attn_mask_type == AttnMaskType.causal
        self._dropout = config.attention_dropout
        self._grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: AttentionInputs,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> Tensor:
        """Attends.

        Args:
            query: float [S, B, N, D]; the names are Megatron's.
            key: float [S, B, groups, D].
            value: float [S, B, groups, D].
            attention_mask: The mask, and the rotation that queries and keys have not had yet.
            attn_mask_type: Not used.

        Returns:
            float [S, B, N * D].
        """
        mask, rotation = attention_mask
        q_BNSD, k_BNSD = rotate(query, rotation), rotate(key, rotation)
        # A copy, so that the product it is a part of, queries and keys included, can be freed.
        v_BNSD = value.permute(1, 2, 0, 3).contiguous()
        dropout = self._dropout if self.training else 0.0
        if isinstance(mask, BlockMask):
            out_BNSD = _flex_attention(compiled=query.is_cuda)(
                q_BNSD, k_BNSD, v_BNSD, block_mask=mask, enable_gqa=self._grouped
            )
        elif dropout:
            # Heads differ between tensor-parallel ranks, so their dropout must differ too.
            with get_cuda_rng_tracker().fork():
                out_BNSD = self._attend(q_BNSD, k_BNSD, v_BNSD, mask, dropout)
        else:
            out_BNSD = self._attend(q_BNSD, k_BNSD, v_BNSD, mask, 0.0)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=self._is_causal and mask is None,
            enable_gqa=self._grouped,
        )


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    kernel: Any = flex_attention
    # Uncompiled, it writes out all S x S scores.
    return torch.compile(kernel, dynamic=False) if compiled else kernel
