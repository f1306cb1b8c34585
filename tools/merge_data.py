"""Puts the parts that an array job wrote together: as a view, or copied into one pair of shards."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import ConfigError, run_entry_point
from megatron_mdm.data.merge import merge_parts, remove_parts
from megatron_mdm.data.shards import read_output_prefix


def main() -> None:
    """Merges the parts at PREFIX.parts into PREFIX."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--prefix",
        type=read_output_prefix,
        required=True,
        help="the path of the whole; parts in PREFIX.parts",
    )
    parser.add_argument("--copy", action="store_true", help="write .bin and .idx, not a view")
    parser.add_argument(
        "--remove-parts", action="store_true", help="remove the parts once the copy is on disk"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other shards at PREFIX")
    arguments = parser.parse_args()
    if arguments.remove_parts and not arguments.copy:
        raise ConfigError("--remove-parts without --copy would lose the tokens: add --copy.")
    whole = merge_parts(arguments.prefix, arguments.copy, arguments.overwrite)
    print(f"{whole.prefix}: {whole.num_documents} documents, {whole.num_tokens} tokens")
    if arguments.remove_parts:
        remove_parts(arguments.prefix)
        print(f"{whole.prefix}.parts: removed")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
