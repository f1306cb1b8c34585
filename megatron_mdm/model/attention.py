"""Core attention on PyTorch's fused kernels.

Shapes: S sequence, B batch, N heads, D head width, L tokens of a segment. Megatron is [S, B, ...]
outside.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_mdm.model.attention_mask import AttentionMask, Segment, Segments
from megatron_mdm.model.block_config import is_compiled
from megatron_mdm.model.compilation import compile_function
from megatron_mdm.model.elementwise import Rotation, rotate


class AttentionInputs(NamedTuple):
    """What every layer of a forward pass needs besides; Megatron hands it through.

    Attributes:
        mask: Bool [B, 1, 1, S], True where a key may be seen, for attention that is not causal.
            Bool [B, 1, S, S], a BlockMask (without dropout) or segments: these include causality.
            None: all keys, or if causal those not after the query.
        rotation: Rotary embedding of the S tokens.
        block_scales_BL: float32 [B, layers], what each sample's change of the residual stream is
            multiplied with; None: 1. For the layer, not for attention.
        is_causal: Without a mask, does a query see no key after it? None: as the layer was built.
    """

    mask: AttentionMask
    rotation: Rotation
    block_scales_BL: Tensor | None = None
    is_causal: bool | None = None


class ScaledDotProductCoreAttention(torch.nn.Module):
    """Core attention on PyTorch's fused kernels, which write out no S x S matrix.

    Two cases have no such kernel and write out the scores of a window or segment at a time:
    dropout on a CPU, and a BlockMask there, which is for tests.

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
        self._compiled = is_compiled(config)
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
        mask, rotation = attention_mask[:2]
        q_BNSD, k_BNSD = (rotate(x, rotation, compiled=self._compiled) for x in (query, key))
        # A copy, so that the product it is a part of, queries and keys included, can be freed.
        v_BNSD = value.permute(1, 2, 0, 3).contiguous()
        dropout = self._dropout if self.training else 0.0
        if isinstance(mask, BlockMask):
            return self._attend_blocks(q_BNSD, k_BNSD, v_BNSD, mask).permute(2, 0, 1, 3).flatten(2)
        # Heads differ between tensor-parallel ranks, so their dropout must differ too.
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            if isinstance(mask, Segments):
                return _attend_by_segments(q_BNSD, k_BNSD, v_BNSD, mask, dropout, self._attend)
            told = attention_mask.is_causal
            is_causal = mask is None and (self._is_causal if told is None else told)
            out_BNSD = self._attend(q_BNSD, k_BNSD, v_BNSD, mask, is_causal, dropout)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        dropout: float,
    ) -> Tensor:
        """Attends under a mask of numbers; causal: query i sees keys up to i."""
        return attend_fused(q_BNSD, k_BGSD, v_BGSD, mask, is_causal, dropout)

    def _attend_blocks(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: BlockMask
    ) -> Tensor:
        """Attends under a mask of blocks."""
        out_BNSD: Tensor = run_flex_attention(
            q_BNSD, k_BGSD, v_BGSD, block_mask=mask, enable_gqa=self._grouped
        )
        return out_BNSD


def run_flex_attention(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, **options: Any) -> Any:
    """Runs FlexAttention, compiled where there is a GPU; arguments and results are PyTorch's."""
    # For less than 128 queries PyTorch would take its kernel for decoding, which finds no tile for
    # many grouped queries (pytorch/pytorch#185349).
    return _compile_flex_attention(compiled=q_BNSD.is_cuda)(
        q_BNSD, k_BGSD, v_BGSD, kernel_options={"BACKEND": "TRITON"}, **options
    )


