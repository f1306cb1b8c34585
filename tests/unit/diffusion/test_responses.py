"""Responses are learned, prompts are not, and every pair weighs the same."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_objectives import build_objective

from megatron_mdm.config import FinetuningConfig
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.likelihood import NoiseBank, weighted_nll
from megatron_mdm.diffusion.noise import spread_times
from megatron_mdm.diffusion.responses import number_pairs, predict_responses
from megatron_mdm.diffusion.samples import SEGMENT_IDS, PromptResponseSpan, TextWindow

V, S, B, PER_WINDOW = 50, 40, 16, 2.5
TOKENS = np.random.default_rng(0).integers(0, V, S)
# Prompts of 3, 1 and 4 tokens; responses of 2, 20 and 5, the last with an end that is given; and 4
# tokens of padding.
PAIRS = (
    PromptResponseSpan(0, 3, 5, 5),
    PromptResponseSpan(5, 6, 26, 26),
    PromptResponseSpan(26, 30, 35, 36),
)
WINDOW = TextWindow(TOKENS, pairs=PAIRS, pairs_per_window=PER_WINDOW)
LEARNED = np.zeros(S, dtype=bool)
for one in PAIRS:
    LEARNED[one.response : one.learned_stop] = True


def make_objective(prompt_dropout=0.0, seed=1, batch=B, **settings):
    return build_objective(
        **settings,
        seed=seed,
        global_batch_size=batch,
        mask_token_id=V,
        finetuning=FinetuningConfig(enabled=True, prompt_dropout=prompt_dropout),
    )


@pytest.mark.parametrize("form", ["bernoulli", "fixed_count"])
def test_prompts_ends_that_are_given_and_padding_are_neither_hidden_nor_learned(form):
    objective = make_objective(masking=form)
    hidden_somewhere = np.zeros(S, dtype=bool)
    for key in range(200):
        sample = objective.sample(WINDOW, key)
        hidden = sample.inputs_S == V
        np.testing.assert_array_equal(sample.weights_S > 0, hidden)
        np.testing.assert_array_equal(sample.inputs_S[~hidden], TOKENS[~hidden])
        np.testing.assert_array_equal(sample.targets_S, TOKENS)
        assert not (hidden & ~LEARNED).any()
        hidden_somewhere |= hidden
    np.testing.assert_array_equal(hidden_somewhere, LEARNED)


def test_every_pair_weighs_the_same_whatever_its_length():
    objective = make_objective(masking="fixed_count")
    for key in range(50):
        weights_S = objective.sample(WINDOW, key).weights_S
        for one in PAIRS:
            total = weights_S[one.start : one.stop].sum(dtype=np.float64)
            assert total == pytest.approx(1 / PER_WINDOW, rel=1e-6)


def test_bernoulli_weights_of_every_pair_are_right_on_average():
    objective = make_objective(masking="bernoulli", time_sampling="iid")
    sums = np.array(
        [
            [objective.sample(WINDOW, key).weights_S[one.start : one.stop].sum() for one in PAIRS]
            for key in range(8000)
        ]
    )
    errors = sums.std(0) / math.sqrt(len(sums))
    assert (np.abs(sums.mean(0) - 1 / PER_WINDOW) < 4 * errors).all()


def cost(hidden: tuple[bool, ...]) -> float:
    """What it costs to predict the hidden tokens of a response of 5; any function does."""
    return sum(math.sin(1 + 3 * place + sum(hidden)) ** 2 for place in range(5) if hidden[place])


def test_the_mean_loss_of_a_response_is_the_enumerated_bound():
    exact = 0.0
    for count in range(1, 6):
        masks = [mask for mask in itertools.product([False, True], repeat=5) if sum(mask) == count]
        # A count is as likely as any other, and a mask as any other of its count.
        exact += np.mean([cost(mask) / count for mask in masks]) / 5
    last = PAIRS[2]
    part = slice(last.response, last.learned_stop)
    for form in ("bernoulli", "fixed_count"):
        objective = make_objective(masking=form, eps=1e-6, time_sampling="iid")
        values = []
        for key in range(6000):
            weights_L = objective.sample(WINDOW, key).weights_S[part]
            hidden = tuple((weights_L > 0).tolist())
            values.append(float(weights_L.max()) * cost(hidden) * PER_WINDOW)
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - exact) < 4 * error, form


def test_a_whole_prompt_is_dropped_as_often_as_asked_for_each_pair_by_itself():
    objective = make_objective(prompt_dropout=0.3, masking="fixed_count")
    plain = make_objective(masking="fixed_count")
    dropped = []
    for key in range(2000):
        sample, expected = objective.sample(WINDOW, key), plain.sample(WINDOW, key)
        np.testing.assert_array_equal(sample.weights_S, expected.weights_S)
        np.testing.assert_array_equal(sample.inputs_S[LEARNED], expected.inputs_S[LEARNED])
        row = []
        for one in PAIRS:
            hidden = sample.inputs_S[one.start : one.response] == V
            assert hidden.all() or not hidden.any()
            row.append(bool(hidden[0]))
        dropped.append(row)
    rates = np.mean(dropped, axis=0)
    assert (np.abs(rates - 0.3) < 4 * math.sqrt(0.21 / 2000)).all()
    assert len({tuple(row) for row in dropped}) == 8


def test_times_of_a_window_are_spread_and_each_is_uniform():
    for count in (1, 3, 7):
        times = np.array([spread_times(first, count) for first in (np.arange(1000) + 0.5) / 1000])
        assert ((times > 0) & (times <= 1)).all()
        gaps = np.diff(np.sort(times, axis=1), axis=1)
        np.testing.assert_allclose(gaps, 1 / count, atol=1e-12)
        for column in times.T:
            np.testing.assert_allclose(np.sort(column), (np.arange(1000) + 0.5) / 1000, atol=1e-3)
    assert spread_times(1.0, 1) == [1.0]


def test_a_sample_is_a_pure_function_of_seed_and_position():
    one, other = make_objective(0.5), make_objective(0.5)
    later = [other.sample(WINDOW, key) for key in range(19, -1, -1)][::-1]
    for key in range(20):
        sample = one.sample(WINDOW, key)
        np.testing.assert_array_equal(sample.inputs_S, later[key].inputs_S)
        np.testing.assert_array_equal(sample.weights_S, later[key].weights_S)
    assert (
        make_objective(seed=2).sample(WINDOW, 0).inputs_S != one.sample(WINDOW, 0).inputs_S
    ).any()


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_no_pair_sees_another_nor_padding(kind):
    sample = make_objective(kind=kind).sample(WINDOW, 0)
    expected = [0] * 5 + [1] * 21 + [2] * 10 + [3] * 4
    assert sample.model_inputs[SEGMENT_IDS].tolist() == expected == number_pairs(WINDOW).tolist()
    assert sample.length == S


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_an_pair_alone_is_a_sample_that_ends_with_it(kind):
    alone = TextWindow(TOKENS, pairs=(PromptResponseSpan(0, 3, 9, 10),))
    sample = make_objective(kind=kind).sample(alone, 0)
    assert not sample.model_inputs
    assert sample.length == 10
    batch = Batch.stack([sample, make_objective(kind=kind).sample(WINDOW, 0)])
    assert batch.model_inputs[SEGMENT_IDS][0].tolist() == [0] * S
    assert batch.lengths_B.tolist() == [10, S]
    assert not Batch.stack([sample, sample]).model_inputs


def test_ar_predicts_each_learned_token_once_from_the_one_before_it():
    sample = predict_responses(WINDOW)
    places = np.flatnonzero(sample.weights_S)
    np.testing.assert_array_equal(places + 1, np.flatnonzero(LEARNED))
    np.testing.assert_array_equal(sample.targets_S[places], TOKENS[LEARNED])
    np.testing.assert_array_equal(sample.inputs_S, TOKENS)
    for one in PAIRS:
        part_S = sample.weights_S[one.response - 1 : one.learned_stop - 1]
        np.testing.assert_allclose(part_S, 1 / (len(part_S) * PER_WINDOW), rtol=1e-6)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_gradients_at_prompts_are_exactly_zero(kind):
    sample = make_objective(kind=kind).sample(WINDOW, 3)
    logits = torch.randn(1, S, V, requires_grad=True, generator=None)
    weights, targets = torch.from_numpy(sample.weights_S), torch.from_numpy(sample.targets_S)
    weighted_nll(logits, targets[None], weights[None]).sum().backward()
    moved = logits.grad[0].abs().sum(-1).numpy() > 0
    predictors = LEARNED if kind == "mdm" else np.append(LEARNED[1:], False)
    assert not (moved & ~predictors).any()
    np.testing.assert_array_equal(moved, sample.weights_S > 0)


def test_the_mask_token_in_a_window_is_refused():
    spoilt = WINDOW._replace(tokens_S=np.where(np.arange(S) == 1, V, TOKENS))
    with pytest.raises(DataError, match=r"position 7 holds the mask token model.mask_token_id=50"):
        make_objective().sample(spoilt, 7)


def test_each_response_that_is_judged_is_masked_by_itself_and_one_alone_at_its_time():
    bank = NoiseBank(8, 2, seed=3)
    # Judged by the fixed-count form, whatever is trained with.
    objective = make_objective(masking="bernoulli")
    weights_S = objective.held_out_sample(WINDOW, "nll", bank.draw(5, 1)).weights_S
    for one in PAIRS:
        hidden = weights_S[one.response : one.learned_stop]
        hidden = hidden[hidden > 0]
        assert hidden == pytest.approx(np.full(len(hidden), 1 / (len(hidden) * PER_WINDOW)))
    alone = WINDOW._replace(pairs=PAIRS[1:2])
    weights_S = objective.held_out_sample(alone, "nll", bank.draw(5, 1)).weights_S
    assert (weights_S > 0).sum() == math.ceil(20 * bank.times_NK[5, 1])
