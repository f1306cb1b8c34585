"""Puts the parts that an array job wrote together: as a view, or copied into one pair of shards."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.core.options import run_command
from megatron_mdm.data import merge
from megatron_mdm.data.merge import merge_parts
from megatron_mdm.data.shards import read_output_prefix


def main(
    *, prefix: str, copy: bool = False, remove_parts: bool = False, overwrite: bool = False
) -> None:
    """Merges the parts at PREFIX.parts into PREFIX.

    Args:
        prefix: The path of the whole; parts in PREFIX.parts.
        copy: Write .bin and .idx, not a view.
        remove_parts: Remove the parts once the copy is on disk.
        overwrite: Replace other shards at PREFIX.
    """
    if remove_parts and not copy:
        raise ConfigError("--remove-parts without --copy would lose the tokens: add --copy.")
    path = read_output_prefix(prefix)
    whole = merge_parts(path, copy, overwrite)
    print(f"{path}: {whole.num_documents} documents, {whole.num_tokens} tokens")
    if remove_parts:
        merge.remove_parts(path)
        print(f"{path}.parts: removed")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
