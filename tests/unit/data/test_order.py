from __future__ import annotations

import itertools
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.data.order import EpochOrder, Permutation, Visit

keys = st.lists(st.integers(0, 2**64), min_size=1, max_size=4).map(tuple)


def images(size: int, *key: int) -> np.ndarray:
    return Permutation(size, key)(np.arange(size))


@settings(deadline=None)
@given(st.integers(1, 5000), keys)
def test_a_permutation_is_a_bijection(size, key):
    assert sorted(images(size, *key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**9, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 1, 10**12, 2**40])
def test_a_huge_permutation_keeps_samples_apart_and_inside(size):
    ends = [0, 1, size // 2, size - 2, size - 1]
    index_N = np.unique(np.append(np.random.default_rng(0).integers(0, size, 20_000), ends))
    image_N = Permutation(size, (1, 2))(index_N)
    assert len(np.unique(image_N)) == len(index_N)
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


def test_all_orders_of_four_are_equally_likely():
    orders = [tuple(images(4, key).tolist()) for key in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum((count - 200) ** 2 / 200 for count in counts) < 58.6  # 23 degrees, 1 in 10,000


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


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_shows_every_window_once(num_windows, seed, epoch):
    order = EpochOrder(num_windows, seed)
    visits = [order.visit(epoch * num_windows + index) for index in range(num_windows)]
    assert {visit.epoch for visit in visits} == {epoch}
    assert sorted(visit.window for visit in visits) == list(range(num_windows))


def test_after_one_epochs_samples_every_window_was_seen():
    # Shuffling all copies of ten epochs together would have shown 65 % of them.
    order = EpochOrder(1000, seed=1)
    assert len({order.visit(position).window for position in range(1000)}) == 1000


def test_epochs_and_seeds_have_orders_of_their_own():
    def order_of(seed, epoch):
        order = EpochOrder(500, seed)
        return np.array([order.visit(epoch * 500 + index).window for index in range(500)])

    orders = [order_of(seed, epoch) for seed in range(4) for epoch in range(4)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 12  # Poisson(1) again
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(500)


def test_a_position_is_visited_alike_from_anywhere():
    straight = EpochOrder(7, seed=2)
    expected = [straight.visit(position) for position in range(70)]
    for position in (69, 3, 30, 29, 31, 0):
        assert EpochOrder(7, seed=2).visit(position) == expected[position]
        assert straight.visit(position) == expected[position]
    assert isinstance(expected[0], Visit)


def test_threads_in_different_epochs_do_not_disturb_each_other():
    order = EpochOrder(64, seed=3)
    expected = [EpochOrder(64, seed=3).visit(position) for position in range(128)]
    wrong = []

    def walk(first: int) -> None:
        for _ in range(20):
            for position in range(first, first + 64):
                if order.visit(position) != expected[position]:
                    wrong.append(position)

    threads = [threading.Thread(target=walk, args=(first,)) for first in (0, 64)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
