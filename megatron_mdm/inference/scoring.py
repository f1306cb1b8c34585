"""Scores many requests: all their passes in one stream of batches, the longest first.

A score depends on the request's tokens, the settings and the model alone: the noise is keyed by the
tokens, and no real token sees padding. Other requests of a batch, and passes that requests share,
change nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.statistics import Estimate
from megatron_mdm.diffusion.noise_probes import NoiseEstimator
from megatron_mdm.diffusion.probes import LikelihoodEstimator, make_request_noise
from megatron_mdm.inference.asking import Question, ask_causal, ask_masked
from megatron_mdm.inference.models import ModelFacts, ScoringModel
from megatron_mdm.inference.passes import Judgement
from megatron_mdm.inference.rank_pool import RankPool
from megatron_mdm.inference.requests import Request, Score, ScoringSettings, check_request

# Tokens of a forward pass: what stays in a core's cache, or fills a GPU.
_TOKENS_OF_A_PASS = {"cpu": 1024, "cuda": 32768}

ScoreRequests = Callable[[Sequence[Request]], list[Score]]


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
        _check_masks(model.facts, settings)
        self._model, self._settings = model, settings
        self._max_tokens = settings.max_tokens or _TOKENS_OF_A_PASS[model.device.type]
        self._estimator = make_estimator(model.facts, settings)

    def score(self, requests: Sequence[Request]) -> list[Score]:
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
        score = self._score_causal if self._model.facts.is_causal else self._score_masked
        scores = score(distinct)
        return [scores[request] for request in requests]

    def _score_causal(self, requests: Sequence[Request]) -> dict[Request, Score]:
        return {
            one: Score(
                float(judged.log_probs.sum(dtype=np.float64)), 0.0, bool(judged.is_best.all()), 1
            )
            for one, judged in ask_causal(self._model, requests, max_tokens=self._max_tokens)
        }

    def _score_masked(self, requests: Sequence[Request]) -> dict[Request, Score]:
        rounds: dict[Request, list[NDArray[np.float64]]] = {one: [] for one in requests}
        estimates: dict[Request, Estimate] = {}
        is_best: dict[Request, bool | None] = {}
        active, number = list(requests), 0
        while active:
            for question, reply in self._ask(self._make_questions(active, number)):
                one = question.request
                rounds[one].append((question.weights_KL * reply.log_probs).sum(1))
                estimates[one] = self._estimator.combine(len(one.continuation), rounds[one])
                is_best[one] = bool(reply.is_best.all())
            number += 1
            active = [one for one in active if self._needs_more(estimates[one], number)]
        greedy = self._find_greedy(requests, is_best)
        cost = 1 + (self._settings.guidance_scale != 0)
        return {
            one: Score(
                *estimates[one],
                greedy[one],
                cost * sum(map(len, rounds[one])),
                self._estimator.degrees_of_freedom(len(one.continuation), len(rounds[one])),
            )
            for one in requests
        }

    def _make_questions(self, requests: Sequence[Request], number: int) -> Iterator[Question]:
        """Makes the questions of a round, from its probes."""
        for one in requests:
            noise = make_request_noise(self._settings.seed, one.context, one.continuation)
            probes = self._estimator.draw_probes(noise, one.continuation, number)
            shown = [probe.shown_L for probe in probes if probe.shown_L is not None]
            chances = [probe.chances for probe in probes if probe.chances is not None]
            told = [probe.log_snr for probe in probes] if self._model.facts.takes_log_snr else []
            yield Question(
                one,
                np.stack([probe.hidden_L for probe in probes]),
                np.stack([probe.weights_L for probe in probes]),
                np.stack(shown) if shown else None,
                np.array(chances) if chances else None,
                np.array(told, dtype=np.float32) if told else None,
            )

    def _needs_more(self, estimate: Estimate, num_rounds: int) -> bool:
        target = self._settings.target_standard_error
        if target is None or estimate.standard_error == 0:
            return False
        has_draws = (num_rounds + 1) * self._settings.draws <= self._settings.max_draws
        reached = not math.isnan(estimate.standard_error) and estimate.standard_error <= target
        return has_draws and not reached

    def _find_greedy(
        self, requests: Sequence[Request], is_best: dict[Request, bool | None]
    ) -> dict[Request, bool | None]:
        order = self._settings.greedy_match
        if order == "none":
            return dict.fromkeys(requests)
        if order == "left_to_right" and self._settings.estimator == "chain_rule":
            # The probes of the chain rule are the steps.
            return is_best
        return self._match_greedily(requests, order)

    def _match_greedily(
        self, requests: Sequence[Request], order: Literal["confidence", "left_to_right"]
    ) -> dict[Request, bool | None]:
        """Unmasks continuations token by token, as long as each is the likeliest in its place.

        All requests take their steps together; one that fails takes no more. Which token a request
        unmasks next depends on its own tokens alone.
        """
        hidden = {one: np.ones(len(one.continuation), dtype=np.bool_) for one in requests}
        matches: dict[Request, bool | None] = dict.fromkeys(requests, True)
        active = list(requests)
        while active:
            questions = [
                Question(one, hidden[one][None], hidden[one][None].astype(np.float64))
                for one in active
            ]
            for question, reply in self._ask(questions):
                one, places = question.request, np.flatnonzero(question.hidden_KL[0])
                next_one = int(places[0])
                if order == "confidence":
                    # Of equals the first.
                    next_one = int(places[reply.confidences[0, places].argmax()])
                matches[one] = bool(reply.is_best[0, next_one])
                # A new array: replies to the same question may still be read.
                hidden[one] = hidden[one].copy()
                hidden[one][next_one] = False
            active = [one for one in active if matches[one] and hidden[one].any()]
        return matches

    def _ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Judgement]]:
        scale = self._settings.guidance_scale
        return ask_masked(self._model, questions, max_tokens=self._max_tokens, guidance_scale=scale)


def make_estimator(facts: ModelFacts, settings: ScoringSettings) -> LikelihoodEstimator:
    """Makes the estimator of a masked-diffusion model, or of one of hybrid or uniform noise.

    Args:
        facts: Of the model.
        settings: Which estimator.

    Returns:
        The estimator.
    """
    kind = settings.choose_estimator(facts)
    if kind == "process" and facts.noise is not None:
        num_tokens = facts.vocab_size - (facts.mask_token_id < facts.vocab_size)
        return NoiseEstimator(
            facts.noise,
            num_tokens,
            facts.mask_token_id,
            settings.draws,
            stratified=settings.stratified,
        )
    return LikelihoodEstimator(kind, settings.draws, settings.stratified)


def _check_masks(facts: ModelFacts, settings: ScoringSettings) -> None:
    """Refuses what the noise of a model cannot do."""
    if settings.estimator == "process" and facts.noise is None:
        raise ConfigError(
            f"estimator=process is the bound of hybrid or uniform noise, and {facts.name} was "
            "trained without: leave it out."
        )
    if facts.noise is None:
        return
    needs_masks = {
        "estimator": settings.estimator not in (None, "process"),
        "greedy_match": settings.greedy_match != "none",
        "guidance_scale": settings.guidance_scale != 0,
    }
    reason = (
        f"hides tokens behind the mask token, which {facts.name}, trained on uniform noise, has "
        "never seen"
    )
    if facts.noise.at(0.5).mask:
        # The other pass of guidance has the noise of the first.
        del needs_masks["guidance_scale"]
        reason = (
            f"hides tokens without a level of noise, which {facts.name}, trained with "
            "model.time_embedding, has to be told"
        )
        needs_masks = needs_masks if facts.takes_log_snr else {}
    for name, is_set in needs_masks.items():
        if is_set:
            raise ConfigError(f"{name}={getattr(settings, name)} {reason}: leave it out.")


Item = tuple[ScoringSettings, Request]


def make_scoring_task(model: ScoringModel) -> Callable[[list[Item]], list[Score]]:
    """Makes the task by which ranks of a `RankPool` score their shares.

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
    pool: RankPool, task: str, settings: ScoringSettings, requests: Sequence[Request]
) -> list[Score]:
    """Scores requests on all ranks. Within `RankPool.run_on_driver` alone.

    Args:
        pool: With a `make_scoring_task`.
        task: Its name.
        settings: Of all requests.
        requests: In any order.

    Returns:
        A score for each, in their order.
    """
    return pool.map(
        task,
        [(settings, request) for request in requests],
        # Continuations of one context share passes if they are on one rank.
        together=lambda item: item[1].context,
        cost=lambda item: item[1].length,
    )
