"""Proves on a borrowed GPU that everything runs, and measures it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command


def pack(*, out: Path, installed: Path | None = None, python_version: str = "3.12") -> None:
    """Packs what the other machine lacks, and prints the command that starts the proof there.

    Args:
        out: The folder to make; a pack that stands there is replaced.
        installed: What the other machine has, as `pip list --format=freeze` prints it there; names
            without versions are taken to fit. Without it: torch and what torch needs.
        python_version: Of the other machine, which is an x86-64 Linux.
    """
    from megatron_mdm.studies.proof.packing import pack as write

    print(write(out, installed, python_version))


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command({"pack": pack}, __doc__)))
