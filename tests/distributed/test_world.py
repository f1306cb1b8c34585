"""The harness: failures carry their rank, hangs end, and the world works again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from worlds import RankFailure, World, WorldTimeout


def place(**kwargs: int) -> tuple[int, int, dict[str, int]]:
    return int(os.environ["RANK"]), dist.get_world_size(), kwargs


def process_id() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("a made-up mistake")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(3600)
    dist.barrier()


def return_what_cannot_be_sent() -> object:
    return lambda: None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(2, tmp_path_factory.mktemp("world"))
    yield world
    world.stop()


def _is_alive(pid: int) -> bool:
    # A process that was killed and waited for has no folder.
    return Path(f"/proc/{pid}").exists()


def test_a_task_runs_on_every_rank_and_results_come_in_rank_order(world: World) -> None:
    assert world.run(place, x=3) == [(0, 2, {"x": 3}), (1, 2, {"x": 3})]


def test_tasks_share_processes(world: World) -> None:
    first = world.run(process_id)
    assert world.run(process_id) == first == world.process_ids


def test_a_failure_carries_rank_and_traceback_and_the_world_works_again(world: World) -> None:
    before = world.run(process_id)
    with pytest.raises(RankFailure, match="a made-up mistake") as caught:
        world.run(fail_on, rank=1)
    assert caught.value.rank == 1
    assert "fail_on failed on rank 1 of 2" in str(caught.value)
    assert 'raise KeyError("a made-up mistake")' in str(caught.value)
    assert not any(_is_alive(pid) for pid in before)
    assert [rank for rank, _, _ in world.run(place)] == [0, 1]


def test_a_death_is_told_with_status_and_log(world: World) -> None:
    with pytest.raises(RankFailure, match="died with status 7") as caught:
        world.run(die_on, rank=1)
    assert caught.value.rank == 1
    assert "last words" in str(caught.value)


def test_a_hang_is_ended_with_the_stacks_of_all_ranks(world: World) -> None:
    before = world.run(process_id)
    started = time.monotonic()
    with pytest.raises(WorldTimeout, match=r"took more than 0\.5 s") as caught:
        world.run(hang_on, timeout_seconds=0.5, rank=0)
    assert time.monotonic() - started < 10
    assert "Rank 0 did not answer" in str(caught.value)
    assert "in hang_on" in str(caught.value)
    assert "in barrier" in str(caught.value)
    assert not any(_is_alive(pid) for pid in before)


def test_a_result_that_cannot_be_sent_is_a_failure(world: World) -> None:
    with pytest.raises(RankFailure, match="pickle"):
        world.run(return_what_cannot_be_sent)


def test_stopping_leaves_no_process(world: World) -> None:
    processes = world.run(process_id)
    world.stop()
    assert world.process_ids == []
    assert not any(_is_alive(pid) for pid in processes)
