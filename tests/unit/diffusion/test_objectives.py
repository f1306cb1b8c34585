from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tiny_objectives import build_objective

from megatron_mdm.core.errors import DataError
from megatron_mdm.diffusion.absorbing import AbsorbingProcess
from megatron_mdm.diffusion.forward_process import Corruption
from megatron_mdm.diffusion.lengths import LengthSampler
from megatron_mdm.diffusion.noise import CounterNoise, Purpose
from megatron_mdm.diffusion.samples import (
    POSITION_IDS,
    SEGMENT_IDS,
    TextWindow,
    corrupted_sample,
    next_token_sample,
)

V, S, B = 50, 32, 16
X0 = np.random.default_rng(0).integers(0, V, S)
WINDOW = TextWindow(X0)


def make_objective(*, seed=3, batch=B, mask=V, **settings):
    return build_objective(**settings, seed=seed, global_batch_size=batch, mask_token_id=mask)


def assert_equal_samples(one, other):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_exactly_the_weighted_tokens_are_hidden(masking):
    objective = make_objective(masking=masking, stochastic_length_ratio=0.5)
    for key in range(100):
        sample = objective.sample(WINDOW, key)
        hidden_S = sample.weights_S > 0
        np.testing.assert_array_equal(sample.inputs_S == V, hidden_S)
        np.testing.assert_array_equal(sample.inputs_S[~hidden_S], X0[~hidden_S])
        np.testing.assert_array_equal(sample.targets_S, X0)
        assert not hidden_S[sample.length :].any()
        assert (sample.targets_S != V).all()
        assert (sample.inputs_S.dtype, sample.weights_S.dtype) == (np.int64, np.float32)


def test_the_window_is_left_as_it_was():
    window_S = X0.copy()
    window_S.setflags(write=False)
    make_objective().sample(TextWindow(window_S), 0)
    make_objective(kind="ar").sample(TextWindow(window_S), 0)


def test_fixed_count_weights_sum_to_one():
    objective = make_objective(masking="fixed_count", stochastic_length_ratio=0.5)
    sums = [objective.sample(WINDOW, key).weights_S.sum(dtype=np.float64) for key in range(200)]
    np.testing.assert_allclose(sums, 1.0, rtol=1e-6)


def test_bernoulli_weights_are_one_over_p_and_the_length():
    objective = make_objective(eps=1e-3, stochastic_length_ratio=0.5)
    for key in range(50):
        sample = objective.sample(WINDOW, key)
        step, slot = divmod(key, B)
        offset = CounterNoise(3).uniform(Purpose.STEP_OFFSET, step)
        reversed_bits = int(f"{slot:04b}"[::-1], 2)
        t = 1 - (offset + reversed_bits / B) % 1
        expected = 1 / ((1 - 1e-3) * t + 1e-3) / sample.length
        np.testing.assert_allclose(sample.weights_S[sample.weights_S > 0], expected, rtol=1e-6)


def test_bernoulli_weights_sum_to_one_on_average():
    objective = make_objective(time_sampling="iid")
    sums = np.array([objective.sample(WINDOW, key).weights_S.sum() for key in range(10_000)])
    assert abs(sums.mean() - 1) < 4 * sums.std() / 100


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
@pytest.mark.parametrize("time_sampling", ["low_discrepancy", "iid"])
def test_the_loss_of_a_fixed_denoiser_reaches_its_exact_bound(masking, time_sampling):
    length, eps = 4, 1e-3
    costs = dict(
        zip(
            itertools.product([False, True], repeat=length),
            np.random.default_rng(1).random((2**length, length)),
            strict=True,
        )
    )
    exact = 0.0
    for hidden, cost in costs.items():
        count = sum(hidden)
        if not count:
            continue
        # Integral of p^(l-1) (1-p)^(L-l) by a fine midpoint rule, over (eps, 1] or (0, 1].
        low = eps if masking == "bernoulli" else 0.0
        p = low + (1 - low) * (np.arange(20_000) + 0.5) / 20_000
        share = float((p ** (count - 1) * (1 - p) ** (length - count)).mean())
        exact += share * cost[list(hidden)].sum() / length
    objective = make_objective(masking=masking, time_sampling=time_sampling, eps=eps)
    window = TextWindow(np.arange(length))
    values = []
    for key in range(20_000):
        weights_S = objective.sample(window, key).weights_S
        values.append(float(weights_S @ costs[tuple((weights_S > 0).tolist())]))
    # Means of whole global batches, since their times depend on each other.
    means = np.reshape(values, (-1, B)).mean(1)
    assert abs(means.mean() - exact) < 4 * means.std() / math.sqrt(len(means))


