from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.diffusion.noise import (
    CounterNoise,
    Purpose,
    TimeSampler,
    seed_sequence,
    van_der_corput_ranks,
)

# Chi-square with 19 degrees of freedom exceeds this once in 10,000.
CHI_SQUARE_19 = 50.8


def chi_square_of_20_bins(values) -> float:
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    expected = len(values) / 20
    return float(((counts - expected) ** 2 / expected).sum())


def times_of_step(step: int, batch: int, seed: int = 3) -> np.ndarray:
    sampler = TimeSampler(CounterNoise(seed), batch, low_discrepancy=True)
    return np.array([sampler(step * batch + slot) for slot in range(batch)])


def test_draws_do_not_depend_on_the_order_of_calls():
    noise = CounterNoise(7)
    forward = [noise.uniforms(Purpose.MASK, position, 5) for position in range(8)]
    backward = [
        CounterNoise(7).uniforms(Purpose.MASK, position, 5) for position in range(7, -1, -1)
    ]
    np.testing.assert_array_equal(forward, backward[::-1])


def test_a_longer_draw_begins_like_a_shorter_one():
    noise = CounterNoise(7)
    long = noise.uniforms(Purpose.MASK, 4, 100)
    np.testing.assert_array_equal(noise.uniforms(Purpose.MASK, 4, 9), long[:9])


def test_another_process_draws_the_same():
    program = (
        "from megatron_mdm.diffusion.noise import *\n"
        "print(CounterNoise(5).uniforms(Purpose.MASK, 12, 3).tolist())\n"
        "print(TimeSampler(CounterNoise(5), 8, True)(21))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    noise = CounterNoise(5)
    assert told[0] == str(noise.uniforms(Purpose.MASK, 12, 3).tolist())
    assert told[1] == str(TimeSampler(noise, 8, True)(21))


def test_no_two_tuples_of_seed_domain_purpose_and_position_share_draws():
    draws = {
        CounterNoise(seed, domain).uniform(purpose, position)
        for seed in range(12)
        for domain in range(2)
        for purpose in Purpose
        for position in range(12)
    }
    assert len(draws) == 12 * 2 * len(Purpose) * 12


def test_swapped_seed_and_position_do_not_collide():
    one, other = CounterNoise(1), CounterNoise(2)
    assert not np.isin(
        one.uniforms(Purpose.MASK, 2, 500), other.uniforms(Purpose.MASK, 1, 500)
    ).any()


@settings(deadline=None)
@given(
    st.sets(
        st.lists(st.sampled_from([0, 1, 2, 5, 2**32, 2**32 + 5, 2**64]), max_size=4).map(tuple),
        min_size=2,
        max_size=60,
    )
)
def test_different_tuples_hash_to_different_states(keys):
    states = {tuple(seed_sequence(*key).generate_state(2, np.uint64)) for key in keys}
    assert len(states) == len(keys)


def test_a_seed_beyond_32_bits_is_not_taken_for_a_domain():
    training, validation = CounterNoise(5 + 2**32, domain=0), CounterNoise(5, domain=1)
    assert training.uniform(Purpose.MASK, 0) != validation.uniform(Purpose.MASK, 0)


def test_streams_of_neighbouring_positions_do_not_overlap():
    noise = CounterNoise(0)
    draws = np.concatenate([noise.uniforms(Purpose.MASK, position, 4096) for position in range(64)])
    assert len(np.unique(draws)) == draws.size


@pytest.mark.parametrize("seed", [0, 2**31, 2**64 + 5, 10**30])
@pytest.mark.parametrize("position", [0, 2**40, 2**63])
def test_seeds_and_positions_may_be_huge(seed, position):
    draw = CounterNoise(seed).uniform(Purpose.TIME, position)
    assert 0 <= draw < 1
    assert draw != CounterNoise(seed + 1).uniform(Purpose.TIME, position)


def test_uniforms_of_different_samples_are_independent():
    noise = CounterNoise(11)
    draws = np.stack([noise.uniforms(Purpose.MASK, position, 4096) for position in range(32)])
    correlations = np.corrcoef(draws)[np.triu_indices(32, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)
    assert chi_square_of_20_bins(draws.ravel()) < CHI_SQUARE_19


def test_ranks_of_a_power_of_two_are_reversed_bits():
    assert van_der_corput_ranks(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert van_der_corput_ranks(1).tolist() == [0]


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_ranks_are_a_permutation(size):
    assert sorted(van_der_corput_ranks(size).tolist()) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 600) | st.sampled_from([64, 512]), st.integers(0, 9), st.data())
def test_every_aligned_block_of_ranks_is_spread_over_the_range(size, log_block, data):
    block = 1 << log_block
    start = block * data.draw(st.integers(0, max(0, size // block - 1)))
    if start + block > size:
        return
    ranks = np.sort(van_der_corput_ranks(size)[start : start + block])
    strata = ranks * block // size
    # One in each stratum where powers of two divide; otherwise within the sequence's discrepancy.
    allowed = 0 if size & (size - 1) == 0 else np.log2(size) / 3 + 2
    assert np.abs(strata - np.arange(block)).max() <= allowed


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 64, 256])
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_each_stratum_of_t_holds_one_sample_of_the_global_batch(batch, step):
    scaled = (1 - times_of_step(step, batch)) * batch
    # One offset shifts the whole batch: removing it leaves the strata's numbers.
    strata = scaled - scaled[0]
    np.testing.assert_allclose(strata, np.round(strata), atol=1e-9)
    assert sorted(np.round(strata).astype(int) % batch) == list(range(batch))


@pytest.mark.parametrize("micro", [1, 2, 4, 8, 16, 32, 64])
def test_every_micro_batch_has_evenly_spaced_times(micro):
    for block in times_of_step(5, 64).reshape(-1, micro):
        ordered = np.sort(block)
        gaps = np.diff(np.append(ordered, ordered[0] + 1))
        np.testing.assert_allclose(gaps, 1 / micro, atol=1e-12)


def test_the_mean_of_t_over_a_global_batch_is_a_half():
    for step in range(20):
        assert abs(times_of_step(step, 256).mean() - 0.5) <= 0.5 / 256 + 1e-12


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("slot", [0, 5, 15])
def test_t_of_a_slot_is_uniform_over_steps(low_discrepancy, slot):
    sampler = TimeSampler(CounterNoise(1), 16, low_discrepancy)
    times = np.array([sampler(step * 16 + slot) for step in range(4000)])
    assert times.min() > 0
    assert times.max() <= 1
    assert chi_square_of_20_bins(times) < CHI_SQUARE_19


def test_t_of_a_position_is_uniform_over_seeds():
    times = [TimeSampler(CounterNoise(seed), 16, True)(37) for seed in range(4000)]
    assert chi_square_of_20_bins(times) < CHI_SQUARE_19


def test_steps_have_offsets_of_their_own():
    offsets = {round(float((1 - times_of_step(step, 8)[0]) * 8 % 1), 9) for step in range(50)}
    assert len(offsets) == 50


def test_independent_times_are_not_stratified():
    sampler = TimeSampler(CounterNoise(1), 64, low_discrepancy=False)
    strata = {int(64 * (1 - sampler(position))) for position in range(64)}
    assert len(strata) < 55
