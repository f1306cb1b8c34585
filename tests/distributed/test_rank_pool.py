"""Work that one rank hands out: every item is done once, on some rank, and comes back in order."""

from __future__ import annotations

import pytest
from pooling import fail, lead


@pytest.mark.parametrize(("size", "num_items"), [(1, 5), (2, 5), (4, 10), (4, 2)])
def test_items_are_dealt_out_and_come_back_in_order(world_of, size, num_items):
    first, *others = world_of(size).run(lead, num_items=num_items)
    assert [square for square, _ in first["first"]] == [item**2 for item in range(num_items)]
    assert [rank for _, rank in first["first"]] == [item % size for item in range(num_items)]
    assert first["error"] == "1 is odd"
    assert [square for square, _ in first["second"]] == [0, 1, 4]
    grouped = first["grouped"]
    assert [square for square, _ in grouped] == [item**2 for item in range(num_items)]
    assert [rank for _, rank in grouped] == [item // 3 % size for item in range(num_items)]
    assert others == [{}] * (size - 1)


def test_ranks_that_serve_are_let_go_when_the_work_fails(world_of):
    assert world_of(2).run(fail) == ["no such task", "served"]
