"""Attention that widens from causal to full while a causal model becomes a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mdm.diffusion.attention_rules import FullAttention, ModelTensors

if TYPE_CHECKING:
    from torch import Tensor

_REACH = "attention_reach"


@dataclass(frozen=True)
class WideningAttention(FullAttention):
    """At step s of n a token sees floor(S s / n) tokens after itself, and all from step n on.

    Validation and generation use full attention.

    Attributes:
        num_steps: Optimizer steps in which attention widens, n.

    Source:
        arXiv 2410.17891, attention mask annealing; there tokens become visible at random, here
        the nearest first.
    """

    num_steps: int

    def step_inputs(self, step: int, seq_length: int) -> dict[str, int]:
        """The reach at a step; nothing once attention is full."""
        if step >= self.num_steps:
            return {}
        return {_REACH: seq_length * step // self.num_steps}

    def reach(self, model_inputs: ModelTensors) -> Tensor | int | None:
        """The reach of the step."""
        return model_inputs.get(_REACH)
