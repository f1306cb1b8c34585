"""Gathers a folder of Python sources, by default the standard library, as a corpus."""

from __future__ import annotations

import argparse
import logging
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.corpus.stdlib import gather_python_corpus


def main() -> None:
    """Writes train.jsonl, valid.jsonl and corpus.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="the folder of Python sources (default: this Python's standard library)",
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, help="the share to hold out, in [0, 1)"
    )
    arguments = parser.parse_args()
    counts = gather_python_corpus(arguments.root, arguments.output, arguments.valid_fraction)
    print(
        f"{arguments.output}: {counts.train_documents} training documents "
        f"({counts.train_bytes / 1e6:.2f} MB), {counts.valid_documents} validation documents "
        f"({counts.valid_bytes / 1e6:.2f} MB)"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
