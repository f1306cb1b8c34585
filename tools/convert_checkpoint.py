"""Converts checkpoints to and from other formats, inspects them, and divides them anew."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.hf.conversion.commands import COMMANDS


def main() -> None:
    """Runs the subcommand and prints what it says."""
    for line in run_command(COMMANDS, __doc__) or ():
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
