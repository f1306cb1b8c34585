"""The block: Megatron's layer, which a sample may pass by in training.

Shapes: S sequence, B batch, H hidden, L layers of the whole network.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mdm.model.attention import AttentionInputs


class Block(TransformerLayer):
    """A layer with stochastic depth: x + s f(x), where f is what attention and MLP add to x.

    The s of each sample and layer come with the batch, 0 or 1 over the chance to stay. Nothing of a
    sample that passes by is kept, though it is computed: samples of a batch are left out at
    different layers, and ranks that hold one layer's shards have to run it together.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: AttentionInputs | None = None, **others: Any
    ) -> tuple[Tensor, Any]:
        """Runs the layer.

        Args:
            hidden_states: float [S, B, H]; the names are Megatron's.
            attention_mask: What every layer is told.
            **others: What Megatron passes besides.

        Returns:
            float [S, B, H], and the context.
        """
        output_SBH, context = super().forward(hidden_states, attention_mask, **others)
        scales_BL = None if attention_mask is None else attention_mask.block_scales_BL
        if scales_BL is None:
            return output_SBH, context
        # Numbered from 1 through all stages and chunks.
        scales_B = scales_BL[:, self.layer_number - 1]
        return scale_change(hidden_states, output_SBH, scales_B), context


def scale_change(before_SBH: Tensor, after_SBH: Tensor, scales_B: Tensor) -> Tensor:
    """Scales how a block changes the residual stream; the backward pass keeps the scales alone.

    Args:
        before_SBH: float [S, B, H], what goes into the block.
        after_SBH: The same, what comes out.
        scales_B: float32 [B]; 0 gives what goes in, 1 what comes out.

    Returns:
        before + scale (after - before), of the dtype of `after_SBH`.
    """
    # Rounded to bfloat16, a scale would be wrong by a share for the whole run.
    wide = torch.promote_types(after_SBH.dtype, scales_B.dtype)
    scales_1B1 = scales_B.to(wide)[None, :, None]
    mixed_SBH = torch.lerp(before_SBH.to(wide), after_SBH.to(wide), scales_1B1)
    return mixed_SBH.to(after_SBH.dtype)
