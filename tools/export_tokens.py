"""Writes the tokens of shards, a merge or a subset to a file that programs of others read.

parquet: a document a row, in the column input_ids. nanogpt: the bare stream of tokens, uint16, or
uint32 for larger vocabularies. llm.c: a header of 256 int32 and the stream in uint16, as llm.c and
modded-nanogpt read it. Beside the last two lies OUTPUT.json, which says what they hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.data.export import FORMATS, export_tokens


def main() -> None:
    """Exports one stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", type=Path, required=True, help="shards or a view, path without extension"
    )
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    arguments = parser.parse_args()
    record = export_tokens(arguments.input, arguments.output, arguments.format, arguments.overwrite)
    print(
        f"{arguments.output}: {record.num_documents} documents, {record.num_tokens} tokens, "
        f"{record.dtype}"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
