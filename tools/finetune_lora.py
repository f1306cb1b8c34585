"""Fine-tunes an exported model on prompts and responses by low-rank adapters (LoRA)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.hf.adapters.command import finetune

if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(finetune, __doc__)))
