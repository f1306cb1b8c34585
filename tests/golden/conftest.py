"""Gives these tests worlds of ranks."""

from __future__ import annotations

from shared_worlds import pytest_runtest_teardown, world_of  # noqa: F401 - a hook and a fixture
