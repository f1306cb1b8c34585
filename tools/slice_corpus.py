"""Divides .jsonl files by a key of their records: by domain, or by slices of time."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.corpus.slicing import By, slice_corpus


def main(*, input: list[Path], output: Path, key: str, by: By = "value") -> None:
    """Divides the inputs and prints what each slice holds.

    Args:
        input: .jsonl files, perhaps compressed.
        output: Folder of the slices.
        key: JSON key that decides, such as domain or date.
        by: Value, or a period of a date.
    """
    for name, count in slice_corpus(input, output, key, by).items():
        print(f"{output / name}.jsonl: {count} records")


if __name__ == "__main__":
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
