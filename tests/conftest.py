"""What all tests share: how they are divided, and one folder for the code of exported models.

Two workers of pytest-xdist take turns at groups. Tests of one folder with fixtures for the session
(a cluster, ranks, uninterrupted runs) are one group, the longest first; every other file is one of
its own.

transformers imports that code as parts of one package, which remembers the first folder that it
came from: a second one in the same process would not be found. The folder is named before anything
imports transformers, which reads the name once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# A machine that others use may be slow at any moment; tests whose time matters measure it.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

TESTS = Path(__file__).parent
# The cluster and the hosts both want network namespaces.
GROUPS = {"slurm": "cluster", "hosts": "cluster", "distributed": "ranks", "e2e": "runs"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [*dict.fromkeys(GROUPS.values())]

    def place(item: pytest.Item) -> int:
        group = GROUPS.get(item.path.relative_to(TESTS).parts[0])
        return order.index(group) if group else len(order)

    items.sort(key=place)
    for item in items:
        name = item.path.relative_to(TESTS)
        item.add_marker(pytest.mark.xdist_group(GROUPS.get(name.parts[0], str(name))))


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="hf-modules-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_MODULES_CACHE"] = folder.name
    os.environ["HF_HUB_OFFLINE"] = "1"
