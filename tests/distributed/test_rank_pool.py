"""Work that one rank hands out: every item is done once, on some rank, and comes back in order."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from pooling import fail, lead

# What transformers imports with a model, and what is left of the group then.
JOINED = """
import os
from megatron_mdm.inference.rank_pool import RankPool, join_launched_ranks

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

with join_launched_ranks():
    import torch.distributed.fsdp
    RankPool({}).run_on_driver(lambda: None)
    assert threads()
print(threads())
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_of_the_group_outlives_it():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", JOINED],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["0\n", "0\n"]
