"""Quality of generation against its speed: masked diffusion beside AR with a key-value cache."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.papers.tradeoff_command import run_tradeoff

if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(run_tradeoff, __doc__)))
