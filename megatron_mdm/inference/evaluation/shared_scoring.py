"""Requests scored by all ranks, whatever they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_mdm.inference.evaluation.rank_pool import RankPool
from megatron_mdm.inference.evaluation.requests import Score, ScoringRequest, ScoringSettings
from megatron_mdm.inference.evaluation.scoring import Scorer
from megatron_mdm.inference.evaluation.scoring_model import ScoringModel

Item = tuple[ScoringSettings, ScoringRequest]


def scoring_task(model: ScoringModel) -> Callable[[list[Item]], list[Score]]:
    """What a `RankPool` does with its share of requests.

    Args:
        model: The same on every rank.

    Returns:
        Scores requests; the settings of all are those of the first.
    """

    def score(items: list[Item]) -> list[Score]:
        if not items:
            return []
        return Scorer(model, items[0][0]).score([request for _, request in items])

    return score


def score_on_ranks(
    pool: RankPool, task: str, settings: ScoringSettings, requests: Sequence[ScoringRequest]
) -> list[Score]:
    """Scores requests on all ranks. Within `RankPool.lead` alone.

    Args:
        pool: With a `scoring_task`.
        task: Its name.
        settings: Of all requests.
        requests: In any order.

    Returns:
        A score for each, in their order.
    """
    # Neighbours cost alike and go to different ranks.
    order = sorted(range(len(requests)), key=lambda place: -requests[place].length)
    # The answers to one question share what their rank computes of it.
    found = pool.map(
        task,
        [(settings, requests[place]) for place in order],
        together=lambda item: item[1].context,
    )
    scores: list[Any] = [None] * len(requests)
    for place, score in zip(order, found, strict=True):
        scores[place] = score
    return scores
