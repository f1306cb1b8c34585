"""Texts as tokens: context and continuation of one text, and long texts in windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.statistics import degrees_of_sum
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.inference.requests import Request, Score


def wrap_tokenizer(backend: Tokenizer, eos_token: str | None) -> Any:
    """Makes the tokenizer of transformers that models are asked with.

    Args:
        backend: What made the training data.
        eos_token: The token that ends a text, if any.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token)
    # A special token written out in a prompt is one.
    tokenizer.backend_tokenizer.encode_special_tokens = False
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encodes a text literally: no special token is added, and none is recognised in it.

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


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Request:
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
    return Request(tuple(ids[:boundary]), tuple(ids[boundary:]))


def fit_context(request: Request, facts: ModelFacts, name: str) -> Request:
    """Fits a request's context to a model.

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
    context, continuation, _ = request
    if not context and facts.end_token_id is not None:
        context = (facts.end_token_id,)
    room = facts.max_length - len(continuation)
    if room < min(1, len(context)):
        raise DataError(
            f"{name} has a continuation of {len(continuation):,} tokens, and {facts.name} takes "
            f"{facts.max_length:,} with at least one of context: score it in rolling windows, or "
            "split it."
        )
    return Request(context[max(0, len(context) - room) :], continuation)


def cut_rolling_requests(
    tokens: Sequence[int], max_length: int, *, prefix: Sequence[int], context_tokens: int = 1
) -> list[Request]:
    """Cuts a text into windows that score each of its tokens once.

    Args:
        tokens: The text, at least one token.
        max_length: Longest sequence that the model takes.
        prefix: Context of the first window, such as the end-of-text token; may be empty.
        context_tokens: Tokens before it that every later window sees; the longer, the better the
            predictions at its start, and the more windows.

    Returns:
        Requests in the order of the text.

    Raises:
        ConfigError: The context leaves no room for a token to be scored.
    """
    for name, count in (("context_tokens", context_tokens), ("the prefix", len(prefix))):
        if not 0 <= count < max_length:
            raise ConfigError(
                f"{name} of {count} tokens leaves no room in windows of {max_length}: give less."
            )
    requests = []
    start = 0
    while start < len(tokens):
        context = tuple(tokens[max(0, start - context_tokens) : start]) if start else tuple(prefix)
        stop = start + max_length - len(context)
        requests.append(Request(context, tuple(tokens[start:stop])))
        start = stop
    return requests


def add_up(scores: Sequence[Score]) -> Score:
    """Adds up the scores of a text's windows.

    Args:
        scores: One for each window; their noises are independent.

    Returns:
        The sum; degrees of freedom by Welch and Satterthwaite.
    """
    errors = [score.standard_error for score in scores]
    return Score(
        math.fsum(score.log_likelihood for score in scores),
        math.sqrt(math.fsum(error**2 for error in errors)),
        None,
        sum(score.num_passes for score in scores),
        degrees_of_sum(errors, [score.degrees_of_freedom for score in scores]),
    )
