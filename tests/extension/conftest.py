"""Gives these tests worlds of ranks, and the modules that the tests of ranks share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from shared_worlds import pytest_runtest_teardown, world_of  # noqa: F401 - hook and fixture
