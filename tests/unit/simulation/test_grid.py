from __future__ import annotations

import pytest

from megatron_mdm.studies.simulation.calls import Call
from megatron_mdm.studies.simulation.grid import Grid, Place


def call(ranks, peer=None):
    return Call("all_reduce" if peer is None else "send", ranks, 0, peer, 8, "float32", "step 0")


def test_places_and_ranks_are_inverse():
    grid = Grid(tp=2, dp=3, pp=4)
    assert [grid.rank_of(grid.place_of(rank)) for rank in range(grid.size)] == list(range(24))
    # Peers that share a layer stand side by side, stages apart.
    assert grid.place_of(0) == Place(0, 0, 0)
    assert grid.place_of(1) == Place(1, 0, 0)
    assert grid.place_of(6) == Place(0, 0, 1)


@pytest.mark.parametrize(
    ("grid", "kinds"),
    [
        (Grid(1, 1, 1), [0]),
        (Grid(1, 4, 1), [0, 3]),
        (Grid(2, 4, 1), [0, 1, 6]),
        (Grid(2, 2, 2), [0, 1, 2, 4, 5, 6]),
    ],
)
def test_kinds_differ_in_stage_and_in_being_first(grid, kinds):
    assert grid.list_kinds() == kinds


def test_a_rank_stands_for_those_that_are_first_where_it_is():
    grid = Grid(tp=4, dp=4, pp=2)
    played = grid.list_kinds()
    assert [grid.find_alike(rank, played) for rank in (0, 1, 3, 4, 12, 17)] == [0, 3, 3, 12, 12, 19]


def test_calls_move_to_the_groups_and_peers_of_each_rank():
    grid = Grid(tp=2, dp=2, pp=2)
    tensor, data, pipeline, everyone = (0, 1), (0, 2), (0, 4), tuple(range(8))
    ends = (call(tensor), call(data), call(pipeline, peer=4), call(everyone))
    spread = grid.spread({0: ends, 4: [call((4, 5)), call((0, 4), peer=0)]})
    assert spread[0] == list(ends)
    assert [one.ranks for one in spread[3]] == [(2, 3), (1, 3), (3, 7), everyone]
    assert spread[3][2].peer == 7
    assert [(one.ranks, one.peer) for one in spread[6]] == [((6, 7), None), ((2, 6), 2)]


def test_messages_over_the_group_of_all_ranks_move_with_the_rank():
    """Megatron-Core sends between two stages over that group."""
    grid = Grid(tp=1, dp=4, pp=2)
    everyone = tuple(range(8))
    played = {rank: [call(everyone, peer=(rank + 4) % 8)] for rank in (0, 3, 4, 7)}
    spread = grid.spread(played)
    assert [spread[rank][0].peer for rank in range(8)] == [4, 5, 6, 7, 0, 1, 2, 3]
