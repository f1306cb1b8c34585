"""Pre-trains a model from a YAML config: alone, under torchrun or deepspeed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.training.command import run_pretraining

if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_pretraining(__doc__)))
