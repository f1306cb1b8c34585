"""The blocks that Megatron's layer spec is filled with: norm, core attention, and which linears.

Shapes: S sequence, B batch, H hidden, N heads, D head width. Megatron is [S, B, ...] inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_mdm.model.attention_mask import AttentionMask

try:
    # NVIDIA's apex, built from source; the PyPI package of that name has no such module.
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
except ImportError:
    fused_rms_norm_affine = None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that also works on a sequence-parallel shard.

    Args:
        config: Megatron's configuration.
        hidden_size: Width of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        # Of the sequence, where other ranks see the rest.
        self._sees_a_part = config.sequence_parallel

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Normalises the last dimension.

        Args:
            hidden_SBH: float [S, B, H], S the local part of the sequence.

        Returns:
            The same shape and dtype.
        """
        weight_H = self.weight
        if self._sees_a_part:
            # Identity forward, summed gradient backward.
            weight_H = copy_to_tensor_model_parallel_region(weight_H)
        if fused_rms_norm_affine is not None and hidden_SBH.is_cuda:
            return fused_rms_norm_affine(hidden_SBH, weight_H, weight_H.shape, self.eps)
        return F.rms_norm(hidden_SBH, weight_H.shape, weight_H, self.eps)


class HeadRMSNorm(RMSNorm):
    """Norm of each head's queries or keys, one weight of width D for all heads.

    Every tensor-parallel rank holds the weight whole and sees heads of its own, with and without
    sequence parallelism.

    Args:
        config: Megatron's configuration.
        hidden_size: Width of a head, D.
        eps: Added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(config, hidden_size, eps)
        self._sees_a_part = True


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
        attention_mask: AttentionMask = None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> Tensor:
        """Attends.

        Args:
            query: float [S, B, N, D]; the names are Megatron's.
            key: float [S, B, groups, D].
            value: float [S, B, groups, D].
            attention_mask: bool [B, 1, 1, S] or [B, 1, S, S], True where a key may be seen, or a
                BlockMask, which excludes dropout; a mask says all there is to causality. None: all
                keys, or if causal those not after the query.
            attn_mask_type: Not used.

        Returns:
            float [S, B, N * D].
        """
        q_BNSD, k_BNSD, v_BNSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self._dropout if self.training else 0.0
        if isinstance(attention_mask, BlockMask):
            out_BNSD = _flex_attention(compiled=query.is_cuda)(
                q_BNSD, k_BNSD, v_BNSD, block_mask=attention_mask, enable_gqa=self._grouped
            )
        elif dropout:
            # Heads differ between tensor-parallel ranks, so their dropout must differ too.
            with get_cuda_rng_tracker().fork():
                out_BNSD = self._attend(q_BNSD, k_BNSD, v_BNSD, attention_mask, dropout)
        else:
            out_BNSD = self._attend(q_BNSD, k_BNSD, v_BNSD, attention_mask, 0.0)
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


def block_submodules(
    config: TransformerConfig, causal: bool, chunk: int = 0
) -> TransformerBlockSubmodules:
    """The layers of a chunk of this pipeline stage.

    Args:
        config: Megatron's configuration.
        causal: Left-to-right attention (AR) instead of bidirectional.
        chunk: Which of the stage's parts of the model; 0 where there is one.

    Returns:
        Layer specs and the final norm.
    """
    column, row = _linear_classes(config)
    head_norm = HeadRMSNorm if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=ScaledDotProductCoreAttention,
                    linear_proj=row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=RMSNorm
    )


def _linear_classes(config: TransformerConfig) -> tuple[type, type]:
    # Transformer Engine's linears keep the parameter names, so checkpoints do not depend on them.
    # Without the package Megatron-Core puts mocks in its place, so it is asked for by name.
    if not config.use_cpu_initialization and find_spec("transformer_engine") is not None:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        return TEColumnParallelLinear, TERowParallelLinear
    return ColumnParallelLinear, RowParallelLinear
