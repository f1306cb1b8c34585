"""Stages of an interleaved pipeline: several chunks of the model on one rank.

With two stages of two chunks each, stage 0 holds the first and third quarter of the layers, stage 1
the second and fourth; each micro batch passes each stage twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class InterleavedStage(torch.nn.Module):
    """The chunks of one pipeline stage as one module, for one optimizer.

    Args:
        chunks: In the order in which a micro batch passes them.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, chunk: int, **tensors: Any) -> Tensor:
        """Runs one chunk.

        Args:
            chunk: Index within the stage.
            **tensors: The chunk's inputs.

        Returns:
            The chunk's output.
        """
        output: Tensor = self.chunks[chunk](**tensors)
        return output


def list_chunks(stage: torch.nn.Module) -> list[torch.nn.Module]:
    """Lists the chunks of the model that a stage holds.

    Args:
        stage: A `DiffusionTransformer`, or an `InterleavedStage` of several.

    Returns:
        One or several `DiffusionTransformer`, in the order of their layers.
    """
    return list(stage.chunks) if isinstance(stage, InterleavedStage) else [stage]
