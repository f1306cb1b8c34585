"""Best-fit packing, against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.data.packing import pack


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """By trying all assignments, for few items."""
    for bins in range(1, len(sizes) + 1):
        for places in itertools.product(range(bins), repeat=len(sizes)):
            room = [capacity] * bins
            for size, place in zip(sizes, places, strict=True):
                room[place] -= size
            if min(room) >= 0:
                return bins
    return 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_no_item_is_lost_no_bin_overflows_and_few_bins_do(sizes):
    bins = pack(sizes, 12)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in one) <= 12 for one in bins)
    assert len(bins) <= 11 / 9 * fewest_bins(sizes, 12) + 6 / 9


def test_the_best_fit_is_taken_not_the_first():
    # 7 and 6 open bins with room for 3 and 4; 4 fits the second exactly, then 3 the first.
    assert pack([3, 4, 6, 7], 10) == [[3, 0], [2, 1]]
    assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack([], 10) == []


def test_many_items_take_no_time():
    sizes = [1 + (index * 7919) % 600 for index in range(100_000)]
    bins = pack(sizes, 2048)
    assert len(bins) <= 1.01 * sum(sizes) / 2048 + 1


@pytest.mark.parametrize("sizes", [[11], [0, 3], [-1]])
def test_what_fits_no_bin_is_refused(sizes):
    with pytest.raises(ValueError, match="for bins of 10"):
        pack(sizes, 10)
