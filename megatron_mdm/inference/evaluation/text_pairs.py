"""Context and continuation as tokens of one text."""

from __future__ import annotations

from typing import Any

from megatron_mdm.core.errors import DataError
from megatron_mdm.inference.evaluation.requests import ScoringRequest
from megatron_mdm.inference.generation.text_model import ModelFacts


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encodes a text as it is: no special token is added, none is found in it.

    Args:
        tokenizer: The model's, of transformers.
        text: Any.

    Returns:
        Token ids.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids


def encode_pair(tokenizer: Any, context: str, continuation: str) -> ScoringRequest:
    """Encodes context and continuation together, as training saw such a text.

    Spaces at the end of the context go to the continuation, where tokenizers of words put them. A
    token that reaches from one into the other belongs to the continuation.

    Args:
        tokenizer: The model's, a fast one of transformers.
        context: May be empty.
        continuation: What will be scored.

    Returns:
        Token ids of both.

    Raises:
        DataError: Nothing is left to be scored.
    """
    kept = context.rstrip(" ")
    encoded = tokenizer(
        context + continuation,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    boundary = sum(end <= len(kept) for end in ends)
    if not continuation or boundary == len(ids):
        raise DataError(
            f"The continuation {continuation!r} after {context[-40:]!r} is empty: give it a text."
        )
    return ScoringRequest(tuple(ids[:boundary]), tuple(ids[boundary:]))


def fit_context(request: ScoringRequest, facts: ModelFacts, name: str) -> ScoringRequest:
    """Gives a model what it can take.

    Args:
        request: A request of any length.
        facts: Of the model.
        name: What to call the request.

    Returns:
        The request with the start of its context cut off where it is too long; with the end-of-text
        token for a context where there is none.

    Raises:
        DataError: The continuation alone is too long, or an autoregressive model has no token to
            begin with.
    """
    context, continuation = request
    if not context and facts.end_token_id is not None:
        context = (facts.end_token_id,)
    room = facts.max_length - len(continuation)
    if room < min(1, len(context)):
        raise DataError(
            f"{name} has a continuation of {len(continuation):,} tokens, and {facts.name} takes "
            f"{facts.max_length:,} with at least one of context: score it in rolling windows, or "
            "split it."
        )
    return ScoringRequest(context[max(0, len(context) - room) :], continuation)
