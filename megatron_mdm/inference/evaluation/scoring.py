"""Scores many requests: all their probes in one stream of batches, the longest first.

What a request gets depends on its tokens, the settings and the model alone: its noise comes from
its tokens, and padding is seen by no real token. Batch mates, and passes that requests share,
change float rounding and nothing else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.statistics import Estimate
from megatron_mdm.diffusion.probes import LikelihoodEstimator, request_noise
from megatron_mdm.inference.evaluation.asking import ask_masked
from megatron_mdm.inference.evaluation.branching import ask_causal
from megatron_mdm.inference.evaluation.greedy import match_greedily
from megatron_mdm.inference.evaluation.requests import (
    Question,
    Reply,
    Score,
    ScoringRequest,
    ScoringSettings,
    check_request,
)
from megatron_mdm.inference.evaluation.scoring_model import TOKENS_OF_A_PASS, ScoringModel


class Scorer:
    """Scores continuations with one model.

    Args:
        model: The model.
        settings: How.

    Raises:
        ConfigError: Guidance was asked of an autoregressive model.
    """

    def __init__(self, model: ScoringModel, settings: ScoringSettings) -> None:
        if model.facts.is_causal and settings.guidance_scale != 0:
            raise ConfigError(
                f"guidance_scale={settings.guidance_scale} needs a pass with the context masked, "
                f"and the autoregressive {model.facts.name} has no mask token: leave it out."
            )
        self._model, self._settings = model, settings
        self._max_tokens = settings.max_tokens or TOKENS_OF_A_PASS[model.device.type]
        self._estimator = LikelihoodEstimator(
            settings.estimator, settings.draws, settings.stratified
        )

    def score(self, requests: Sequence[ScoringRequest]) -> list[Score]:
        """Scores.

        Args:
            requests: Any number; equal ones are scored once.

        Returns:
            A score for each, in their order.

        Raises:
            DataError: A request cannot be scored.
        """
        for number, request in enumerate(requests):
            check_request(request, self._model.facts, f"Request {number}")
        # The longest first: what does not fit into memory shows at once.
        distinct = sorted(set(requests), key=lambda one: (-one.length, one))
        scores = self._causal(distinct) if self._model.facts.is_causal else self._masked(distinct)
        return [scores[request] for request in requests]

    def _causal(self, requests: Sequence[ScoringRequest]) -> dict[ScoringRequest, Score]:
        scores: dict[ScoringRequest, Score] = {}
        for one, judgement in ask_causal(self._model, requests, max_tokens=self._max_tokens):
            total = float(judgement.log_probs_N.double().sum())
            scores[one] = Score(total, 0.0, bool(judgement.is_best_N.all()), 1)
        return scores

    def _masked(self, requests: Sequence[ScoringRequest]) -> dict[ScoringRequest, Score]:
        values: dict[ScoringRequest, list[np.ndarray]] = {one: [] for one in requests}
        estimates: dict[ScoringRequest, Estimate] = {}
        is_next_best: dict[ScoringRequest, bool | None] = {}
        active, number = list(requests), 0
        while active:
            for one, found, best in self._round(active, number):
                values[one].append(found)
                estimates[one] = self._estimator.combine(len(one.continuation), values[one])
                is_next_best[one] = best
            number += 1
            active = [one for one in active if self._needs_more(estimates[one], number)]
        greedy = self._greedy(requests, is_next_best)
        cost = 1 + (self._settings.guidance_scale != 0)
        return {
            one: Score(
                *estimates[one],
                greedy[one],
                cost * sum(len(found) for found in values[one]),
                self._estimator.degrees_of_freedom(len(one.continuation), len(values[one])),
            )
            for one in requests
        }

    def _round(
        self, requests: Sequence[ScoringRequest], number: int
    ) -> Iterator[tuple[ScoringRequest, np.ndarray, bool]]:
        """Values of the probes of a round, and whether all asked tokens were the likeliest."""
        weights: deque[np.ndarray] = deque()

        def questions() -> Iterator[Question]:
            for one in requests:
                noise = request_noise(self._settings.seed, *one)
                probes = self._estimator.probes(noise, len(one.continuation), number)
                weights.append(np.stack([probe.weights_L for probe in probes]))
                hidden_KL = np.stack([probe.hidden_L for probe in probes])
                yield Question(one, hidden_KL, weights[-1] != 0)

        for question, reply in self._ask(questions()):
            values_K = (weights.popleft() * reply.log_probs_KL).sum(1)
            yield question.request, values_K, bool(reply.is_best_KL.all())

    def _needs_more(self, estimate: Estimate, num_rounds: int) -> bool:
        target = self._settings.target_standard_error
        if target is None or estimate.standard_error == 0:
            return False
        has_draws = (num_rounds + 1) * self._settings.draws <= self._settings.max_draws
        reached = not math.isnan(estimate.standard_error) and estimate.standard_error <= target
        return has_draws and not reached

    def _greedy(
        self, requests: Sequence[ScoringRequest], is_next_best: dict[ScoringRequest, bool | None]
    ) -> dict[ScoringRequest, bool | None]:
        order = self._settings.greedy_match
        if order == "none":
            return dict.fromkeys(requests)
        if order == "left_to_right" and self._settings.estimator == "chain_rule":
            # The probes were the steps.
            return is_next_best
        return match_greedily(requests, order, self._ask)

    def _ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]:
        scale = self._settings.guidance_scale
        return ask_masked(self._model, questions, max_tokens=self._max_tokens, guidance_scale=scale)
