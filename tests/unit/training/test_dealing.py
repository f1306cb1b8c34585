from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.training.whole_parameters import deal


def test_the_most_costly_goes_first_and_to_whom_has_least():
    assert deal([1, 8, 3, 3, 2], 3) == [2, 0, 1, 2, 1]
    assert deal([], 3) == []
    assert deal([5, 7], 1) == [0, 0]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9))
def test_no_rank_has_more_than_its_share_and_one_piece(costs, num_ranks):
    ranks = deal(costs, num_ranks)
    loads = [
        sum(cost for cost, one in zip(costs, ranks, strict=True) if one == rank)
        for rank in range(num_ranks)
    ]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / num_ranks + max(costs)