def attend_fused(
    q_BNSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    """Attends on PyTorch's fused kernels.

    Args:
        q_BNSD: float [B, N, S, D].
        k_BGSD: float [B, groups, S, D].
        v_BGSD: float [B, groups, S, D].
        mask: Bool, broadcast to [B, N, S, S], True where a key may be seen; None: all.
        is_causal: Without a mask: query i sees keys up to i.
        dropout: On the weights.

    Returns:
        float [B, N, S, D].
    """
    repeats = q_BNSD.shape[1] // k_BGSD.shape[1]
    if repeats > 1 and q_BNSD.is_cuda:
        asked = SDPAParams(q_BNSD, k_BGSD, v_BGSD, mask, dropout, is_causal, True)
        if not can_use_flash_attention(asked):
            # The other kernel without a matrix of scores knows no groups.
            k_BGSD, v_BGSD = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSD, v_BGSD))
            repeats = 1
    return F.scaled_dot_product_attention(
        q_BNSD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        enable_gqa=repeats > 1,
    )


def _attend_by_segments(
    q_BNSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Segments,
    dropout: float,
    attend: Callable[..., Tensor],
) -> Tensor:
    """Attends in each segment by itself: [S, B, N * D]."""
    q_parts, k_parts, v_parts = (_Cut.apply(x, mask.segments) for x in (q_BNSD, k_BGSD, v_BGSD))
    outs = [
        _attend_within(q, k, v, segment.mask, mask.lookahead, dropout, attend)
        for segment, q, k, v in zip(mask.segments, q_parts, k_parts, v_parts, strict=True)
    ]
    out_SBND: Tensor = _Join.apply(q_BNSD.shape, mask.segments, *outs)
    return out_SBND.flatten(2)


def _attend_within(
    q_1NLD: Tensor,
    k_1GLD: Tensor,
    v_1GLD: Tensor,
    mask: Tensor | None,
    lookahead: int | None,
    dropout: float,
    attend: Callable[..., Tensor],
) -> Tensor:
    length = q_1NLD.shape[2]
    if mask is not None or lookahead is None or lookahead >= length - 1:
        return attend(q_1NLD, k_1GLD, v_1GLD, mask, False, dropout)
    # Query i of causal attention sees keys up to i. Behind n padding queries, whose results are cut
    # off, it sees n keys more.
    padded_1NLD = F.pad(q_1NLD, (0, 0, lookahead, 0)) if lookahead else q_1NLD
    return attend(padded_1NLD, k_1GLD, v_1GLD, None, True, dropout)[:, :, lookahead:]


class _Cut(torch.autograd.Function):
    """Cuts a tensor into parts; their gradients are written into one tensor, not summed."""

    @staticmethod
    def forward(ctx: Any, x_BNSD: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.segments = x_BNSD.shape, segments
        return tuple(x_BNSD[b : b + 1, :, start:stop] for b, start, stop, _ in segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_BNSD = grads[0].new_empty(ctx.shape)
        for (b, start, stop, _), grad_1NLD in zip(ctx.segments, grads, strict=True):
            grad_BNSD[b, :, start:stop] = grad_1NLD[0]
        return grad_BNSD, None


class _Join(torch.autograd.Function):
    """Joins the parts of an output, in Megatron's order of dimensions."""

    @staticmethod
    def forward(
        ctx: Any, shape: Sequence[int], segments: Sequence[Segment], *parts: Tensor
    ) -> Tensor:
        ctx.segments = segments
        batch_size, num_heads, seq_length, width = shape
        out_SBND = parts[0].new_empty(seq_length, batch_size, num_heads, width)
        for (b, start, stop, _), part_1NLD in zip(segments, parts, strict=True):
            out_SBND[start:stop, b] = part_1NLD[0].transpose(0, 1)
        return out_SBND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = (
            grads[0][start:stop, b].transpose(0, 1).unsqueeze(0)
            for b, start, stop, _ in ctx.segments
        )
        return None, None, *parts


@functools.cache
def _compile_flex_attention(compiled: bool) -> Callable[..., Any]:
    kernel: Any = flex_attention
    # Uncompiled, it writes out all S x S scores.
    return compile_function(kernel, dynamic=False) if compiled else kernel
