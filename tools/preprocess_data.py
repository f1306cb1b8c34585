"""Turns text files into token shards (.bin, .idx) with a manifest (.json)."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.corpus.preprocess import preprocess
from megatron_mdm.errors import run_entry_point


def main() -> None:
    """Preprocesses the input files into one pair of shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help=".jsonl, .jsonl.gz, .txt, .parquet"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="a folder, a tokenizer.json or a Hugging Face name"
    )
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="the shards' path without .bin and .idx"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that encode (default 1)")
    parser.add_argument("--text-key", default="text", help="JSON key or column of the text")
    parser.add_argument("--eod-token", help="ends a document (default: the tokenizer's own)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace shards that something else made"
    )
    arguments = parser.parse_args()
    start_seconds = time.perf_counter()
    manifest = preprocess(
        arguments.input,
        arguments.tokenizer,
        arguments.output_prefix,
        workers=arguments.workers,
        text_key=arguments.text_key,
        overwrite=arguments.overwrite,
        eod_token=arguments.eod_token,
    )
    elapsed_seconds = time.perf_counter() - start_seconds
    skipped = manifest.num_skipped_documents
    print(
        f"{arguments.output_prefix}: {manifest.num_documents} documents"
        + (f" ({skipped} without text skipped)" if skipped else "")
        + f", {manifest.num_tokens} tokens of {manifest.dtype}, {elapsed_seconds:.1f} s"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
