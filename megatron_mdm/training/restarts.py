"""Attempts after the first, where torchrun starts failed ranks again (`--max-restarts`)."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_mdm.config import Config
from megatron_mdm.core.errors import RunStopped

# In the run's folder: the run was stopped and can go on.
STOPPED_FILE_NAME = "stopped"


def count_restarts() -> int:
    """How often torchrun has started this rank again; 0 under other launchers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def adapt_to_restart(config: Config) -> Config:
    """Adapts the configuration to a restart, after which a run resumes from what it has saved.

    `checkpoint.resume=never` speaks of the first start.

    Returns:
        The configuration, changed only after a restart.

    Raises:
        RunStopped: The attempt before ended because a stop was asked for, and torchrun takes the
            status of that for a failure.
    """
    if count_restarts() == 0:
        return config
    # The first start removes what an earlier run has left.
    if (Path(config.run.dir) / STOPPED_FILE_NAME).exists():
        raise RunStopped("stopped before the restart")
    if config.checkpoint.resume != "never":
        return config
    checkpoint = config.checkpoint.model_copy(update={"resume": "auto"})
    return config.model_copy(update={"checkpoint": checkpoint})
