from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_objectives import build_objective

from megatron_mdm.config.objective import CHOSEN_OBJECTIVE, RunWays
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.loader import Batch
from megatron_mdm.diffusion.attention_rules import CAUSAL_ATTENTION, FULL_ATTENTION
from megatron_mdm.diffusion.kind_order import KindOrder
from megatron_mdm.diffusion.likelihood import NoiseBank
from megatron_mdm.diffusion.mixed_objective import describe_ways
from megatron_mdm.diffusion.noise import CounterNoise
from megatron_mdm.diffusion.samples import TextWindow

V, S, B = 50, 12, 16
X0 = np.random.default_rng(0).integers(0, V, S)
WINDOW = TextWindow(X0)
DOCUMENTS = TextWindow(X0, np.array([0] * 3 + [1] + [2] * 8, dtype=np.int32))


def make(*, seed=3, mask=V, **fields):
    fields = {"kind": "mixture", "group_size": 2, **fields}
    return build_objective(**fields, seed=seed, global_batch_size=B, mask_token_id=mask)


shares = st.integers(1, 40).flatmap(lambda n: st.builds(Fraction, st.integers(0, n), st.just(n)))


@settings(max_examples=60, deadline=None)
@given(shares, st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**70))
def test_kinds_are_a_function_of_seed_and_position_and_as_even_as_possible(
    share, num_groups, size, seed
):
    order, again = (KindOrder(CounterNoise(seed), share, size, num_groups) for _ in range(2))
    num_steps, step_size = 12, num_groups * size
    positions = range(num_steps * step_size)
    kinds = [order.find(position) for position in positions]
    # In another order, and by another object.
    assert [again.find(position) for position in reversed(positions)] == kinds[::-1]
    is_ar_TGM = np.reshape([kind.is_ar for kind in kinds], (num_steps, num_groups, size))
    # Groups are never mixed.
    assert (is_ar_TGM == is_ar_TGM[:, :, :1]).all()
    counts_T = is_ar_TGM[:, :, 0].sum(axis=1)
    if (share * num_groups).denominator == 1:
        assert (counts_T == share * num_groups).all()
    for start, stop in itertools.combinations(range(num_steps + 1), 2):
        expected = (stop - start) * num_groups * share
        assert abs(counts_T[start:stop].sum() - expected) < 1
    for step in range(num_steps):
        of_step = kinds[step * step_size : (step + 1) * step_size]
        slots = [kind.slot for kind in of_step if not kind.is_ar]
        assert slots == list(range(len(slots)))
        assert {kind.num_diffusion for kind in of_step} == {len(slots)}
        # Replicas, which take every so many micro batches, have as many of either, to one.
        for replicas in (one for one in range(1, num_groups + 1) if num_groups % one == 0):
            by_replica = is_ar_TGM[step, :, 0].reshape(-1, replicas).sum(axis=0)
            assert np.ptp(by_replica) <= 1


def test_every_place_of_a_step_is_of_either_kind_as_often():
    order = KindOrder(CounterNoise(0), Fraction(3, 8), 1, 8)
    is_ar = np.reshape([order.find(position).is_ar for position in range(8 * 4000)], (-1, 8))
    error = math.sqrt(3 / 8 * 5 / 8 / len(is_ar))
    assert (abs(is_ar.mean(axis=0) - 3 / 8) < 4 * error).all()
    assert is_ar.mean() == 3 / 8


def test_a_share_written_in_decimals_is_exact():
    # 0.29 * 100 is 28.999999999999996 in floating point.
    for seed in range(50):
        order = KindOrder(CounterNoise(seed), Fraction("0.29"), 1, 100)
        assert {order.count_ar_groups(step) for step in range(40)} == {29}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("window", [WINDOW, DOCUMENTS], ids=["window", "documents"])
def test_a_sample_of_next_token_prediction_is_that_of_ar(window, ratio):
    objective, ar = make(stochastic_length_ratio=ratio), make_pure("ar", ratio)
    for position in range(4 * B):
        sample = objective.sample(window, position)
        if objective.kinds.find(position).is_ar:
            assert sample.attention is CAUSAL_ATTENTION
            assert_equal(sample, ar.sample(window, position))


def make_pure(kind, ratio=0.0, **fields):
    fields |= {"kind": kind, "stochastic_length_ratio": ratio}
    return build_objective(**fields, seed=3, global_batch_size=B, mask_token_id=V)


