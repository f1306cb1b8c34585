from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from megatron_mdm.data.order import Permutation, SourceOrder

keys = st.lists(st.integers(0, 2**64), min_size=1, max_size=4).map(tuple)


def images(size: int, *key: int) -> np.ndarray:
    return Permutation(size, key)(np.arange(size))


@settings(deadline=None)
@given(st.one_of(st.integers(1, 70), st.integers(1, 5000)), keys)
def test_a_permutation_is_a_bijection_with_an_inverse(size, key):
    image_N = images(size, *key)
    assert sorted(image_N.tolist()) == list(range(size))
    assert Permutation(size, key).invert(image_N).tolist() == list(range(size))


@pytest.mark.parametrize("size", [10**9, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 1, 10**12, 2**40])
def test_a_huge_permutation_keeps_samples_apart_and_inside(size):
    ends = [0, 1, size // 2, size - 2, size - 1]
    index_N = np.unique(np.append(np.random.default_rng(0).integers(0, size, 20_000), ends))
    image_N = Permutation(size, (1, 2))(index_N)
    assert len(np.unique(image_N)) == len(index_N)
    np.testing.assert_array_equal(Permutation(size, (1, 2)).invert(image_N), index_N)
    assert image_N.min() >= 0
    assert image_N.max() < size
    # Low, middle and high indices land everywhere.
    assert abs(image_N.mean() / size - 0.5) < 4 * np.sqrt(1 / 12 / len(index_N))


def test_the_image_does_not_depend_on_what_else_is_asked():
    permutation = Permutation(1000, (3,))
    whole = permutation(np.arange(1000))
    for index in (0, 17, 999):
        assert permutation(np.array([index]))[0] == whole[index]


@pytest.mark.parametrize(
    ("one", "other"), [((1, 2), (2, 1)), ((1,), (1, 0)), ((0, 0), (0,)), ((2**32, 5), (0, 1, 5))]
)
def test_keys_that_look_alike_give_different_permutations(one, other):
    assert (images(200, *one) != images(200, *other)).sum() > 150


@pytest.mark.parametrize(("size", "limit"), [(2, 15.2), (3, 18.5), (7, 27.9), (16, 44.3)])
def test_the_first_image_is_uniform_over_keys(size, limit):
    first = [Permutation(size, (key,))(np.array([0]))[0] for key in range(200 * size)]
    counts = np.bincount(first, minlength=size)
    assert ((counts - 200) ** 2 / 200).sum() < limit  # 1 in 10,000


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_a_small_set_are_equally_likely_over_keys(size):
    num_orders = math.factorial(size)
    orders = Counter(tuple(images(size, key).tolist()) for key in range(200 * num_orders))
    assert len(orders) == num_orders
    statistic = sum((count - 200) ** 2 / 200 for count in orders.values())
    assert statistic < chi2.isf(1e-4, num_orders - 1)


@pytest.mark.parametrize("size", [5, 64])
def test_epochs_sources_and_seeds_draw_orders_alike(size):
    """Keys as a run makes them: what stands first and second is uniform over pairs."""
    num_pairs, draws = size * (size - 1), 20_160
    firsts = [
        tuple(images(size, seed, source, epoch)[:2].tolist())
        for seed in range(draws // 84)
        for source in range(2)
        for epoch in range(42)
    ]
    expected = draws / num_pairs
    counts = Counter(firsts)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic += (num_pairs - len(counts)) * expected
    assert statistic < chi2.isf(1e-4, num_pairs - 1)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_half_of_the_orders_are_an_odd_number_of_swaps(size):
    odd = sum(is_odd(images(size, 16, key)) for key in range(2000))
    assert abs(odd - 1000) < 4 * np.sqrt(500)


def is_odd(image_N: np.ndarray) -> bool:
    """A cycle of n elements is n - 1 swaps."""
    swaps, seen = 0, set()
    for start in range(len(image_N)):
        place = start
        while place not in seen:
            seen.add(place)
            place = int(image_N[place])
            swaps += place != start
    return swaps % 2 == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 65])
