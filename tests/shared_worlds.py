"""Worlds of 1, 2 and 4 ranks, each started at most once as long as it is of use.

The conftest of a folder whose tests run tasks on ranks imports what stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from worlds import World

_FOLDERS = {Path(__file__).parent / name for name in ("distributed", "extension", "golden")}
_worlds: dict[int, World] = {}


@pytest.fixture(scope="session")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], World]:
    """The world of a size. It starts with its first task and ends with the last of these tests."""

    def get(size: int) -> World:
        if size not in _worlds:
            _worlds[size] = World(size, tmp_path_factory.mktemp(f"world{size}"))
        return _worlds[size]

    return get


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Ends the worlds before tests elsewhere: idle ranks take time from all that follows."""
    if nextitem is None or nextitem.path.parent not in _FOLDERS:
        for world in _worlds.values():
            world.stop()
