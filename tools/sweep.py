"""Runs a sweep from one YAML file, here or on SLURM, and makes the table of its runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.studies.sweeps.sweep_command import add_command_line, run_command

REPO = Path(__file__).resolve().parent.parent


def main() -> int:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_command_line(parser)
    arguments, unknown = parser.parse_known_args()
    return run_command(arguments, unknown, REPO)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
