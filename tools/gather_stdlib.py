"""Gathers a folder of Python sources, by default the standard library, as a corpus."""

from __future__ import annotations

import logging
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.corpus.stdlib import gather_python_corpus


def main(*, output: Path, root: Path | None = None, valid_fraction: float = 0.05) -> None:
    """Writes train.jsonl, valid.jsonl and corpus.json.

    Args:
        output: The folder to write to.
        root: The folder of Python sources; by default this Python's standard library.
        valid_fraction: The share to hold out, in [0, 1).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    counts = gather_python_corpus(root, output, valid_fraction)
    print(
        f"{output}: {counts.train_documents} training documents "
        f"({counts.train_bytes / 1e6:.2f} MB), {counts.valid_documents} validation documents "
        f"({counts.valid_bytes / 1e6:.2f} MB)"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
