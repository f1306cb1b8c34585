from __future__ import annotations

import pytest

from megatron_mdm.studies.simulation.calls import Call
from megatron_mdm.studies.simulation.replay import Disagreement, Stuck, Unread, replay

PAIR, OTHERS, ALL = (0, 1), (2, 3), (0, 1, 2, 3)


def collective(ranks, elements=8, operation="all_reduce", communicator=0):
    return Call(operation, ranks, communicator, None, elements, "float32", "step 0")


def send(peer, ranks=PAIR, elements=8):
    return Call("send", ranks, 0, peer, elements, "float32", "step 0")


def receive(peer, ranks=PAIR, elements=8):
    return Call("receive", ranks, 0, peer, elements, "float32", "step 0")


def world(own, shared):
    """Two pairs of ranks that each make calls of their own, and then all the same."""
    return {rank: [*own[rank // 2], *shared] for rank in range(4)}


def test_ranks_that_agree_end():
    own = [[collective(PAIR)] * 3, [collective(OTHERS, 5)] * 2]
    assert replay(world(own, [collective(ALL), collective(ALL, 1)])) == []


def test_a_rank_that_skips_a_collective_lets_the_others_wait():
    calls = world([[collective(PAIR)], [collective(OTHERS)]], [collective(ALL)])
    del calls[3][0]
    faults = replay(calls)
    assert {fault.rank for fault in faults} == {0, 1, 2, 3}
    assert all(isinstance(fault, Stuck) for fault in faults)
    text = "\n".join(map(str, faults))
    assert "rank 2 waits in call 0: all_reduce of 8 float32 over ranks 2, 3" in text
    assert "rank 3 waits in call 0: all_reduce of 8 float32 over ranks 0, 1, 2, 3" in text


def test_a_rank_that_ends_too_early_is_named():
    faults = replay({0: [collective(PAIR)], 1: []})
    assert [str(fault) for fault in faults] == [
        "rank 0 waits in call 0: all_reduce of 8 float32 over ranks 0, 1 (step 0)",
        "rank 1 has ended after 0 calls",
    ]


def test_groups_in_another_order_wait_for_each_other():
    first, second = collective(PAIR, communicator=0), collective(PAIR, communicator=1)
    faults = replay({0: [first, second], 1: [second, first]})
    assert {(fault.rank, fault.position) for fault in faults} == {(0, 0), (1, 0)}


@pytest.mark.parametrize(
    "other",
    [collective(PAIR, 9), collective(PAIR, operation="all_gather")],
    ids=["size", "operation"],
)
def test_one_group_has_to_mean_the_same_call(other):
    (fault,) = replay({0: [collective(PAIR)], 1: [other]})
    assert isinstance(fault, Disagreement)
    assert f"rank 1 calls {other.operation} of {other.elements}" in str(fault)


def test_messages_meet_in_their_order():
    assert (
        replay({0: [send(1), send(1, elements=3)], 1: [receive(0), receive(0, elements=3)]}) == []
    )
    (fault,) = replay({0: [send(1), send(1, elements=3)], 1: [receive(0, elements=3)]})
    assert isinstance(fault, Disagreement)


def test_a_sender_does_not_wait():
    assert replay({0: [send(1), receive(1)], 1: [send(0), receive(0)]}) == []


def test_two_that_receive_first_wait_for_ever():
    faults = replay({0: [receive(1), send(1)], 1: [receive(0), send(0)]})
    assert [(fault.rank, fault.position) for fault in faults] == [(0, 0), (1, 0)]


def test_a_message_that_nobody_receives_is_found():
    assert replay({0: [send(1)], 1: []}) == [Unread(0, send(1))]


def test_stages_in_another_order_are_stuck():
    """The last of three stages waits for a gradient before it has been given an activation."""
    ranks = (0, 1, 2)
    good = {
        0: [send(1, ranks), receive(1, ranks)],
        1: [receive(0, ranks), send(2, ranks), receive(2, ranks), send(0, ranks)],
        2: [receive(1, ranks), send(1, ranks)],
    }
    assert replay(good) == []
    good[1] = [good[1][0], good[1][2], good[1][1], good[1][3]]
    assert {fault.rank for fault in replay(good)} == {0, 1, 2}