def assert_equal(sample, other):
    for mine, theirs in zip(sample[:4], other[:4], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert sample.model_inputs.keys() == other.model_inputs.keys()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_times_are_stratified_over_the_masked_diffusion_samples_of_a_step(share):
    objective = make(ar_share=share, shift=False)
    for step in range(6):
        positions = range(step * B, (step + 1) * B)
        kinds = {position: objective.kinds.find(position) for position in positions}
        times = [objective.diffusion.times(one) for one in positions if not kinds[one].is_ar]
        strata = np.floor((1 - np.array(times)) * len(times) * (1 - 1e-12)).astype(int)
        assert len(times) == kinds[positions[0]].num_diffusion
        offset = (1 - np.array(times)) * len(times) % 1
        assert np.ptp(np.exp(2j * np.pi * offset).real) < 1e-9
        assert sorted(strata) == list(range(len(times)))


def test_in_place_samples_of_masked_diffusion_are_those_of_mdm_at_their_time():
    objective, mdm = make(shift=False, ar_share=0.0), make_pure("mdm")
    for position in range(3 * B):
        sample = objective.sample(WINDOW, position)
        assert sample.attention is FULL_ATTENTION
        assert_equal(sample, mdm.sample(WINDOW, position))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("window", [WINDOW, DOCUMENTS], ids=["window", "documents"])
def test_shifted_samples_predict_each_hidden_token_one_place_before(window, ratio):
    shifted, mdm = make(ar_share=0.0, stochastic_length_ratio=ratio), make_pure("mdm", ratio)
    starts = [0] if window is WINDOW else [0, 3, 4]
    some_first_hidden = False
    for position in range(6 * B):
        sample, plain = shifted.sample(window, position), mdm.sample(window, position)
        np.testing.assert_array_equal(sample.inputs_S, plain.inputs_S)
        assert sample.length == plain.length
        predicted = [i for i in range(plain.length) if i not in starts]
        factor = plain.length / max(len(predicted), 1)
        expected_S = np.zeros(S)
        for i in predicted:
            expected_S[i - 1] = plain.weights_S[i] * factor
        np.testing.assert_allclose(sample.weights_S, expected_S, rtol=1e-6)
        asked = np.flatnonzero(sample.weights_S)
        np.testing.assert_array_equal(sample.targets_S[asked], X0[asked + 1])
        np.testing.assert_array_equal(sample.inputs_S[asked + 1], V)
        some_first_hidden |= sample.inputs_S[0] == V
    assert some_first_hidden


def test_the_mean_of_shifted_weights_is_that_of_the_tokens_that_are_predicted():
    objective = make(ar_share=0.0, masking="fixed_count", group_size=16)
    weights_NS = np.array([objective.sample(WINDOW, one).weights_S for one in range(200 * B)])
    error_S = weights_NS.std(axis=0) / math.sqrt(len(weights_NS))
    expected_S = np.append(np.full(S - 1, 1 / (S - 1)), 0.0)
    assert (abs(weights_NS.mean(axis=0) - expected_S) <= 4 * error_S).all()
    assert objective.predicted_share(S) == pytest.approx((S + 1) / 2 * (1 - 1 / S) / S)


@pytest.mark.parametrize("window", [WINDOW, DOCUMENTS], ids=["window", "documents"])
def test_the_shifted_held_out_sample_is_that_of_the_tokens_ar_predicts_moved(window):
    judge, mdm = make().judges["mdm"], make_pure("mdm")
    bank = NoiseBank(5, 2, 0)
    for sample, draw in itertools.product(range(5), range(2)):
        found = judge.held_out_sample(window, "nll", bank.draw(sample, draw))
        plain = mdm.held_out_sample(window, "nll_given_first", bank.draw(sample, draw))
        np.testing.assert_array_equal(found.inputs_S, plain.inputs_S)
        np.testing.assert_array_equal(found.weights_S, np.append(plain.weights_S[1:], 0))
        np.testing.assert_array_equal(found.targets_S[:-1], X0[1:])
    assert judge.count_predictions(window) == len(X0) - (1 if window is WINDOW else 3)


def test_a_document_of_one_token_alone_is_not_predicted():
    alone = TextWindow(X0, np.arange(S, dtype=np.int32))
    for position in range(B):
        assert not make(ar_share=0.0).sample(alone, position).weights_S.any()


@pytest.mark.parametrize(
    ("fields", "judges", "ways"),
    [
        ({"ar_share": 0.5}, ["ar", "mdm"], ("ar", "mdm", "prefix")),
        ({"ar_share": 0.4}, ["mdm", "ar"], ("mdm", "ar", "prefix")),
        ({"ar_share": 0.4, "own_loss": "ar"}, ["ar", "mdm"], ("ar", "mdm", "prefix")),
        ({"ar_share": 0.0}, ["mdm"], ("mdm",)),
        ({"ar_share": 1.0}, ["ar"], ("ar",)),
    ],
)
def test_the_runs_own_loss_is_the_first_of_what_it_learns(fields, judges, ways):
    assert list(make(**fields).judges) == judges
    section = CHOSEN_OBJECTIVE.read({"kind": "mixture", **fields})
    assert section.run_ways == RunWays(ways, is_shifted="mdm" in ways)
    assert CHOSEN_OBJECTIVE.read(describe_ways(section.run_ways)).run_ways == section.run_ways
    assert section.runs_as == ways[0]
    assert section.nll_is_exact == (ways[0] == "ar")


def test_expectations_are_means_over_both_kinds():
    objective = make(ar_share=0.25, stochastic_length_ratio=0.5)
    ar, mdm = objective.prediction, objective.diffusion
    assert objective.causal_share == 0.25
    for name in ("mean_length", "predicted_share"):
        sides = [getattr(one, name)(S) for one in (ar, mdm)]
        assert getattr(objective, name)(S) == pytest.approx(sides[0] / 4 + sides[1] * 3 / 4)
    assert objective.uses_mask_token
    assert not make(ar_share=1.0).uses_mask_token


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"process": {"kind": "hybrid"}}, "does not mask alone"),
        ({"process": {"kind": "uniform"}}, "use objective.process.kind=absorbing"),
        ({"ar_share": 1.5}, "less than or equal to 1"),
        ({"ar_share": 0.0, "own_loss": "ar"}, "never learns: leave it out"),
        ({"ar_share": 1.0, "own_loss": "mdm"}, "never learns: leave it out"),
        ({"loss_head": {"kind": "interpolating"}}, "is no bound"),
    ],
)
def test_what_cannot_be_mixed_is_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        CHOSEN_OBJECTIVE.read({"kind": "mixture", **fields})


def test_a_micro_batch_of_both_kinds_is_refused():
    objective = make(ar_share=0.5, group_size=1)
    samples = [objective.sample(WINDOW, position) for position in range(B)]
    with pytest.raises(DataError, match="attend differently"):
        Batch.stack(samples)
    ar = [sample for sample in samples if sample.attention is CAUSAL_ATTENTION]
    assert Batch.stack(ar).attention is CAUSAL_ATTENTION
