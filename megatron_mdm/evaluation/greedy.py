"""Would the model have written a continuation, had it always taken the likeliest token?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.evaluation.requests import Row, ScoringRequest
from megatron_mdm.evaluation.scoring_model import Judgement

Judge = Callable[[Iterable[Row]], Iterator[tuple[Row, Judgement]]]


def match_greedily(
    requests: Sequence[ScoringRequest], order: Literal["confidence", "left_to_right"], judge: Judge
) -> dict[ScoringRequest, bool | None]:
    """Reveals continuations token by token, each the likeliest at its place, as long as they fit.

    All requests take their steps together; one that fails takes no more. Each stands alone: what is
    revealed next depends on its own tokens.

    Args:
        requests: What to match, the longest first.
        order: Reveal the hidden token that the model is most certain of (of equals the first), or
            the first.
        judge: Runs rows.

    Returns:
        For each request: is every token the likeliest at its step?
    """
    hidden: dict[ScoringRequest, NDArray[np.bool_]] = {
        one: np.ones(len(one.continuation), dtype=bool) for one in requests
    }
    matches: dict[ScoringRequest, bool | None] = dict.fromkeys(requests, True)
    active = list(requests)
    while active:
        rows = [Row(one, hidden[one].copy(), hidden[one].astype(np.float64)) for one in active]
        for row, judgement in judge(rows):
            places = np.flatnonzero(row.hidden_L)
            next_one = 0
            if order == "confidence":
                next_one = int(judgement.confidences_T.argmax())
            matches[row.request] = bool(judgement.is_best_T[next_one])
            hidden[row.request][places[next_one]] = False
        active = [one for one in active if matches[one] and hidden[one].any()]
    return matches
