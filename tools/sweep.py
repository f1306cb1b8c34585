"""Runs a sweep from one YAML file, here or on SLURM, and makes the table of its runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.sweeps.sweep_command import COMMANDS

if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(COMMANDS, __doc__)))
