"""What Megatron's layer spec is built of: norms, feed-forward block, linear layers.

Shapes: S sequence, B batch, H hidden, F inner width of this rank. Megatron is [S, B, ...] inside.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
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
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_mdm.model.attention import ScaledDotProductCoreAttention
from megatron_mdm.model.block_config import is_compiled
from megatron_mdm.model.elementwise import rms_norm, swiglu
from megatron_mdm.model.recomputation import LAYERS, Recompute


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
        self._compiled = is_compiled(config)
        # Does this rank see a part of the sequence, and other ranks the rest?
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
        return rms_norm(hidden_SBH, weight_H, self.eps, compiled=self._compiled)


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


class SwiGLU(torch.nn.Module):
    """The activation, as a module so that selective recomputation can hook it.

    Args:
        compiled: By torch.compile.
    """

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self._compiled = compiled

    def forward(self, inner_SBF2: Tensor) -> Tensor:
        """Multiplies silu of the gates with the values.

        Args:
            inner_SBF2: float [S, B, 2 F], gates and then values.

        Returns:
            float [S, B, F].
        """
        return swiglu(inner_SBF2, compiled=self._compiled)


class FeedForward(MLP):
    """Megatron's feed-forward block around our activation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = SwiGLU(is_compiled(self.config))

    def forward(
        self, hidden_states: Tensor, per_token_scale: None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Applies both matrices and the activation between them.

        Args:
            hidden_states: float [S, B, H]; the name is Megatron's.
            per_token_scale: Not used; Megatron passes it.

        Returns:
            float [S, B, H], and no bias.
        """
        inner_SBF2, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.activation(inner_SBF2))


def build_block_submodules(
    config: TransformerConfig, *, causal: bool, recompute: Recompute = "none", chunk: int = 0
) -> TransformerBlockSubmodules:
    """Builds the spec of the layers of a chunk of this pipeline stage.

    Args:
        config: Megatron's configuration.
        causal: Left-to-right attention (AR) instead of bidirectional.
        recompute: What each layer recomputes in the backward pass.
        chunk: Which of the stage's parts of the model; 0 where there is one.

    Returns:
        Layer specs and the final norm.
    """
    column, row = _choose_linear_classes(config)
    head_norm = HeadRMSNorm if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=LAYERS[recompute],
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
            mlp=ModuleSpec(
                module=FeedForward, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=RMSNorm
    )


def _choose_linear_classes(config: TransformerConfig) -> tuple[type, type]:
    # Transformer Engine's linears keep the parameter names, so checkpoints do not depend on them.
    # Megatron-Core mocks the package where it is missing, so look for the package itself.
    if not config.use_cpu_initialization and find_spec("transformer_engine") is not None:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        return TEColumnParallelLinear, TERowParallelLinear
    return ColumnParallelLinear, RowParallelLinear
