"""Converts a tokenizer of SentencePiece, tekken, tiktoken or GPT-2's files to a tokenizer.json.

Every id is compared with the original library's, over the whole vocabulary and on hard texts.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.core.errors import DataError, run_entry_point
from megatron_mdm.corpus.tokenizer import load_tokenizer, save_tokenizer


def main() -> None:
    """Converts one tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", required=True, help="the file or folder, or a Hugging Face name")
    add("--output", type=Path, required=True, help="the folder to write tokenizer.json to")
    add("--eod-token", help="ends a document (default: the tokenizer's own)")
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    arguments = parser.parse_args()
    existing = arguments.output / "tokenizer.json"
    if existing.exists() and not arguments.overwrite:
        raise DataError(
            f"{existing} exists: replace it with --overwrite or choose another --output."
        )
    tokenizer = load_tokenizer(arguments.input, arguments.eod_token)
    save_tokenizer(tokenizer.backend, arguments.output, tokenizer.eod_token)
    print(
        f"{arguments.output}: {tokenizer.vocab_size} tokens, documents end with "
        f"{tokenizer.eod_token!r}, sha256 {tokenizer.sha256[:12]}"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sys.exit(run_entry_point(main))
