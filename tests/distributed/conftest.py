"""Worlds of 1, 2 and 4 ranks, each started at most once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from worlds import World


@pytest.fixture(scope="session")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], World]]:
    """The world of a size. It starts with its first task and ends with the session."""
    worlds: dict[int, World] = {}

    def get(size: int) -> World:
        if size not in worlds:
            worlds[size] = World(size, tmp_path_factory.mktemp(f"world{size}"))
        return worlds[size]

    yield get
    for world in worlds.values():
        world.stop()
