"""What Megatron's layer spec is built of: norms, feed-forward block, linear layers.

Shapes: S sequence, B batch, H hidden, N heads, D width of a head, F inner width of this rank.
Megatron is [S, B, ...] inside.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_mdm.model.attention import ScaledDotProductCoreAttention
from megatron_mdm.model.block_config import BlockConfig, is_compiled
from megatron_mdm.model.elementwise import rms_norm, split_rms_norm, squared_relu, swiglu
from megatron_mdm.model.recomputation import LAYERS, Recompute
from megatron_mdm.model.scored_attention import ScoredCoreAttention


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


class WidthRMSNorm(torch.nn.Module):
    """Norm of all heads' queries or keys together, with a weight for each of their numbers.

    Every tensor-parallel rank has the weights of its heads, and their squares are summed over the
    ranks.

    Args:
        config: Megatron's configuration.
        hidden_size: Width of a head, D.
        num_heads: Heads on all ranks.
        eps: Added to the mean square.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        num_heads: int,
        eps: float = 1e-5,
        **_: Any,
    ) -> None:
        super().__init__()
        self._width, self._num_ranks = num_heads * hidden_size, config.tensor_model_parallel_size
        self.width_weight = torch.nn.Parameter(torch.ones(self._width // self._num_ranks))
        self._eps = eps
        self._compiled = is_compiled(config)

    def forward(self, heads_SBND: Tensor) -> Tensor:
        """Normalises the last two dimensions together.

        Args:
            heads_SBND: float [S, B, N, D], N the heads of this rank.

        Returns:
            The same shape and dtype.
        """
        part_SBH = heads_SBND.flatten(2)
        if self._num_ranks == 1:
            normed_SBH = rms_norm(part_SBH, self.width_weight, self._eps, compiled=self._compiled)
        else:
            normed_SBH = split_rms_norm(
                part_SBH,
                self.width_weight,
                self._eps,
                width=self._width,
                sum_over_ranks=_sum_over_tensor_ranks,
            )
        return normed_SBH.view(heads_SBND.shape)


class Activation(torch.nn.Module):
    """The activation, as a module so that selective recomputation can hook it.

    Args:
        function: One of `elementwise`.
        compiled: By torch.compile.
    """

    def __init__(self, function: Callable[..., Tensor], compiled: bool) -> None:
        super().__init__()
        self._function, self._compiled = function, compiled

    def forward(self, inner: Tensor) -> Tensor:
        """Applies it.

        Args:
            inner: float [S, B, 2 F], gates and then values, or [S, B, F] without gates.

        Returns:
            float [S, B, F].
        """
        return self._function(inner, compiled=self._compiled)


class FeedForward(torch.nn.Module):
    """The feed-forward block: SwiGLU, or two matrices with the square of ReLU between them.

    Args:
        config: Sizes.
        submodules: Classes of the linear layers.
    """

    def __init__(self, config: BlockConfig, submodules: MLPSubmodules, **_: Any) -> None:
        super().__init__()
        self._has_gate = config.gated_linear_unit
        width, inner = config.hidden_size, config.ffn_hidden_size
        column: Any = submodules.linear_fc1
        row: Any = submodules.linear_fc2
        # Two names, since the ranks' parts of gate and up projection are others than those of one.
        self._first = "linear_fc1" if self._has_gate else "linear_up"
        self.add_module(
            self._first,
            column(
                width,
                2 * inner if self._has_gate else inner,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=config.mlp_bias,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name="fc1",
            ),
        )
        function = swiglu if self._has_gate else squared_relu
        self.activation = Activation(function, config.compiled)
        self.linear_fc2 = row(
            inner,
            width,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
        )
        self.output_bias = torch.nn.Parameter(torch.zeros(width)) if config.mlp_bias else None
        self._sees_a_part = config.sequence_parallel

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Applies both matrices and the activation between them.

        Args:
            hidden_states: float [S, B, H]; the name is Megatron's.

        Returns:
            float [S, B, H], and no bias that is still to be added.
        """
        inner, _none = self.get_submodule(self._first)(hidden_states)
        output_SBH, _none = self.linear_fc2(self.activation(inner))
        if self.output_bias is not None:
            bias_H = self.output_bias
            if self._sees_a_part:
                bias_H = copy_to_tensor_model_parallel_region(bias_H)
            output_SBH = output_SBH + bias_H
        return output_SBH, None


def build_block_submodules(
    config: BlockConfig, *, causal: bool, recompute: Recompute = "none", chunk: int = 0
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
    q_norm, k_norm = _choose_norms(config)
    has_scores = config.attention_soft_cap is not None or config.attention_sink
    layer = ModuleSpec(
        module=LAYERS[recompute],
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=(
                        ScoredCoreAttention if has_scores else ScaledDotProductCoreAttention
                    ),
                    linear_proj=row,
                    q_layernorm=q_norm,
                    k_layernorm=k_norm,
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


def _sum_over_tensor_ranks(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values, group=get_tensor_model_parallel_group())
    return values


def _choose_norms(config: BlockConfig) -> tuple[Any, Any]:
    """Norms of queries and of keys."""
    if not config.qk_layernorm:
        return IdentityOp, IdentityOp
    if not config.norms_whole_width:
        return HeadRMSNorm, HeadRMSNorm
    numbers = (config.num_attention_heads, config.num_query_groups)
    q_norm, k_norm = (
        ModuleSpec(module=WidthRMSNorm, params={"num_heads": number}) for number in numbers
    )
    return q_norm, k_norm


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
