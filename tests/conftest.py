"""What holds for the whole session and its child processes: threads, and the code of exports.

The number of threads is set before anything imports torch, which reads it once.

transformers imports the code of exported models as parts of one package, which remembers the first
folder that it came from: a second one in the same process would not be found. The folder is named
before anything imports transformers, which reads the name once.
"""

from __future__ import annotations

import os
import tempfile

import pytest
from covering import pytest_addoption, pytest_collection_modifyitems  # noqa: F401 - hooks
from hypothesis import settings
from left_out import pytest_terminal_summary  # noqa: F401 - a hook
from threads import TEST_THREADS
from xdist.scheduler import LoadScopeScheduling

os.environ["OMP_NUM_THREADS"] = str(TEST_THREADS)
# Many processes on a few cores: threads that spin take the core from those that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A machine that others use may be slow at any moment; tests whose time matters measure it.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


# Tests that start several processes, which wait for each other: two of them at once on a few cores
# would wait for the scheduler. Those on a cluster wait for SLURM most of the time.
_TOGETHER = {
    **dict.fromkeys(("distributed", "e2e", "extension", "golden"), "ranks"),
    **dict.fromkeys(("slurm", "hosts"), "clusters"),
}


class ByFolder(LoadScopeScheduling):
    """Gives all tests of ranks to one process, all on clusters to one, the rest file after file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return _TOGETHER.get(file.split("/")[1], file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFolder:
    """What `make test TEST_PROCESSES=2` shares tests out by."""
    return ByFolder(config, log)


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="hf-modules-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_MODULES_CACHE"] = folder.name
    os.environ["HF_HUB_OFFLINE"] = "1"
