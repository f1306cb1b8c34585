"""The environment of a run is that of all its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from worlds import World

from megatron_mdm.config import ParallelConfig
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import start_process_group
from megatron_mdm.training.environment import describe_processor, gather_environment

CPU = torch.device("cpu")


def environment_with(threads: list[int]) -> tuple[list[int], list[str]]:
    """What this rank learns when each rank computes with so many threads."""
    start_process_group(CPU)
    before = torch.get_num_threads()
    torch.set_num_threads(threads[int(os.environ["RANK"])])
    try:
        with open_mesh(ParallelConfig(), CPU) as mesh:
            found = gather_environment(mesh)
    finally:
        torch.set_num_threads(before)
    return found.threads, found.processors


def test_every_rank_learns_the_threads_and_processors_that_occur(
    world_of: Callable[[int], World],
) -> None:
    mine = [describe_processor(CPU)]
    assert world_of(1).run(environment_with, threads=[3]) == [([3], mine)]
    assert world_of(2).run(environment_with, threads=[2, 1]) == [([1, 2], mine)] * 2
    assert world_of(2).run(environment_with, threads=[2, 2]) == [([2], mine)] * 2