def test_stratified_times_lower_the_variance_of_the_loss():
    def spread(time_sampling) -> float:
        objective = make_objective(masking="fixed_count", time_sampling=time_sampling)
        counts = [(objective.sample(WINDOW, key).weights_S > 0).sum() for key in range(100 * B)]
        return float(np.std(np.reshape(counts, (100, B)).mean(1)))

    assert spread("low_discrepancy") < 0.3 * spread("iid")


def test_a_sample_is_a_pure_function_of_seed_and_position():
    one, other = (make_objective(stochastic_length_ratio=0.3) for _ in range(2))
    later = [other.sample(WINDOW, key) for key in range(39, -1, -1)][::-1]
    for key in range(40):
        assert_equal_samples(one.sample(WINDOW, key), later[key])


def test_no_two_samples_of_a_global_batch_share_time_or_mask():
    objective = make_objective(batch=256)
    window = TextWindow(np.zeros(2048, dtype=np.int64))
    samples = [objective.sample(window, key) for key in range(512)]  # and the next visit
    assert len({sample.weights_S.max() for sample in samples}) == 512
    assert len({sample.inputs_S.tobytes() for sample in samples}) == 512


def test_masks_of_a_global_batch_are_independent():
    objective = make_objective(masking="fixed_count", batch=32)
    window = TextWindow(np.zeros(8192, dtype=np.int64))
    masks = np.stack([objective.sample(window, key).weights_S > 0 for key in range(32)])
    varied = masks[(masks.mean(1) > 0.1) & (masks.mean(1) < 0.9)]
    correlations = np.corrcoef(varied)[np.triu_indices(len(varied), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(8192)


def test_seeds_and_positions_do_not_trade_places():
    one, other = make_objective(seed=1), make_objective(seed=2)
    window = TextWindow(np.zeros(512, dtype=np.int64))
    assert (one.sample(window, 2).inputs_S != other.sample(window, 1).inputs_S).any()


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("minimum", [1, 2])
def test_the_stated_share_of_samples_is_cut_to_the_stated_mean(ratio, minimum):
    count, full = 20_000, 16
    sampler = LengthSampler(CounterNoise(5), ratio, minimum)
    lengths = np.array([sampler(full, key) for key in range(count)])
    values = np.arange(minimum, full + 1)
    expected = np.where(values == full, 1 - ratio, 0) + ratio / len(values)
    for value, share in zip(values, expected, strict=True):
        error = math.sqrt(share * (1 - share) / count)
        assert abs((lengths == value).mean() - share) <= 4.5 * error + 1e-12
    assert set(np.unique(lengths)) <= set(values.tolist())


def test_a_length_does_not_depend_on_the_mask():
    lengths = [
        [
            make_objective(masking=form, stochastic_length_ratio=0.5).sample(WINDOW, n).length
            for n in range(64)
        ]
        for form in ("bernoulli", "fixed_count")
    ]
    assert lengths[0] == lengths[1]


def test_every_prediction_of_the_next_token_weighs_the_same():
    sample = make_objective(kind="ar").sample(WINDOW, 0)
    np.testing.assert_array_equal(sample.inputs_S, X0)
    np.testing.assert_array_equal(sample.targets_S[:-1], X0[1:])
    np.testing.assert_allclose(sample.weights_S[:-1], 1 / (S - 1), rtol=1e-7)
    assert sample.weights_S[-1] == 0
    assert sample.length == S


def test_a_cut_sample_predicts_no_token_beyond_its_length():
    sample = next_token_sample(WINDOW, 5)
    np.testing.assert_allclose(sample.weights_S, [0.25] * 4 + [0] * (S - 4))
    lengths = []
    for key in range(300):
        sample = make_objective(kind="ar", stochastic_length_ratio=1.0).sample(WINDOW, key)
        lengths.append(sample.length)
        assert np.flatnonzero(sample.weights_S).tolist() == list(range(sample.length - 1))
        assert sample.weights_S.sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)
    assert min(lengths) == 2


def test_a_corruption_shorter_than_the_window_leaves_the_rest_alone():
    sample = corrupted_sample(WINDOW, Corruption(np.array([V, X0[1], V]), np.array([1.5, 0, 1.5])))
    assert sample.inputs_S.tolist() == [V, X0[1], V, *X0[3:]]
    assert sample.weights_S.tolist() == [0.5, 0, 0.5] + [0] * (S - 3)
    assert sample.length == 3


def test_a_window_that_holds_the_mask_token_is_refused():
    mask = int(X0[4])
    with pytest.raises(DataError, match=f"position 9 holds the mask token .*mask_token_id={mask}"):
        make_objective(mask=mask).sample(WINDOW, 9)


def documents_of(*lengths):
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def test_no_prediction_crosses_the_end_of_a_document():
    documents_S = documents_of(1, 2, 13, 1, 15)
    sample = make_objective(kind="ar").sample(TextWindow(X0, documents_S), 0)
    # The ends of documents lie at 0, 2, 15, 16 and 31.
    predicting = [1, *range(3, 15), *range(17, 31)]
    np.testing.assert_array_equal(sample.model_inputs[SEGMENT_IDS], documents_S)
    assert np.flatnonzero(sample.weights_S).tolist() == predicting
    np.testing.assert_allclose(sample.weights_S[predicting], 1 / 27, rtol=1e-7)
    np.testing.assert_array_equal(sample.targets_S[predicting], X0[np.add(predicting, 1)])


def test_a_cut_inside_a_document_leaves_the_predictions_before_it():
    sample = next_token_sample(TextWindow(X0, documents_of(3, 29)), 6)
    np.testing.assert_allclose(sample.weights_S, [0.25, 0.25, 0, 0.25, 0.25] + [0] * (S - 5))
    assert sample.length == 6


@pytest.mark.parametrize("length", [2, S])
def test_documents_of_one_token_leave_nothing_to_predict(length):
    sample = next_token_sample(TextWindow(X0, np.arange(S, dtype=np.int32)), length)
    np.testing.assert_array_equal(sample.weights_S, np.zeros(S, np.float32))


def test_a_window_of_one_document_is_an_ordinary_window():
    one = make_objective(kind="ar").sample(TextWindow(X0, documents_of(S)), 0)
    assert_equal_samples(one[:4], make_objective(kind="ar").sample(WINDOW, 0)[:4])


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_documents_change_no_mask(masking):
    objective = make_objective(masking=masking, stochastic_length_ratio=0.5)
    documents_S = documents_of(3, 20, 9)
    for key in range(30):
        sample = objective.sample(TextWindow(X0, documents_S), key)
        assert sample.model_inputs[SEGMENT_IDS] is documents_S
        assert_equal_samples(sample[:4], objective.sample(WINDOW, key)[:4])


def test_the_bound_of_a_window_is_the_sum_of_its_documents_bounds():
    """Exactly, for costs that depend on the mask of the own document alone."""
    lengths = (2, 3)
    generator = np.random.default_rng(4)
    costs = [
        {mask: generator.random(n) for mask in itertools.product([False, True], repeat=n)}
        for n in lengths
    ]

    process = AbsorbingProcess(V, fixed_count=True)

    def expected_sum(size, cost):
        """Mean over all counts and sets of nats in all, through the process's own weights."""
        uniforms = [np.argsort(order) / size for order in itertools.permutations(range(size))]
        total = 0.0
        for count in range(1, size + 1):
            for uniforms_L in uniforms:
                draw = process.corrupt(np.zeros(size, np.int64), count / size, uniforms_L)
                total += float(draw.weights_L @ cost(tuple((draw.weights_L > 0).tolist())))
        return total / size / len(uniforms)

    together = expected_sum(5, lambda mask: np.append(costs[0][mask[:2]], costs[1][mask[2:]]))
    apart = [expected_sum(n, cost.__getitem__) for n, cost in zip(lengths, costs, strict=True)]
    assert together == pytest.approx(sum(apart), rel=1e-6)


def test_left_to_right_samples_hide_the_same_number_at_the_end():
    ratios = (0.0, 0.4, 1.0)
    random, some, all_of_them = (
        make_objective(masking="fixed_count", left_to_right_ratio=ratio) for ratio in ratios
    )
    moved = 0
    for key in range(400):
        hidden = [
            objective.sample(WINDOW, key).weights_S > 0 for objective in (random, some, all_of_them)
        ]
        count = hidden[0].sum()
        assert hidden[2].tolist() == [place >= S - count for place in range(S)]
        assert hidden[1].tolist() in (hidden[0].tolist(), hidden[2].tolist())
        moved += count < S and hidden[1].tolist() == hidden[2].tolist()
    assert abs(moved / 400 - 0.4) < 4 * (0.24 / 400) ** 0.5


def test_times_stay_in_their_range():
    objective = make_objective(t_min=0.25, t_max=0.5, masking="fixed_count")
    counts = {int((objective.sample(WINDOW, key).weights_S > 0).sum()) for key in range(300)}
    assert counts == set(range(9, 17))


def test_ar_reads_fixed_orders_of_which_one_is_the_texts():
    objective = make_objective(kind="ar", num_orders=3)
    orders = {}
    for key in range(300):
        sample = objective.sample(WINDOW, key)
        assert sample.model_inputs[POSITION_IDS][0] == 0
        assert sorted(sample.model_inputs[POSITION_IDS]) == list(range(S))
        np.testing.assert_array_equal(sample.inputs_S, X0[sample.model_inputs[POSITION_IDS]])
        np.testing.assert_array_equal(sample.targets_S[:-1], sample.inputs_S[1:])
        orders.setdefault(tuple(sample.model_inputs[POSITION_IDS]), []).append(key)
    assert len(orders) == 3
    assert tuple(range(S)) in orders
    assert all(abs(len(found) - 100) < 4 * (300 * 2 / 9) ** 0.5 for found in orders.values())
    # The same three for every key and worker, others for another seed.
    again = make_objective(kind="ar", num_orders=3).sample(WINDOW, 0)
    np.testing.assert_array_equal(
        again.model_inputs[POSITION_IDS], objective.sample(WINDOW, 0).model_inputs[POSITION_IDS]
    )
    others = make_objective(kind="ar", num_orders=3, seed=4)
    assert {
        tuple(others.sample(WINDOW, key).model_inputs[POSITION_IDS]) for key in range(99)
    } != set(orders)


def drops_of(**settings):
    objective = make_objective(kind="ar", key_dropout=True, **settings)
    drops = [objective.sample(WINDOW, key).model_inputs for key in range(2000)]
    assert len({int(drop["dropped_keys_seed"]) for drop in drops}) > 1990
    return np.stack([drop["dropped_keys_rates"] for drop in drops])


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_rate_per_query_leaves_the_rates_to_the_queries_and_the_share_too(ratio):
    drops_N3 = drops_of(key_dropout_ratio=ratio)
    np.testing.assert_array_equal(drops_N3, np.float32([[1e-3, 1.0, ratio]] * len(drops_N3)))
    assert not make_objective(kind="ar").sample(WINDOW, 0).model_inputs


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_rate_per_sample_is_one_rate_for_all_queries_of_a_share_of_samples(ratio):
    drops_N3 = drops_of(key_dropout_rate_per="sample", key_dropout_ratio=ratio)
    rates, greatest, shares = drops_N3.T.astype(float)
    np.testing.assert_array_equal(greatest, rates)
    assert rates.min() >= np.float32(1e-3)
    assert abs(rates.mean() - 0.5005) < 4 * rates.std() / len(rates) ** 0.5
    assert set(shares) <= {0.0, 1.0}
    assert abs(shares.mean() - ratio) <= 4 * (ratio * (1 - ratio) / len(shares)) ** 0.5
    # Which samples lose keys has nothing to do with how many they would lose.
    assert ratio == 1.0 or abs(np.corrcoef(rates, shares)[0, 1]) < 4 / len(shares) ** 0.5
