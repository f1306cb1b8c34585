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
        scales_1B1 = scales_BL[:, self.layer_number - 1].to(output_SBH.dtype)[None, :, None]
        return torch.lerp(hidden_states, output_SBH, scales_1B1), context
