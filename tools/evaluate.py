"""Evaluates an exported model on tasks of lm-evaluation-harness, with standard errors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.inference.evaluation.task_command import add_command_line, run


def main() -> None:
    """Evaluates what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_command_line(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
