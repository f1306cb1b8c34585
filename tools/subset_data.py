"""Takes random documents of token shards, exactly so many tokens, without copying them.

Every size gets a path of its own, also a single one: OUT-25M for 25,000,000 tokens. Subsets of one
input and seed are nested, the smaller at the start of the larger.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import run_entry_point
from megatron_mdm.core.files import read_path
from megatron_mdm.data.shards import read_output_prefix
from megatron_mdm.data.subset import make_subset, subset_name


def main() -> None:
    """Makes one subset for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", type=read_path, required=True, help="shards or a view, path without extension"
    )
    parser.add_argument("--tokens", type=int, nargs="+", required=True, help="the sizes in tokens")
    parser.add_argument("--seed", type=int, default=0, help="decides the documents (default 0)")
    parser.add_argument(
        "--output-prefix",
        type=read_output_prefix,
        required=True,
        help="followed by -25M and the like",
    )
    parser.add_argument(
        "--copy", action="store_true", help="write .bin and .idx, for Megatron's own readers"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what another request made"
    )
    arguments = parser.parse_args()
    for num_tokens in sorted(set(arguments.tokens)):
        output = Path(f"{arguments.output_prefix}-{subset_name(num_tokens)}")
        subset = make_subset(
            arguments.input, output, num_tokens, arguments.seed, arguments.copy, arguments.overwrite
        )
        print(f"{output}: {subset.num_documents} documents, {subset.num_tokens} tokens")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
