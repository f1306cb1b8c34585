"""Other versions of packages, each in a folder of its own that pip fills when asked to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ASKED_FOR = "TEST_REGISTRY"


@pytest.fixture(scope="session")
def ask_registry() -> None:
    """Leaves out what asks a package registry, unless that is wanted."""
    if not os.environ.get(ASKED_FOR):
        pytest.skip("it asks a package registry")


@pytest.fixture(scope="session")
def other_transformers(tmp_path_factory, ask_registry) -> Callable[[tuple[str, ...]], Path]:
    """Installs packages without what they depend on, which is this environment's."""

    def install(requirements: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("site-packages")
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        command = [sys.executable, "-m", "pip", "install", *options, *requirements]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return folder

    return install
