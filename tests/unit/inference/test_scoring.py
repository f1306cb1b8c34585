"""Scores of a small exported model against its own forward passes, one sequence at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.diffusion.probes import LikelihoodEstimator, make_request_noise
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer

MASK = 19
FIXED = ScoringSettings(draws=16)
CHAIN = ScoringSettings("chain_rule", greedy_match="left_to_right")


@pytest.fixture
def model(export, tiny):
    return ExportedModel(export(tiny())[0])


@pytest.fixture
def causal(export, tiny):
    return ExportedModel(export(tiny(is_causal=True), "causal")[0])


def some_requests(number: int = 12, seed: int = 0) -> list[Request]:
    """Of many lengths; contexts may be empty, and continuations are long or short."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(number):
        sizes = (int(generator.integers(0, 12)), 1 + (index * 5) % 17)
        parts = (tuple(generator.integers(2, 19, size).tolist()) for size in sizes)
        found.append(Request(*parts))
    return found


def log_probs_by_hand(model, tokens, guided_context=0, w=0.0):
    """float64 [S, V] of one sequence alone, guidance written out."""
    hf = model._model

    def logits(ids):
        with torch.no_grad():
            return hf(torch.tensor([ids])).logits[0].double()

    found = logits(tokens)
    if w:
        other = logits([MASK] * guided_context + list(tokens[guided_context:]))
        found = other + (w + 1) * (found - other)
    return torch.log_softmax(found, -1)


def score_by_hand(model, request, settings):
    """One forward pass after the other."""
    context, continuation, _ = request
    kind = settings.estimator or "fixed_count"
    estimator = LikelihoodEstimator(kind, settings.draws, settings.stratified)
    values = []
    noise = make_request_noise(settings.seed, context, continuation)
    for probe in estimator.draw_probes(noise, continuation, 0):
        noised = [
            MASK if hidden else token
            for hidden, token in zip(probe.hidden_L, continuation, strict=True)
        ]
        log_probs = log_probs_by_hand(
            model, [*context, *noised], len(context), settings.guidance_scale
        )
        total = 0.0
        for place in np.flatnonzero(probe.weights_L):
            total += probe.weights_L[place] * float(
                log_probs[len(context) + place, continuation[place]]
            )
        values.append(total)
    return estimator.combine(len(continuation), [np.array(values)])


@pytest.mark.parametrize(
    "settings",
    [
        FIXED,
        ScoringSettings("monte_carlo", draws=16, stratified=False, seed=3),
        ScoringSettings("chain_rule"),
        ScoringSettings(draws=16, guidance_scale=0.7),
    ],
    ids=["fixed count", "Monte Carlo", "chain rule", "guided"],
)
def test_scores_are_those_of_one_pass_at_a_time(model, settings):
    requests = some_requests()
    for request, score in zip(requests, Scorer(model, settings).score(requests), strict=True):
        by_hand = score_by_hand(model, request, settings)
        assert score.log_likelihood == pytest.approx(by_hand.mean, abs=2e-4)
        assert score.standard_error == pytest.approx(by_hand.standard_error, abs=2e-4)
        assert score.is_greedy is None


@pytest.mark.parametrize("settings", [FIXED, CHAIN, ScoringSettings(guidance_scale=0.5, draws=8)])
def test_neither_batches_nor_order_nor_padding_change_a_score(model, settings):
    requests = some_requests()
    whole = Scorer(model, settings).score(requests)
    small = replace(settings, max_tokens=1)
    alone = [Scorer(model, small).score([request])[0] for request in requests]
    backwards = Scorer(model, settings).score(requests[::-1])[::-1]
    for one, other, third in zip(whole, alone, backwards, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
        assert third.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
        assert one[2:] == other[2:] == third[2:]
    repeated = Scorer(model, settings).score([requests[3]] * 3)
    assert repeated[0] == repeated[1] == repeated[2]


def test_no_guidance_is_no_second_pass(model):
    requests = some_requests(4)
    plain = Scorer(model, FIXED).score(requests)
    none = Scorer(model, ScoringSettings(draws=16, guidance_scale=0.0)).score(requests)
    assert plain == none
    guided = Scorer(model, ScoringSettings(draws=16, guidance_scale=1e-9)).score(requests)
    for one, other in zip(plain, guided, strict=True):
        assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-3)
        assert other.num_passes == 2 * one.num_passes


