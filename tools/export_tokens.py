"""Writes the tokens of shards, a merge or a subset to a file that programs of others read.

parquet: one document per row, in the column input_ids. nanogpt: the bare stream of tokens, uint16,
or uint32 for larger vocabularies. llm.c: a header of 256 int32 and the stream in uint16, as llm.c
and modded-nanogpt read it. Beside the last two lies OUTPUT.json, which says what they hold.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.data.export import Format, export_tokens


def main(*, input: Path, format: Format, output: Path, overwrite: bool = False) -> None:
    """Exports one stream.

    Args:
        input: Shards or a view, path without extension.
        format: Of the file.
        output: The file to write.
        overwrite: Replace a file that exists.
    """
    record = export_tokens(input, output, format, overwrite)
    print(f"{output}: {record.num_documents} documents, {record.num_tokens} tokens, {record.dtype}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
