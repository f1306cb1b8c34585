"""Lets these tests name components that lie outside the package, as a user's do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMPONENTS = str(Path(__file__).parent / "components")
sys.path.insert(0, COMPONENTS)
# For the processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join([COMPONENTS, os.environ.get("PYTHONPATH", "")])
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from shared_worlds import pytest_runtest_teardown, world_of  # noqa: F401, E402 - hook and fixture
