"""Divides .jsonl files by a key of their records: by domain, or by slices of time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.corpus.slicing import BYS, slice_corpus


def main() -> None:
    """Divides the inputs and prints what each slice holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help=".jsonl files, perhaps compressed")
    add("--output", type=Path, required=True, help="folder of the slices")
    add("--key", required=True, help="JSON key that decides, such as domain or date")
    add("--by", choices=BYS, default="value", help="value, or a period of a date (value)")
    arguments = parser.parse_args()
    counts = slice_corpus(arguments.input, arguments.output, arguments.key, arguments.by)
    for name, count in counts.items():
        print(f"{arguments.output / name}.jsonl: {count} records")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
