"""Which tokens see which: cut samples, documents and causality in one mask for all layers.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

AttentionMask = Tensor | BlockMask | None

# No document has this number.
_BEYOND_THE_CUT = -1


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
) -> AttentionMask:
    """The mask of a forward pass.

    With documents, a token sees the tokens of its own document that lie within the sample's length
    and, if causal, not after it. What lies beyond the length sees only its like, so that each token
    sees at least itself: a softmax over nothing is not a number, and nor would its gradient be.

    Positions need not start anew with each document: rotary embeddings make attention depend on the
    distance between two tokens alone.

    Args:
        batch_size: Sequences, B.
        seq_length: Tokens of a window, S.
        lengths_B: int64 [B], tokens of each sequence that may be attended to; None: all.
        documents_BS: int32 [B, S], number of each token's document, at least 0; None: attention
            spans the window.
        causal: Left-to-right attention.
        block_sparse: Describe documents and lookahead by blocks, for FlexAttention, instead of by
            S x S elements.
        lookahead: int64 scalar, tokens after itself that a token may see; only without `causal`.
            None: all.

    Returns:
        None where a kernel without a mask does it; bool [B, 1, 1, S] for cut samples alone; with
        documents or lookahead a BlockMask or bool [B, 1, S, S]. True where a key may be seen.
    """
    if lookahead is not None and documents_BS is None:
        documents_BS = lookahead.new_zeros((batch_size, seq_length), dtype=torch.int32)
    if documents_BS is None:
        # Causal attention cannot look beyond a cut.
        if lengths_B is None or causal:
            return None
        steps_S = torch.arange(seq_length, device=lengths_B.device)
        return (steps_S < lengths_B.unsqueeze(1))[:, None, None, :]
    steps_S = torch.arange(seq_length, device=documents_BS.device)
    if lengths_B is not None:
        is_beyond_BS = steps_S >= lengths_B.unsqueeze(1)
        documents_BS = documents_BS.masked_fill(is_beyond_BS, _BEYOND_THE_CUT)
    if block_sparse:
        build = _block_mask_builder(compiled=documents_BS.is_cuda)
        rule = visibility(documents_BS, causal, lookahead)
        return build(rule, batch_size, None, seq_length, seq_length, device=documents_BS.device)
    mask_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    if causal or lookahead is not None:
        mask_BSS &= steps_S <= steps_S.unsqueeze(1) + (0 if lookahead is None else lookahead)
    return mask_BSS.unsqueeze(1)


def visibility(
    documents_BS: Tensor, causal: bool, lookahead: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
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
