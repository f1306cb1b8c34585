"""Would the model have written a continuation, had it always taken the likeliest token?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.inference.evaluation.requests import Question, Reply, ScoringRequest

Ask = Callable[[Iterable[Question]], Iterator[tuple[Question, Reply]]]


def match_greedily(
    requests: Sequence[ScoringRequest], order: Literal["confidence", "left_to_right"], ask: Ask
) -> dict[ScoringRequest, bool | None]:
    """Reveals continuations token by token, each the likeliest at its place, as long as they fit.

    All requests take their steps together; one that fails takes no more. Each stands alone: what is
    revealed next depends on its own tokens.

    Args:
        requests: What to match, the longest first.
        order: Reveal the hidden token that the model is most certain of (of equals the first), or
            the first.
        ask: Has questions answered.

    Returns:
        For each request: is every token the likeliest at its step?
    """
    hidden: dict[ScoringRequest, NDArray[np.bool_]] = {
        one: np.ones(len(one.continuation), dtype=bool) for one in requests
    }
    matches: dict[ScoringRequest, bool | None] = dict.fromkeys(requests, True)
    active = list(requests)
    while active:
        questions = [Question(one, hidden[one][None], hidden[one][None]) for one in active]
        for question, reply in ask(questions):
            places = np.flatnonzero(question.hidden_KL[0])
            next_one = int(places[0])
            if order == "confidence":
                next_one = int(places[reply.confidences_KL[0, places].argmax()])
            matches[question.request] = bool(reply.is_best_KL[0, next_one])
            # A new array: replies to the same question may still be read.
            left = hidden[question.request].copy()
            left[next_one] = False
            hidden[question.request] = left
        active = [one for one in active if matches[one] and hidden[one].any()]
    return matches
