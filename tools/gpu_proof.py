"""Proof on a GPU: what has to travel, all measurements in one command, and what is published."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from typing import Annotated

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import FLATTENED, run_command
from megatron_mdm.studies.proof.command import ProofSettings, run_proof


def run(settings: Annotated[ProofSettings, FLATTENED]) -> None:
    """Measures all stages, or goes on with what is not done."""
    run_proof(settings, say=lambda line: print(line, flush=True))


def main() -> None:
    """Runs the command that the first argument names."""
    run_command({"run": run}, __doc__)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
