"""Jobs that are several of the project's own commands."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.core.command_line import format_command, own_command
from megatron_mdm.core.errors import MdmError

# The repository, whose recipes are run.
REPO = Path(__file__).resolve().parents[2]


def run_step(*command: str | Path | int, accepts: Sequence[int] = (0,)) -> None:
    """Shows and runs one command.

    Args:
        *command: A command of `mdm`, and its arguments.
        accepts: Exit statuses that are no failure.

    Raises:
        MdmError: The command failed; it has said why.
    """
    print(f"\n$ {format_command(*command)}", flush=True)  # noqa: T201 - what a user follows
    status = subprocess.run(own_command(*command), check=False).returncode
    if status not in accepts:
        raise MdmError(f"mdm {command[0]} ended with status {status}: see above.")