def test_on_both_sides_of_the_bound_pairs_of_images_are_uniform(size):
    """A table up to 64 elements, a network above: what 0 and 1 map to, over keys."""
    num_pairs, draws = size * (size - 1), 20_000
    pairs = np.array([Permutation(size, (6, key))(np.array([0, 1])) for key in range(draws)])
    counts = np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size**2)
    counts = counts.reshape(size, size)
    assert not counts.diagonal().any()
    expected = draws / num_pairs
    statistic = ((counts[~np.eye(size, dtype=bool)] - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(1e-4, num_pairs - 1)


@pytest.mark.parametrize("size", [1, 64, 65, 10**6, 10**12])
def test_a_permutation_holds_no_more_than_a_small_table(size):
    Permutation(size, (1,))(np.array([0]))
    tracemalloc.start()
    permutation = Permutation(size, (2,))
    permutation(np.array([size - 1]))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 64 words of 8 bytes, as Python's integers of 32 bytes and in lists, a few times over.
    assert peak_bytes < 16_384


def test_elements_move_as_far_as_in_a_random_order():
    size = 4096
    displacements, fixed_points, most_common_lag = [], 0, 0
    for key in range(50):
        image_N = images(size, 9, key)
        displacements.append(np.abs(image_N - np.arange(size)).mean() / size)
        fixed_points += int((image_N == np.arange(size)).sum())
        lags = np.diff(image_N) % size
        most_common_lag = max(most_common_lag, int(np.bincount(lags).max()))
    assert np.mean(displacements) == pytest.approx(1 / 3, rel=0.01)
    assert abs(fixed_points - 50) < 4 * np.sqrt(50)
    assert most_common_lag < 13  # Poisson(1) counts: 13 appear once in 10 billion


def test_neighbours_are_not_kept_together():
    image_N = images(100_000, 4).astype(float)
    assert abs(np.corrcoef(image_N[:-1], image_N[1:])[0, 1]) < 4 / np.sqrt(100_000)


def order_of(num_windows, kind="shuffle", key=(1,), seq_length=8) -> SourceOrder:
    return SourceOrder(num_windows, seq_length, kind, key)


def windows_of(order: SourceOrder, epoch: int) -> np.ndarray:
    size = order.num_windows
    return order.find_visits(np.arange(epoch * size, (epoch + 1) * size))[1]


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 2**40),
    st.integers(0, 5),
    st.sampled_from(["shuffle", "fixed", "shifted", "documents"]),
)
def test_every_epoch_shows_every_window_once(num_windows, seed, epoch, kind):
    order = order_of(num_windows, kind, (seed,))
    numbers = np.arange(epoch * num_windows, (epoch + 1) * num_windows)
    epoch_N, window_N, shift_N = order.find_visits(numbers)
    assert set(epoch_N) == {epoch}
    assert sorted(window_N) == list(range(num_windows))
    assert len(set(shift_N)) == 1


def test_after_one_epochs_samples_every_window_was_seen():
    # Shuffling all copies of ten epochs together would have shown 65 % of them.
    assert len(set(order_of(1000).find_visits(np.arange(1000))[1])) == 1000


def test_epochs_seeds_and_sources_have_orders_of_their_own():
    orders = [
        windows_of(order_of(500, key=(seed, source)), epoch)
        for seed in range(3)
        for source in range(2)
        for epoch in range(3)
    ]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 12  # Poisson(1) again
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(500)


def test_a_fixed_order_is_the_first_pass_over_and_over():
    fixed, shuffled = order_of(300, "fixed"), order_of(300, "shuffle")
    for epoch in range(4):
        np.testing.assert_array_equal(windows_of(fixed, epoch), windows_of(shuffled, 0))


def test_shifts_start_at_zero_and_then_spread_over_the_window():
    order = order_of(1, "shifted", seq_length=16)
    shifts = order.find_visits(np.arange(4000))[2]
    assert shifts[0] == 0
    counts = np.bincount(shifts[1:], minlength=16)
    assert len(counts) == 16
    assert sum((count - 250) ** 2 / 250 for count in counts) < 44.3  # 15 degrees, 1 in 10,000
    assert set(order_of(9, "shuffle").find_visits(np.arange(90))[2]) == {0}


def test_a_visit_is_the_same_from_anywhere():
    order = order_of(7, "shifted")
    straight = np.stack(order.find_visits(np.arange(70)))
    for numbers in ([69, 3, 30], [29, 31, 0], [5]):
        np.testing.assert_array_equal(
            np.stack(order.find_visits(np.array(numbers))), straight[:, numbers]
        )


def test_a_trillion_windows_and_a_late_epoch_take_no_time_and_no_memory():
    order = order_of(10**12)
    epoch_N, window_N, _ = order.find_visits(np.array([10**12 * 999_999 + 7]))
    assert epoch_N.tolist() == [999_999]
    assert 0 <= window_N[0] < 10**12
