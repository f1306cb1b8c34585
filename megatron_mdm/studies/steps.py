"""Jobs that are several of the project's own commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from megatron_mdm.core.errors import MdmError

# The repository, whose scripts are run.
REPO = Path(__file__).resolve().parents[2]


def run_step(*command: str | Path | int) -> None:
    """Shows and runs one command.

    Args:
        *command: Script, relative to the repository, and its arguments.

    Raises:
        MdmError: The command failed; it has said why.
    """
    words = [str(word) for word in command]
    print(f"\n$ python {shlex.join(words)}", flush=True)  # noqa: T201 - what a user follows
    status = subprocess.run([sys.executable, REPO / words[0], *words[1:]], check=False).returncode
    if status:
        raise MdmError(f"{words[0]} ended with status {status}: see above.")
