"""One folder for the code of exported models, for the whole session and its child processes.

transformers imports that code as parts of one package, which remembers the first folder that it
came from: a second one in the same process would not be found. The folder is named before anything
imports transformers, which reads the name once.
"""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings

# A machine that others use may be slow at any moment; tests whose time matters measure it.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="hf-modules-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_MODULES_CACHE"] = folder.name
    os.environ["HF_HUB_OFFLINE"] = "1"
