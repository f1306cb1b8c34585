"""Which tokens see which: cut samples, documents and causality in one mask for all layers.

Shapes: B batch, S sequence, L tokens of a part of one sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron_mdm.diffusion.attention_rules import FullAttention, ModelTensors, PairRule
from megatron_mdm.diffusion.samples import SEGMENT_IDS
from megatron_mdm.model.compilation import compile_function

# No document has this number.
_BEYOND_THE_CUT = -1
# Neighbouring documents share a segment of up to so many tokens: a kernel's call costs more than
# the few scores that their mask throws away.
_SHARED_TOKENS = 64
# FlexAttention's least width of a head on GPUs.
_LEAST_FLEX_WIDTH = 16


class Segment(NamedTuple):
    """Neighbouring tokens of one sequence that see no token outside.

    Attributes:
        sequence: Which sequence.
        start: Its first token.
        stop: The token after its last one.
        mask: bool [1, 1, L, L], True where a key may be seen; None: the segment is one document.
    """

    sequence: int
    start: int
    stop: int
    mask: Tensor | None


class Segments(NamedTuple):
    """Attention within documents, for kernels that know neither documents nor blocks.

    Attributes:
        segments: All tokens, sequence by sequence; no two segments overlap.
        lookahead: Tokens after itself that a token of a segment without a mask may see; 0 is
            causal. None: all.
    """

    segments: tuple[Segment, ...]
    lookahead: int | None


AttentionMask = Tensor | BlockMask | Segments | None


def build_attention_mask(
    batch_size: int,
    seq_length: int,
    lengths_B: Tensor | None,
    rule: FullAttention,
    model_inputs: ModelTensors,
    *,
    device: torch.device,
    block_sparse: bool,
    blocks_alone: bool = False,
) -> AttentionMask:
    """Builds the mask of a forward pass.

    A token sees the tokens of its own document within the sample's length, as far as the rule
    allows. Tokens beyond the length see each other, so that each token sees at least itself: a
    softmax over nothing, and its gradient, would be NaN.

    Positions need not start anew with each document: rotary embeddings make attention depend on the
    distance between two tokens alone.

    Only the mask of a rule for pairs, without FlexAttention, has S x S elements. Documents are
    described by blocks, or are segments that attend by themselves; only merged tiny ones have a
    mask.

    Args:
        batch_size: Sequences, B.
        seq_length: Tokens of a window, S.
        lengths_B: int64 [B], tokens of each sequence that may be attended to; None: all.
        rule: Of the objective.
        model_inputs: `segment_ids`: int32 [B, S], number of each token's document, at least 0; the
            tokens of a document are neighbours. Without it attention spans the window. The rest is
            for the rule.
        device: Where attention runs.
        block_sparse: Describe documents and reach by blocks, for FlexAttention, instead of by
            segments. Segments are made on the host, which waits for a GPU.
        blocks_alone: Describe cut samples and causal attention by blocks too.

    Returns:
        None where a kernel without a mask does it; bool [B, 1, 1, S] for cut samples alone, True
        where a key may be seen; with documents or a reach that changes a BlockMask or segments;
        with a rule for pairs a BlockMask or bool [B, 1, S, S].
    """
    documents_BS = model_inputs.get(SEGMENT_IDS)
    reach, pair = rule.reach(model_inputs), rule.pair(model_inputs, seq_length)
    has_rule = pair is not None or isinstance(reach, Tensor)
    if blocks_alone and block_sparse:
        has_rule = has_rule or rule.is_causal or lengths_B is not None
    if documents_BS is None and has_rule:
        documents_BS = torch.zeros((batch_size, seq_length), dtype=torch.int32, device=device)
    if documents_BS is None:
        # Causal attention cannot look beyond a cut.
        if lengths_B is None or rule.is_causal:
            return None
        steps_S = torch.arange(seq_length, device=lengths_B.device)
        return (steps_S < lengths_B.unsqueeze(1))[:, None, None, :]
    if lengths_B is not None:
        steps_S = torch.arange(seq_length, device=documents_BS.device)
        is_beyond_BS = steps_S >= lengths_B.unsqueeze(1)
        documents_BS = documents_BS.masked_fill(is_beyond_BS, _BEYOND_THE_CUT)
    visible = build_visibility_rule(documents_BS, reach, pair)
    if block_sparse:
        build = _compile_block_mask_builder(compiled=documents_BS.is_cuda)
        return build(visible, batch_size, None, seq_length, seq_length, device=documents_BS.device)
    if pair is not None:
        return expand_rule(visible, batch_size, seq_length, documents_BS.device)
    ahead = None if reach is None else int(reach)
    return Segments(tuple(_cut_segments(documents_BS, ahead)), ahead)


def suits_flex_attention(device: torch.device, head_width: int, dropout: float) -> bool:
    """Whether FlexAttention can train here.

    Args:
        device: Where attention runs.
        head_width: D.
        dropout: On attention weights.

    Returns:
        False on CPUs, where it has no backward pass, with dropout, which it does not know, and for
        heads narrower than 16.
    """
    return device.type == "cuda" and not dropout and head_width >= _LEAST_FLEX_WIDTH


def _cut_segments(documents_BS: Tensor, lookahead: int | None) -> Iterator[Segment]:
    seq_length = documents_BS.shape[1]
    for sequence, documents_S in enumerate(documents_BS.cpu()):
        ends = (documents_S.diff().nonzero().squeeze(1) + 1).tolist()
        for start, stop in _merge_tiny([*ends, seq_length]):
            mask = _build_segment_mask(documents_S[start:stop], lookahead)
            if mask is not None:
                mask = mask.to(documents_BS.device)
            yield Segment(sequence, start, stop, mask)


def _merge_tiny(ends: Iterable[int]) -> Iterator[tuple[int, int]]:
    start = stop = 0
    for end in ends:
        if start < stop and end - start > _SHARED_TOKENS:
            yield start, stop
            start = stop
        stop = end
    yield start, stop


def _build_segment_mask(documents_L: Tensor, lookahead: int | None) -> Tensor | None:
    if documents_L[0] == documents_L[-1]:
        return None
    mask_LL = documents_L.unsqueeze(1) == documents_L
    return (mask_LL if lookahead is None else mask_LL.tril(lookahead))[None, None]


def build_visibility_rule(
    documents_BS: Tensor, reach: Tensor | int | None, pair: PairRule | None = None
) -> PairRule:
    """Builds the mask as a function of indices, for FlexAttention.

    The functions hold tensors and nothing else, so that a compiled kernel serves every batch and
    every step.

    Args:
        documents_BS: int32 [B, S], number of each token's document.
        reach: Places after itself that a query may see: 0, or an int64 scalar; None: all.
        pair: What else decides; None: nothing.

    Returns:
        From indices of sequence, head, query and key to whether the query sees the key.
    """

    def is_same_document(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return documents_BS[b, query] == documents_BS[b, key]

    def is_same_document_not_after(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents_BS[b, query] == documents_BS[b, key]) & (key <= query)

    if reach is None:
        return _combine(is_same_document, pair)
    if isinstance(reach, int):
        if reach:
            raise ValueError(f"a reach of {reach} that never changes: give it as a tensor")
        return _combine(is_same_document_not_after, pair)
    ahead = reach

    def is_same_document_within_reach(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents_BS[b, query] == documents_BS[b, key]) & (key <= query + ahead)

    return _combine(is_same_document_within_reach, pair)


def _combine(one: PairRule, other: PairRule | None) -> PairRule:
    if other is None:
        return one
    more = other

    def check_both(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return one(b, head, query, key) & more(b, head, query, key)

    return check_both


def expand_rule(rule: PairRule, batch_size: int, seq_length: int, device: torch.device) -> Tensor:
    """Writes a rule out as a mask, for kernels that take no function.

    Args:
        rule: The same for all heads.
        batch_size: Sequences, B.
        seq_length: Tokens, S.
        device: Where.

    Returns:
        bool [B, 1, S, S], True where a key is seen.
    """
    places_S = torch.arange(seq_length, device=device)
    b_B11 = torch.arange(batch_size, device=device)[:, None, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    return rule(b_B11, head, places_S[:, None], places_S).unsqueeze(1)


@functools.cache
def _compile_block_mask_builder(compiled: bool) -> Callable[..., Any]:
    # Uncompiled, it first writes out all S x S elements.
    return compile_function(create_block_mask, dynamic=False) if compiled else create_block_mask
