from __future__ import annotations

import pytest
from world import World


@pytest.fixture
def world(tmp_path) -> World:
    """A folder like a fresh clone after `make setup`."""
    return World(tmp_path)
