"""Long texts in windows: every token is scored once, with as much context as its window has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.statistics import Estimate
from megatron_mdm.inference.evaluation.requests import Score, ScoringRequest


def rolling_requests(
    tokens: Sequence[int], max_length: int, *, prefix: Sequence[int], context_tokens: int = 1
) -> list[ScoringRequest]:
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
        requests.append(ScoringRequest(context, tuple(tokens[start:stop])))
        start = stop
    return requests


def add_up(scores: Sequence[Score]) -> Estimate:
    """Log-likelihood of a text from those of its windows.

    Args:
        scores: One a window; their noises are independent.

    Returns:
        The sum in nats, with its standard error.
    """
    return Estimate(
        math.fsum(score.log_likelihood for score in scores),
        math.sqrt(math.fsum(score.standard_error**2 for score in scores)),
    )
