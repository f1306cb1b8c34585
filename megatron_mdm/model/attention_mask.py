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

from megatron_mdm.model.key_dropout import DroppedKeys, Rule, written_out

# The model input that says how far ahead tokens see while attention widens, int64 [].
LOOKAHEAD = "lookahead"
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


def attention_lookahead(step: int, annealing_steps: int, seq_length: int) -> int | None:
    """How far ahead of itself a token sees while attention widens from causal to full.

    Args:
        step: Optimizer step, from 0.
        annealing_steps: Steps in which attention widens, n.
        seq_length: Tokens of a window, S.

    Returns:
        floor(S * step / n) tokens: 0 at step 0, which is causal attention. None from step n on:
        attention is full.

    Source:
        arXiv 2410.17891, attention mask annealing; there tokens become visible at random, here
        the nearest first.
    """
    if step >= annealing_steps:
        return None
    return seq_length * step // annealing_steps


def attention_mask(
    batch_size: int,
    seq_length: int,
    lengths_B: Tensor | None,
    documents_BS: Tensor | None,
    *,
    causal: bool,
    block_sparse: bool,
    lookahead: Tensor | None = None,
    key_dropout: DroppedKeys | None = None,
) -> AttentionMask:
    """The mask of a forward pass.

    With documents, a token sees the tokens of its own document that lie within the sample's length
    and, if causal, not after it. What lies beyond the length sees only its like, so that each token
    sees at least itself: a softmax over nothing is not a number, and nor would its gradient be.

    Positions need not start anew with each document: rotary embeddings make attention depend on the
    distance between two tokens alone.

    Nothing here has S x S elements but the mask of dropped keys where blocks are not for us.
    Documents are described by blocks, or are segments that attend by themselves, of which none but
    tiny ones have a mask.

    Args:
        batch_size: Sequences, B.
        seq_length: Tokens of a window, S.
        lengths_B: int64 [B], tokens of each sequence that may be attended to; None: all.
        documents_BS: int32 [B, S], number of each token's document, at least 0; the tokens of a
            document are neighbours. None: attention spans the window.
        causal: Left-to-right attention.
        block_sparse: Describe documents and lookahead by blocks, for FlexAttention, instead of by
            segments. Segments are made on the host, which waits for a GPU.
        lookahead: int64 scalar, tokens after itself that a token may see; only without `causal`.
            None: all.
        key_dropout: Keys that queries lose; only with `causal`.

    Returns:
        None where a kernel without a mask does it; bool [B, 1, 1, S] for cut samples alone, True
        where a key may be seen; with documents or lookahead a BlockMask or segments; with dropped
        keys a BlockMask or bool [B, 1, S, S].
    """
    given = lookahead if key_dropout is None else key_dropout.seeds_B
    if given is not None and documents_BS is None:
        documents_BS = given.new_zeros((batch_size, seq_length), dtype=torch.int32)
    if documents_BS is None:
        # Causal attention cannot look beyond a cut.
        if lengths_B is None or causal:
            return None
        steps_S = torch.arange(seq_length, device=lengths_B.device)
        return (steps_S < lengths_B.unsqueeze(1))[:, None, None, :]
    if lengths_B is not None:
        steps_S = torch.arange(seq_length, device=documents_BS.device)
        is_beyond_BS = steps_S >= lengths_B.unsqueeze(1)
        documents_BS = documents_BS.masked_fill(is_beyond_BS, _BEYOND_THE_CUT)
    rule = visibility(documents_BS, causal, lookahead)
    if key_dropout is not None:
        rule = key_dropout.keeping(rule, seq_length)
    if block_sparse:
        build = _block_mask_builder(compiled=documents_BS.is_cuda)
        return build(rule, batch_size, None, seq_length, seq_length, device=documents_BS.device)
    if key_dropout is not None:
        return written_out(rule, batch_size, seq_length, documents_BS.device)
    ahead = 0 if causal else None if lookahead is None else int(lookahead)
    return Segments(tuple(_segments(documents_BS, ahead)), ahead)


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


def _segments(documents_BS: Tensor, lookahead: int | None) -> Iterator[Segment]:
    seq_length = documents_BS.shape[1]
    for sequence, documents_S in enumerate(documents_BS.cpu()):
        ends = (documents_S.diff().nonzero().squeeze(1) + 1).tolist()
        for start, stop in _merge_tiny([*ends, seq_length]):
            mask = _segment_mask(documents_S[start:stop], lookahead)
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


def _segment_mask(documents_L: Tensor, lookahead: int | None) -> Tensor | None:
    if documents_L[0] == documents_L[-1]:
        return None
    mask_LL = documents_L.unsqueeze(1) == documents_L
    return (mask_LL if lookahead is None else mask_LL.tril(lookahead))[None, None]


def visibility(documents_BS: Tensor, causal: bool, lookahead: Tensor | None = None) -> Rule:
    """The mask as a function of indices, for FlexAttention.

    The functions hold tensors and nothing else, so that a compiled kernel serves every batch and
    every step.

    Args:
        documents_BS: int32 [B, S], number of each token's document.
        causal: Left-to-right attention.
        lookahead: int64 scalar, tokens after itself that a token may see; only without `causal`.
            None: all.

    Returns:
        From indices of sequence, head, query and key to whether the query sees the key.
    """

    def same_document(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return documents_BS[b, query] == documents_BS[b, key]

    def same_document_not_after(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents_BS[b, query] == documents_BS[b, key]) & (key <= query)

    if causal:
        return same_document_not_after
    if lookahead is None:
        return same_document
    ahead = lookahead

    def same_document_not_beyond(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents_BS[b, query] == documents_BS[b, key]) & (key <= query + ahead)

    return same_document_not_beyond


@functools.cache
def _block_mask_builder(compiled: bool) -> Callable[..., Any]:
    # Uncompiled, it first writes out all S x S elements.
    return torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask
