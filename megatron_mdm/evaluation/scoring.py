"""Scores many requests: all their probes in one stream of batches, the longest first.

What a request gets depends on its tokens, the settings and the model alone: its noise comes from
its tokens, and padding is seen by no real token. Batch mates change float rounding, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.diffusion.likelihood import Estimate
from megatron_mdm.diffusion.probes import LikelihoodEstimator, request_noise
from megatron_mdm.errors import ConfigError
from megatron_mdm.evaluation.greedy import match_greedily
from megatron_mdm.evaluation.requests import (
    Row,
    Score,
    ScoringRequest,
    ScoringSettings,
    check_request,
)
from megatron_mdm.evaluation.scoring_model import Judgement, ScoringBatch, ScoringModel


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
        sizes = (len(one.continuation) for one in requests)
        rows = (
            Row(one, np.zeros(size, dtype=bool), np.ones(size))
            for one, size in zip(requests, sizes, strict=True)
        )
        for row, judgement in self._judged(rows):
            total = float(judgement.log_probs_T.double().sum())
            scores[row.request] = Score(total, 0.0, bool(judgement.is_best_T.all()), 1)
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
                *estimates[one], greedy[one], cost * sum(len(found) for found in values[one])
            )
            for one in requests
        }

    def _round(
        self, requests: Sequence[ScoringRequest], number: int
    ) -> Iterator[tuple[ScoringRequest, np.ndarray, bool]]:
        """Values of the probes of a round, and whether all asked tokens were the likeliest."""
        found: list[float] = []
        best = True
        for row, judgement in self._judged(self._probes(requests, number)):
            weights_T = row.weights_L[row.asked_L]
            found.append(float(weights_T @ judgement.log_probs_T.double().numpy()))
            best = best and bool(judgement.is_best_T.all())
            if row.is_last:
                yield row.request, np.array(found), best
                found, best = [], True

    def _probes(self, requests: Sequence[ScoringRequest], number: int) -> Iterator[Row]:
        for one in requests:
            noise = request_noise(self._settings.seed, *one)
            probes = self._estimator.probes(noise, len(one.continuation), number)
            for place, probe in enumerate(probes, start=1):
                yield Row(one, probe.hidden_L, probe.weights_L, place == len(probes))

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
        return match_greedily(requests, order, self._judged)

    def _judged(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Judgement]]:
        """Runs rows in batches of at most `max_tokens`; rows come longest first."""
        waiting: list[Row] = []
        passes = 1 + (self._settings.guidance_scale != 0)
        for row in rows:
            longest = waiting[0].length if waiting else row.length
            if waiting and (len(waiting) + 1) * longest * passes > self._settings.max_tokens:
                yield from self._run(waiting)
                waiting = []
            waiting.append(row)
        if waiting:
            yield from self._run(waiting)

    def _run(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Judgement]]:
        judgement = self._model.judge(self._batch(rows))
        start = 0
        for row in rows:
            stop = start + int(row.asked_L.sum())
            yield row, Judgement(*(part[start:stop] for part in judgement))
            start = stop

    def _batch(self, rows: Sequence[Row]) -> ScoringBatch:
        facts, scale = self._model.facts, self._settings.guidance_scale
        shape = (len(rows), max(row.length for row in rows))
        tokens_BS = torch.zeros(shape, dtype=torch.int64)
        is_real_BS = torch.zeros(shape, dtype=torch.bool)
        asked_BS = torch.zeros(shape, dtype=torch.bool)
        hidden_BS: Tensor | None = torch.zeros_like(tokens_BS) if scale != 0 else None
        targets: list[int] = []
        # A causal model predicts a token at the one before it.
        shift = int(facts.is_causal)
        for number, row in enumerate(rows):
            start, stop = len(row.request.context), row.length
            clean_L = np.array(row.request.continuation)
            noised_L = np.where(row.hidden_L, facts.mask_token_id, clean_L)
            tokens_BS[number, :start] = torch.tensor(row.request.context, dtype=torch.int64)
            tokens_BS[number, start:stop] = torch.from_numpy(noised_L)
            is_real_BS[number, :stop] = True
            asked_BS[number, start - shift : stop - shift] = torch.from_numpy(row.asked_L)
            targets += clean_L[row.asked_L].tolist()
            if hidden_BS is not None:
                hidden_BS[number] = tokens_BS[number]
                hidden_BS[number, :start] = facts.mask_token_id
        return ScoringBatch(
            tokens_BS, is_real_BS, asked_BS, torch.tensor(targets), hidden_BS, scale
        )
