"""Proof on a GPU: what has to travel, all measurements in one command, and what is published."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import FLATTENED, run_command
from megatron_mdm.studies.proof.command import PackSettings, ProofSettings, pack_proof, run_proof
from megatron_mdm.studies.proof.report import write_report


def pack(settings: Annotated[PackSettings, FLATTENED]) -> None:
    """Pack what must travel, and print the command that starts the proof there."""
    print(pack_proof(settings))


def run(settings: Annotated[ProofSettings, FLATTENED]) -> None:
    """Measure stage after stage, or go on with what is not done."""
    run_proof(settings, say=lambda line: print(line, flush=True))


def report(out: Path, /, *, docs: Path | None = None) -> None:
    """Write the tables and plots of what was measured.

    Args:
        out: Folder of the proof.
        docs: Folder of documentation, whose performance.md and scaling.md get the tables.
    """
    print(*(f"wrote {path}" for path in write_report(out, docs)), sep="\n")


def main() -> None:
    """Runs the command that the first argument names."""
    run_command({"pack": pack, "run": run, "report": report}, __doc__)


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