def test_rounds_go_on_until_the_error_is_small_enough(model):
    requests = some_requests()
    target = 0.3
    settings = ScoringSettings(draws=16, target_standard_error=target, max_draws=2048)
    once = Scorer(model, FIXED).score(requests)
    often = Scorer(model, settings).score(requests)
    others = Scorer(model, replace(settings, seed=1)).score(requests)
    assert any(score.standard_error > target for score in once)
    for request, first, last, other in zip(requests, once, often, others, strict=True):
        both = math.hypot(last.standard_error, other.standard_error)
        assert abs(last.log_likelihood - other.log_likelihood) <= 4 * both + 1e-4
        assert last.standard_error <= target
        # What was good enough stays as it was.
        if first.standard_error <= target:
            assert last.num_passes == first.num_passes
        assert len(request.continuation) < 5 or last.num_passes % 16 == 0
    capped = ScoringSettings(draws=16, target_standard_error=1e-6, max_draws=48)
    (score,) = Scorer(model, capped).score([Request((2, 3), tuple(range(2, 14)))])
    assert score.num_passes == 48
    assert score.standard_error > 1e-6
    # Three rounds of 16: 2 * 15^2 / 44 degrees of freedom each, Student's quantile from tables.
    assert score.degrees_of_freedom == pytest.approx(3 * 450 / 44)
    assert score.reach == pytest.approx(2.0404 * score.standard_error, rel=1e-3)


def test_chain_rule_and_its_greedy_match_by_hand(model):
    context = (3, 4, 5)
    written = []
    for _ in range(40):
        tokens = [*context, *written, *[MASK] * (6 - len(written))]
        if len(written) == 6:
            break
        written.append(int(log_probs_by_hand(model, tokens)[len(context) + len(written)].argmax()))
    wrong = [*written[:-1], (written[-1] + 1) % 19]
    requests = [Request(context, tuple(tokens)) for tokens in (written, wrong)]
    right, other = Scorer(model, CHAIN).score(requests)
    assert (right.is_greedy, other.is_greedy) == (True, False)
    # The same steps, made after a score that has none of its own.
    after = ScoringSettings(draws=16, greedy_match="left_to_right")
    assert [score.is_greedy for score in Scorer(model, after).score(requests)] == [True, False]


def test_the_most_certain_token_is_revealed_first(model):
    context, length = (7, 8), 6
    tokens = [*context, *[MASK] * length]
    while MASK in tokens:
        log_probs = log_probs_by_hand(model, tokens)
        hidden = [place for place, token in enumerate(tokens) if token == MASK]
        place = max(hidden, key=lambda one: float(log_probs[one].max()))
        tokens[place] = int(log_probs[place].argmax())
    written = tuple(tokens[len(context) :])
    settings = ScoringSettings(draws=16, greedy_match="confidence", max_tokens=64)
    requests = [
        Request(context, written),
        Request(context, (*written[:-1], (written[-1] + 1) % 19)),
        # Mates of other lengths, in the same batches.
        *some_requests(5),
    ]
    scores = Scorer(model, settings).score(requests)
    assert [score.is_greedy for score in scores[:2]] == [True, False]


def test_an_autoregressive_model_is_scored_in_one_pass(causal):
    requests = [one for one in some_requests() if one.context]
    scores = Scorer(causal, FIXED).score(requests)
    for (context, continuation, _), score in zip(requests, scores, strict=True):
        log_probs = log_probs_by_hand(causal, [*context, *continuation])
        at = range(len(context) - 1, len(context) + len(continuation) - 1)
        by_hand = [float(log_probs[i, token]) for i, token in zip(at, continuation, strict=True)]
        best = all(
            int(log_probs[i].argmax()) == token for i, token in zip(at, continuation, strict=True)
        )
        assert score.log_likelihood == pytest.approx(math.fsum(by_hand), abs=1e-4)
        assert score[1:] == (0.0, best, 1, math.inf)
        assert score.reach == 0


@pytest.mark.parametrize(
    ("context", "continuation", "said"),
    [
        ((2,), (), "Request 0 has an empty continuation"),
        (
            (2,) * 20,
            (3,) * 20,
            "Request 0 has 40 tokens, 20 of them asked for",
        ),
        ((2,), (25,), "Request 0 holds token 25, which is none of the 19 that "),
        ((MASK,), (3,), "Request 0 holds token 19, which is none of the 19 that "),
    ],
)
def test_what_cannot_be_scored_is_refused(model, context, continuation, said):
    with pytest.raises(DataError) as caught:
        Scorer(model, FIXED).score([Request(context, continuation)])
    assert str(caught.value).startswith(said)


def test_what_an_autoregressive_model_cannot_do_is_refused(causal):
    with pytest.raises(DataError, match="has no context"):
        Scorer(causal, FIXED).score([Request((), (3,))])
    with pytest.raises(ConfigError, match=r"guidance_scale=0\.5 needs a pass with the context"):
        Scorer(causal, ScoringSettings(guidance_scale=0.5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 1}, "draws=1 is too small"),
        ({"max_draws": 4}, "max_draws=4 is less than the draws=128"),
        ({"target_standard_error": 0.0}, r"target_standard_error=0\.0 is not above 0"),
        ({"seed": -1}, "seed=-1 is too small"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        ScoringSettings(**options)
