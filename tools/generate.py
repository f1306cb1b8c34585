"""Generates text: continues prompts, or fills the middle between a prompt and a suffix."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.inference.generate_command import run


def main() -> None:
    """Generates what the command line asks for."""
    run_command(run, __doc__)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
