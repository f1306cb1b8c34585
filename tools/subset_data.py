"""Takes random documents of token shards, exactly so many tokens, without copying them.

Every size gets a path of its own, also a single one: OUT-25M for 25,000,000 tokens. Subsets of one
input and seed are nested, the smaller at the start of the larger.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.files import read_path
from megatron_mdm.core.options import run_command
from megatron_mdm.data.shards import read_output_prefix
from megatron_mdm.data.subset import make_subset, name_subset


def main(
    *,
    input: Path,
    tokens: list[int],
    output_prefix: str,
    seed: int = 0,
    copy: bool = False,
    overwrite: bool = False,
) -> None:
    """Makes one subset for each size.

    Args:
        input: Shards or a view, path without extension.
        tokens: The sizes in tokens.
        output_prefix: Followed by -25M and the like.
        seed: Decides the documents.
        copy: Write .bin and .idx, for Megatron's own readers.
        overwrite: Replace what another request made.
    """
    source, prefix = read_path(input), read_output_prefix(output_prefix)
    for num_tokens in sorted(set(tokens)):
        output = Path(f"{prefix}-{name_subset(num_tokens)}")
        subset = make_subset(source, output, num_tokens, seed, copy, overwrite)
        print(f"{output}: {subset.num_documents} documents, {subset.num_tokens} tokens")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(lambda: run_command(main, __doc__)))
