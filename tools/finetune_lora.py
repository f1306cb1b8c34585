"""Fine-tunes an exported model on prompts and responses by low-rank adapters (LoRA)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.hf.adapters.command import add_command_line, run


def main() -> None:
    """Learns what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_command_line(parser)
    run(parser.parse_intermixed_args())


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
