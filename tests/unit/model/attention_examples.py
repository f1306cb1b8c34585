"""Rules of attention, and their masks, from plain values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mdm.diffusion.annealing import WideningAttention
from megatron_mdm.diffusion.attention_rules import (
    CausalAttention,
    FullAttention,
    ModelTensors,
    PairRule,
)
from megatron_mdm.diffusion.key_dropout import DroppedKeys
from megatron_mdm.diffusion.samples import SEGMENT_IDS
from megatron_mdm.model.attention_mask import AttentionMask, build_attention_mask


@dataclass(frozen=True)
class Reaching(FullAttention):
    """Tokens see so many places after themselves."""

    places: int

    def reach(self, model_inputs: ModelTensors) -> torch.Tensor:
        return torch.tensor(self.places)


@dataclass(frozen=True)
class Dropping(CausalAttention):
    """Tokens lose keys."""

    dropout: DroppedKeys

    def pair(self, model_inputs: ModelTensors, seq_length: int) -> PairRule:
        return self.dropout.build_rule(seq_length)


def rule_of(causal: bool, lookahead: int | None = None) -> FullAttention:
    """Causal, full, or full up to so many places ahead."""
    if causal:
        return CausalAttention()
    return FullAttention() if lookahead is None else Reaching(lookahead)


def mask_of(
    rule: FullAttention,
    batch_size: int,
    seq_length: int,
    lengths_B: torch.Tensor | None = None,
    documents_BS: torch.Tensor | None = None,
    *,
    block_sparse: bool = False,
    blocks_alone: bool = False,
) -> AttentionMask:
    """The mask of a rule on a CPU."""
    return build_attention_mask(
        batch_size,
        seq_length,
        lengths_B,
        rule,
        {} if documents_BS is None else {SEGMENT_IDS: documents_BS},
        device=torch.device("cpu"),
        block_sparse=block_sparse,
        blocks_alone=blocks_alone,
    )


def annealed_reaches(num_steps: int, seq_length: int, steps: range) -> list[int | None]:
    """How far ahead tokens see at steps of annealing."""
    rule = WideningAttention(num_steps)
    found = []
    for step in steps:
        inputs = {name: torch.tensor(n) for name, n in rule.step_inputs(step, seq_length).items()}
        reach = rule.reach(inputs)
        found.append(None if reach is None else int(reach))
    return found
